"""The options that commands offer, by the names of the diffusers training scripts where those have one."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def option(name: str, help: str, **more: Any) -> Any:
    return typer.Option(name, help=help, **more)


# Every command
Json = Annotated[bool, option("--json", "Print the result as JSON on stdout.")]
Debug = Annotated[bool, option("--debug", "Show tracebacks and the libraries' own messages.")]

# A base pipeline
Base = Annotated[str, option("--pretrained_model_name_or_path", "Folder or hub id of the base pipeline.")]
Revision = Annotated[str | None, option("--revision", "Branch, tag or commit of a model on the hub.")]
Variant = Annotated[str | None, option("--variant", 'Variant of the weight files, such as "fp16".')]
Device = Annotated[str | None, option("--device", "cpu, cuda, cuda:1, mps; a GPU if there is one.")]
DType = Annotated[str | None, option("--dtype", "float32, float16 or bfloat16; float16 on CUDA, else float32.")]

# Erasures
Artefact = Annotated[str, typer.Argument(help="Artefact folder, adapter file, erased pipeline or hub id.")]
Concepts = Annotated[list[str] | None, option("--concepts", "Concepts of a file that does not name its own.")]
Erasures = Annotated[list[str] | None, option("--erasures", "Artefact folder, file or hub id; repeatable.")]
NoErasures = Annotated[bool, option("--no_erasures", "Draw with the plain base model, to compare with.")]
Combine = Annotated[Literal["linear", "official"] | None, option("--combine", "How several add up.")]
Gate = Annotated[float | None, option("--gate", "One gate for everything instead of the text's.")]
Threshold = Annotated[float | None, option("--gate_threshold", "Gates below become 0; if left out, each one's own.")]
Multiplier = Annotated[float | None, option("--multiplier", "Strength of the erasures.")]
GateNegative = Annotated[
    bool | None, option("--gate_negative/--no_gate_negative", "Gate negative rows like their partners.")
]
AllowMismatch = Annotated[bool | None, option("--allow_mismatch", "Accept erasures made for another base.")]
CheckBase = Annotated[str | None, option("--base", "Folder or hub id of the pipeline it should fit.")]

# Pictures
Prompts = Annotated[list[str], option("--prompt", "What to draw; repeatable.")]
NegativePrompt = Annotated[str | None, option("--negative_prompt", "What to stay away from.")]
OutputDir = Annotated[Path, option("--output_dir", "Folder of what is written.")]
Seed = Annotated[int, option("--seed", "Of the first picture; the next ones count up.", min=0)]
Images = Annotated[int, option("--num_images_per_prompt", "Pictures for each prompt.", min=1)]
Steps = Annotated[
    int | None, option("--num_inference_steps", "Denoising steps; the pipeline's own if left out.", min=1)
]
Guidance = Annotated[float | None, option("--guidance_scale", "Classifier-free guidance.")]
Height = Annotated[int | None, option("--height", "Pixels; the model's own if left out.", min=8)]
Width = Annotated[int | None, option("--width", "Pixels; the model's own if left out.", min=8)]

# Training
Erase = Annotated[list[str] | None, option("--erase", "Concept to erase; repeatable for one adapter of several.")]
Alternative = Annotated[
    list[str] | None, option("--alternative", "What it is erased towards; once for all, or once for each --erase.")
]
Preset = Annotated[str | None, option("--preset", "Start from a named set of values, such as demo.")]
ConfigFile = Annotated[Path | None, option("--config", "Start from a YAML file, ours or the method's reference's.")]

# The demo
DemoConcept = Annotated[
    str | None,
    option("--concept", "What to erase: an object or style (cat, neon); with --family ar a shape or colour."),
]
DemoFamily = Annotated[
    Literal["sd", "ar"], option("--family", "Which bundled model: sd draws by diffusion, ar token by token.")
]
DemoSteps = Annotated[int | None, option("--max_train_steps", "Training steps; the preset's if left out.", min=1)]
DemoMethod = Annotated[
    Literal["spm", "itd"] | None, option("--method", "spm (the default) trains an adapter; itd trains nothing.")
]

# ItD
SAE = Annotated[str, option("--sae", "The sparse autoencoder: a folder of any known layout, or owner/name on the hub.")]
SAEFolder = Annotated[str | None, option("--sae_subfolder", "Where in that folder or repository the autoencoder is.")]
ItDFolder = Annotated[Path, typer.Argument(help="Folder of an ItD artefact.")]
Inspected = Annotated[str, typer.Argument(help="A sparse autoencoder (as for find) or the folder of an ItD artefact.")]
ItDConcepts = Annotated[list[str], option("--erase", "Concept to erase; repeatable.")]
Target = Annotated[
    list[str] | None, option("--target", "Prompt that names the concept, {} in it stands for each; repeatable.")
]
TargetFile = Annotated[Path | None, option("--target_file", "Text file of such prompts, one a line.")]
Remain = Annotated[list[str] | None, option("--remain", "Prompt of a concept that is to remain; repeatable.")]
RemainFile = Annotated[Path | None, option("--remain_file", "Text file of such prompts.")]
Benign = Annotated[list[str] | None, option("--benign", "Prompt of any other kind; repeatable.")]
BenignFile = Annotated[Path | None, option("--benign_file", "Text file of such prompts.")]
Inspect = Annotated[list[str] | None, option("--prompt", "Prompt to look at; repeatable.")]
InspectFile = Annotated[Path | None, option("--prompts_file", "Text file of such prompts.")]
TopN = Annotated[int, option("--top_n", "Features that are taken from each prompt at most.", min=1)]
BenignShare = Annotated[
    float, option("--benign_share", "Share of the benign prompts that may have a feature that stays.", min=0, max=1)
]
Score = Annotated[Literal["max", "mean"], option("--score", "The strongest token counts, or the mean of all.")]
Tokens = Annotated[
    Literal["own", "all"], option("--tokens", "What is scored: a prompt's own tokens, or padding too (CLIP only).")
]
LookedAt = Annotated[
    Literal["own", "all"] | None, option("--tokens", "Tokens looked at; the artefact's if not given, else own.")
]
Strength = Annotated[float, option("--strength", "What erased activations are multiplied by.")]
TargetFPR = Annotated[float, option("--target_fpr", "Share of the benign prompts that may be flagged.", min=0, max=1)]
AttentionMask = Annotated[bool, option("--attention_mask", "Hide padding from the encoder, as BERT-like ones need.")]
Features = Annotated[list[int] | None, option("--feature", "Feature to look at; repeatable.")]
Shown = Annotated[int, option("--shown", "Prompts shown for each feature.", min=1)]
