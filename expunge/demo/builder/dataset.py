"""Renders the training pictures: every object in every style, augmented by small shifts, turns and flips."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from safetensors.numpy import load_file, save_file

from expunge.demo.builder.concepts import OBJECTS, STYLES
from expunge.demo.builder.icons import fetch, render_all
from expunge.demo.builder.styles import CANVAS, DRAWINGS, IMAGE_SIZE, apply_style

TRAIN_PER_PAIR, TEST_PER_PAIR = 56, 8


def augment(drawing: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A small random shift, scale, turn and mirror of an RGBA drawing -> [CANVAS, CANVAS, 4], straight alpha."""
    size = drawing.shape[0]
    scale = size / (CANVAS * rng.uniform(0.86, 1.0))
    angle = np.deg2rad(rng.uniform(-7, 7))
    mirror = -1.0 if rng.random() < 0.5 else 1.0
    shift = rng.uniform(-5, 5, 2)
    # PIL maps output pixels to input pixels; premultiplied alpha keeps dark fringes away.
    a, b = scale * np.cos(angle) * mirror, scale * np.sin(angle) * mirror
    d, e = -scale * np.sin(angle), scale * np.cos(angle)
    middle = CANVAS / 2
    c = size / 2 - a * (middle + shift[0]) - b * (middle + shift[1])
    f = size / 2 - d * (middle + shift[0]) - e * (middle + shift[1])
    premultiplied = drawing * np.concatenate([drawing[..., 3:].repeat(3, -1), np.ones_like(drawing[..., 3:])], -1)
    picture = Image.fromarray((premultiplied * 255).round().astype(np.uint8))
    moved = picture.transform((CANVAS, CANVAS), Image.Transform.AFFINE, (a, b, c, d, e, f), Image.Resampling.BICUBIC)
    result = np.asarray(moved, np.float32) / 255.0
    alpha = result[..., 3:]
    return np.concatenate([np.where(alpha > 1e-3, result[..., :3] / np.maximum(alpha, 1e-3), 0).clip(0, 1), alpha], -1)


def build(output: Path, seed: int = 0) -> None:
    """Writes `data/pictures.safetensors`: uint8 pictures [objects, styles, n, 32, 32, 3], train and test."""
    fetch(output / "icons")
    drawings = render_all(output / "icons", [concept.icon for concept in OBJECTS.values()])
    rng = np.random.default_rng(seed)
    count = TRAIN_PER_PAIR + TEST_PER_PAIR
    pictures = np.empty((len(OBJECTS), len(STYLES), count, IMAGE_SIZE, IMAGE_SIZE, 3), np.uint8)
    for i in range(len(OBJECTS)):
        for j, style in enumerate(STYLES):
            for k in range(count):
                source = DRAWINGS[style][k % len(DRAWINGS[style])]
                image = apply_style(augment(drawings[source][i], rng), style)
                pictures[i, j, k] = (image * 255).round().astype(np.uint8)
    (output / "data").mkdir(parents=True, exist_ok=True)
    arrays = {"train": pictures[:, :, :TRAIN_PER_PAIR].copy(), "test": pictures[:, :, TRAIN_PER_PAIR:].copy()}
    save_file(arrays, output / "data" / "pictures.safetensors")


def load(output: Path, split: str) -> np.ndarray:
    """uint8 [objects, styles, n, 32, 32, 3]."""
    pictures: np.ndarray = load_file(output / "data" / "pictures.safetensors")[split]
    return pictures


def contact_sheet(output: Path) -> None:
    """Writes `data/sheet.png`: one picture of every object in every style, to be looked at."""
    pictures = load(output, "train")
    rows = [np.concatenate([pictures[i, j, 0] for i in range(len(OBJECTS))], 1) for j in range(len(STYLES))]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(output / "data" / "sheet.png")
