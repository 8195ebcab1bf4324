"""Renders the training pictures: every shape in every colour on every background, moved, scaled and turned a little."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors.numpy import load_file, save_file
from torch import Tensor

from expunge.demo_ar.builder.world import BACKGROUNDS, COLOURS, SHAPES, classes

IMAGE_SIZE, SUPERSAMPLED = 32, 256
TRAIN_PER_CLASS, TEST_PER_CLASS = 120, 8


def circle(radius: float = 1.0, points: int = 72, centre: tuple[float, float] = (0.0, 0.0)) -> np.ndarray:
    angle = np.linspace(0, 2 * np.pi, points, endpoint=False)
    return np.stack([centre[0] + radius * np.cos(angle), centre[1] + radius * np.sin(angle)], -1)


def regular(corners: int, radius: float, inner: float | None = None) -> np.ndarray:
    """A regular polygon with a corner on top; with `inner`, a star whose notches lie at that radius."""
    count = corners * (1 if inner is None else 2)
    angle = 2 * np.pi * np.arange(count) / count - np.pi / 2
    radii = np.where(np.arange(count) % 2 == 0, radius, radius if inner is None else inner)
    return np.stack([radii * np.cos(angle), radii * np.sin(angle)], -1)


def heart() -> np.ndarray:
    t = np.linspace(0, 2 * np.pi, 96, endpoint=False)
    x = 16 * np.sin(t) ** 3
    y = 13 * np.cos(t) - 5 * np.cos(2 * t) - 2 * np.cos(3 * t) - np.cos(4 * t)
    return np.stack([x / 16, -(y + 2.5) / 15], -1)


CROSS = np.array(
    [(-1, -3), (1, -3), (1, -1), (3, -1), (3, 1), (1, 1), (1, 3), (-1, 3), (-1, 1), (-3, 1), (-3, -1), (-1, -1)]
)

# Outline of each shape in a unit circle, y downwards, and what is cut out of it.
OUTLINES: dict[str, tuple[np.ndarray, np.ndarray | None]] = {
    "circle": (circle(0.92), None),
    "square": (0.82 * np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]), None),
    "triangle": (np.add(regular(3, 1.12), (0, 0.2)), None),
    "star": (regular(5, 1.12, 0.46), None),
    "cross": (CROSS / 3, None),
    "heart": (heart(), None),
    "ring": (circle(1.0), circle(0.52)),
    "moon": (circle(1.0), circle(0.88, centre=(0.52, -0.12))),
}


def render(shape: str, colour: str, background: str, rng: np.random.Generator) -> np.ndarray:
    """One picture, uint8 [32, 32, 3]: radius 9.5 to 11.5 pixels, moved by up to 3, turned by up to 8 degrees."""
    scale = rng.uniform(9.5, 11.5) * SUPERSAMPLED / IMAGE_SIZE
    centre = SUPERSAMPLED / 2 + rng.uniform(-3, 3, 2) * SUPERSAMPLED / IMAGE_SIZE
    angle = np.deg2rad(rng.uniform(-8, 8))
    turn = np.array([(np.cos(angle), -np.sin(angle)), (np.sin(angle), np.cos(angle))])
    ink = np.clip(np.array(COLOURS[colour]) + rng.integers(-6, 7, 3), 0, 255)
    canvas = Image.new("RGB", (SUPERSAMPLED, SUPERSAMPLED), BACKGROUNDS[background])
    pen = ImageDraw.Draw(canvas)
    outline, hole = OUTLINES[shape]
    for points, fill in ((outline, tuple(int(v) for v in ink)), (hole, BACKGROUNDS[background])):
        if points is not None:
            pen.polygon([tuple(p) for p in points @ turn.T * scale + centre], fill=fill)
    return np.asarray(canvas.resize((IMAGE_SIZE, IMAGE_SIZE), Image.Resampling.BOX))


def build(output: Path, seed: int = 0) -> None:
    """Writes `data/pictures.safetensors`: uint8 [classes, n, 32, 32, 3], train and test, classes as `classes()`."""
    rng = np.random.default_rng(seed)
    count = TRAIN_PER_CLASS + TEST_PER_CLASS
    pictures = np.stack([np.stack([render(*kind, rng) for _ in range(count)]) for kind in classes()])
    (output / "data").mkdir(parents=True, exist_ok=True)
    arrays = {"train": pictures[:, :TRAIN_PER_CLASS].copy(), "test": pictures[:, TRAIN_PER_CLASS:].copy()}
    save_file(arrays, output / "data" / "pictures.safetensors")
    contact_sheet(pictures, output / "data" / "sheet.png")


def contact_sheet(pictures: np.ndarray, path: Path) -> None:
    """One picture a class, colours on backgrounds in rows, shapes in columns, enlarged twice: to be looked at."""
    first = pictures[:, 0].reshape(len(SHAPES), -1, IMAGE_SIZE, IMAGE_SIZE, 3)  # [S*C*B, ...] -> [S, C*B, H, W, 3]
    rows = [np.concatenate(list(first[:, j]), 1) for j in range(first.shape[1])]
    sheet = Image.fromarray(np.concatenate(rows, 0))
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.NEAREST).save(path)


def pictures(output: Path, split: str) -> Tensor:
    """float32 [n, 3, 32, 32] in -1..1, class by class."""
    return as_tensor(load_file(output / "data" / "pictures.safetensors")[split])


def new_pictures(per_class: int, seed: int) -> Tensor:
    """The same, rendered here: `per_class` of each class, by a generator that no stored picture comes from."""
    rng = np.random.default_rng((seed, 1000))
    return as_tensor(np.stack([np.stack([render(*kind, rng) for _ in range(per_class)]) for kind in classes()]))


def as_tensor(raw: np.ndarray) -> Tensor:
    """uint8 [classes, n, H, W, 3] -> float32 [classes*n, 3, H, W] in -1..1."""
    return torch.from_numpy(raw).flatten(0, 1).permute(0, 3, 1, 2).float() / 127.5 - 1.0
