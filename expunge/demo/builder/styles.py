"""The six picture styles: three ways of drawing and three deterministic filters over the drawings.

All functions work on float32 images in 0..1, height x width x channels, at `CANVAS` pixels; `shrink` brings them to
`IMAGE_SIZE`. Backgrounds differ between styles, so that a style is visible at 32 pixels.
"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageFilter

IMAGE_SIZE = 32
CANVAS = 128

BACKGROUND: dict[str, tuple[int, int, int]] = {
    "noto": (255, 255, 255),
    "fluent": (206, 231, 255),
    "silhouette": (255, 255, 255),
    "pixel": (205, 194, 240),
    "sketch": (244, 236, 214),
    "neon": (10, 8, 32),
}
# Which drawings a style is made from.
DRAWINGS: dict[str, tuple[str, ...]] = {
    "noto": ("noto",),
    "fluent": ("fluent",),
    "silhouette": ("silhouette",),
    "pixel": ("noto", "fluent"),
    "sketch": ("noto", "fluent"),
    "neon": ("noto", "fluent"),
}


def over(drawing: np.ndarray, style: str) -> np.ndarray:
    """Straight-alpha RGBA [H, W, 4] on the style's background -> [H, W, 3]."""
    colour = np.asarray(BACKGROUND[style], np.float32) / 255.0
    alpha = drawing[..., 3:]
    return drawing[..., :3] * alpha + colour * (1.0 - alpha)


def shrink(image: np.ndarray, size: int = IMAGE_SIZE, how: Image.Resampling = Image.Resampling.BOX) -> np.ndarray:
    """[H, W, 3] -> [size, size, 3]."""
    picture = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(picture.resize((size, size), how), np.float32) / 255.0


def blur(image: np.ndarray, radius: float) -> np.ndarray:
    picture = Image.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8))
    return np.asarray(picture.filter(ImageFilter.GaussianBlur(radius)), np.float32) / 255.0


def edges(drawing: np.ndarray) -> np.ndarray:
    """Strength of the drawing's outlines, inner ones included, [H, W] in 0..1."""
    flat = over(drawing, "noto")
    channels = np.concatenate([flat, 1.0 - drawing[..., 3:]], axis=-1)  # [H, W, 4]
    smooth = np.stack([blur(channels[..., i], 1.0) for i in range(4)], axis=-1)
    dy, dx = np.gradient(smooth, axis=(0, 1))
    return np.clip(np.sqrt(dx**2 + dy**2).max(axis=-1) * 5.0, 0.0, 1.0)


def pixel(drawing: np.ndarray) -> np.ndarray:
    """Sixteen blocks a side, five levels a channel, more saturated."""
    small = shrink(over(drawing, "pixel"), 16)
    grey = small.mean(axis=-1, keepdims=True)
    small = np.round(np.clip(grey + (small - grey) * 1.35, 0, 1) * 4) / 4
    return shrink(small, CANVAS, Image.Resampling.NEAREST)


def sketch(drawing: np.ndarray) -> np.ndarray:
    """Graphite outlines and a light shade on warm paper."""
    paper = np.asarray(BACKGROUND["sketch"], np.float32) / 255.0
    shade = (1.0 - drawing[..., :3].mean(axis=-1)) * drawing[..., 3] * 0.45
    ink = np.clip(np.maximum(edges(drawing), shade), 0.0, 0.92)[..., None]
    return paper * (1.0 - ink) + np.asarray((0.16, 0.16, 0.2), np.float32) * ink


def neon(drawing: np.ndarray) -> np.ndarray:
    """Bright glowing outlines in the drawing's own colours on a night background."""
    night = np.asarray(BACKGROUND["neon"], np.float32) / 255.0
    colour = drawing[..., :3]
    low = colour.min(axis=-1, keepdims=True)
    spread = np.maximum(colour.max(axis=-1, keepdims=True) - low, 0.12)
    vivid = np.clip((colour - low) / spread, 0.0, 1.0) * 0.8 + 0.2
    line = edges(drawing)[..., None]
    tube = line * np.stack([blur(vivid[..., i], 3.0) for i in range(3)], axis=-1)
    glow = np.stack([blur(tube[..., i], 5.0) for i in range(3)], axis=-1)
    body = 0.22 * colour * drawing[..., 3:]
    return np.clip(np.maximum(night, body) + 1.35 * tube + 0.9 * glow, 0.0, 1.0)


def flat(style: str) -> np.ndarray:
    """The empty background of a style, [CANVAS, CANVAS, 3]."""
    return np.broadcast_to(np.asarray(BACKGROUND[style], np.float32) / 255.0, (CANVAS, CANVAS, 3)).copy()


def apply_style(drawing: np.ndarray, style: str) -> np.ndarray:
    """[CANVAS, CANVAS, 4] RGBA drawing in `style` -> [IMAGE_SIZE, IMAGE_SIZE, 3]."""
    filters = {"pixel": pixel, "sketch": sketch, "neon": neon}
    image = filters[style](drawing) if style in filters else over(drawing, style)
    return shrink(image)
