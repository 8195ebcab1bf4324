"""Scores the finished model: every class at held-out seeds, read by the classifier."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import JanusProcessor

from expunge.demo.picture_classifier import PictureClassifier
from expunge.demo_ar import GUIDANCE, TEMPERATURE
from expunge.demo_ar.builder import model as models
from expunge.demo_ar.builder.shapes import IMAGE_SIZE
from expunge.demo_ar.builder.world import BACKGROUNDS, COLOURS, HELD_OUT_TEMPLATES, SHAPES, TEMPLATES, classes, fill
from expunge.demo_ar.scoring import Kind, Readings, read_pictures
from expunge.erase_ops.janus.decoding import Sampling, draw_tokens
from expunge.erase_ops.janus.family import JanusFamily

PER_CLASS, FIRST_SEED, BATCH = 32, 90_000, 64


def draw(family: JanusFamily, prompts: list[str], seeds: list[int]) -> Tensor:
    """One picture a prompt, each from its own seed: float32 [n, 3, 32, 32] in 0..1."""
    pictures, sampling = [], Sampling(GUIDANCE, TEMPERATURE)
    for start in tqdm(range(0, len(prompts), BATCH), desc="samples"):
        part = slice(start, start + BATCH)
        generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
        tokens = draw_tokens(family, family.encode(prompts[part]), sampling, generators)
        pictures.append(family.pictures(tokens))
    return torch.cat(pictures)


def evaluate(output: Path, per_class: int = PER_CLASS) -> dict[str, Any]:
    """Accuracies of every shape, colour, background and class; writes `samples.png`."""
    family = JanusFamily(models.load(output), JanusProcessor.from_pretrained(output / "model"))
    classifier = PictureClassifier.from_pretrained(output / "classifier")
    templates = TEMPLATES + HELD_OUT_TEMPLATES
    wanted = [Kind(*kind) for kind in classes() for _ in range(per_class)]
    prompts = [
        fill(templates[i % len(templates)], kind.shape, kind.colour, kind.background) for i, kind in enumerate(wanted)
    ]
    images = draw(family, prompts, [FIRST_SEED + i for i in range(len(wanted))])
    readings = read_pictures(classifier, images, wanted)
    sample_sheet(images[::per_class], output / "samples.png")
    return {"pictures": len(wanted), "guidance scale": GUIDANCE, "temperature": TEMPERATURE, **table(readings)}


def table(readings: Readings) -> dict[str, Any]:
    """Shares of pictures that are as wanted."""
    whole = {
        f"{s} {c} {b}": round(readings.share("all", shape=s, colour=c, background=b).value, 4) for s, c, b in classes()
    }
    return {
        "shape accuracy": round(readings.share("shape").value, 4),
        "colour accuracy": round(readings.share("colour").value, 4),
        "background accuracy": round(readings.share("background").value, 4),
        "per shape": {name: round(readings.share("shape", shape=name).value, 4) for name in SHAPES},
        "per colour": {name: round(readings.share("colour", colour=name).value, 4) for name in COLOURS},
        "per background": {name: round(readings.share("background", background=name).value, 4) for name in BACKGROUNDS},
        "all three, per class": whole,
    }


def sample_sheet(images: Tensor, path: Path) -> None:
    """One picture a class, colours on backgrounds in rows, shapes in columns, enlarged twice: to be looked at."""
    grid = images.view(len(SHAPES), -1, 3, IMAGE_SIZE, IMAGE_SIZE)  # [S*C*B, 3, H, W] -> [S, C*B, 3, H, W]
    pixels = grid.permute(1, 3, 0, 4, 2).reshape(grid.shape[1] * IMAGE_SIZE, -1, 3)  # [C*B*H, S*W, 3]
    sheet = Image.fromarray((pixels * 255).round().byte().numpy())
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)
