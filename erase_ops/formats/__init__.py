"""Readers and writers of adapter files: the reference's SPM files, kohya, diffusers and PEFT LoRA files."""
