"""Trains the ten SPMs that ship with the demo model, by the preset `demo` and the demo's own recipe."""

from __future__ import annotations

from pathlib import Path

from diffusers import StableDiffusionPipeline

from expunge.demo_run.recipe import training_fields
from expunge.erase_ops.spm.config import SPMTrainingConfig
from expunge.erase_ops.spm.training import train_spm

SHIPPED = ("cat", "panda", "car", "frog", "pizza", "rocket", "skull", "knife", "neon", "pixel")


def train(output: Path, names: tuple[str, ...] = SHIPPED, seed: int = 0) -> None:
    """Writes `adapters/NAME` for each concept that has none yet."""
    for name in names:
        folder = output / "adapters" / name
        if (folder / "erasure.json").exists():
            continue
        pipe = StableDiffusionPipeline.from_pretrained(output / "model")
        config = SPMTrainingConfig.preset("demo", **training_fields(name, seed=seed), seed=seed, name=name)
        train_spm(pipe, config).save_pretrained(folder)
