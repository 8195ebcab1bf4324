"""Presets of SPM training: the reference's values, and those for the bundled model."""

from __future__ import annotations

from typing import Any

# sd15: the reference's values. It draws anchors as "official" says, which counts the empty prompt as half of them.
_REFERENCE: dict[str, Any] = {
    "max_train_steps": 3000,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine_with_restarts",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 3,
    "max_grad_norm": 0.0,
    "max_denoising_steps": 30,
    "resolution": 512,
    "dynamic_resolution": True,
    "checkpointing_steps": 500,
}
# demo: the bundled model is small and its adapters are short, so a high rate and several states per rollout pay. An eta
# of 1 pushes the erased object's pictures out of their style as well (100 % to 72 %, cat); 0.3 leaves it and still
# erases; 0 leaves a few per cent of the neutral prompt's own objects.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "max_train_steps": 250,
        "learning_rate": 1e-2,
        "guidance_scale": 0.3,
        "batch_size": 8,
        "max_denoising_steps": 20,
        "states_per_rollout": 4,
        "anchor_source": "prompts",
        "anchors_per_step": 8,
        "anchor_weight": 10.0,
    },
    "sd15": _REFERENCE,
    "sdxl": _REFERENCE | {"resolution": 1024, "dynamic_resolution": False, "gradient_checkpointing": True},
}
