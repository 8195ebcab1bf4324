"""Labelled grids of small pictures, as PNG files and as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, GAP, LABEL, HEAD = 96, 6, 150, 26  # pixels: a picture's side, between pictures, row label, column label
PAPER, INK, MUTED = (255, 255, 255), (24, 24, 27), (113, 113, 122)


@dataclass(frozen=True)
class GridRow:
    """One row of a grid: its label, a second line below it, and its pictures."""

    label: str
    note: str
    pictures: Sequence[Image.Image]


def to_images(pictures: Tensor) -> list[Image.Image]:
    """float32 [B, 3, H, W] in 0..1 -> RGB pictures."""
    arrays = (pictures.clamp(0, 1) * 255).round().byte().permute(0, 2, 3, 1)  # [B, 3, H, W] -> [B, H, W, 3]
    return [Image.fromarray(array.numpy()) for array in arrays]


def data_uri(picture: Image.Image) -> str:
    """The picture as a `data:` URI, for a page that stands alone."""
    buffer = io.BytesIO()
    picture.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def grid(columns: Sequence[str], rows: Sequence[GridRow]) -> Image.Image:
    """A sheet of rows of pictures with labels at the top and on the left."""
    width = LABEL + max(len(row.pictures) for row in rows) * (CELL + GAP)
    sheet = Image.new("RGB", (width, HEAD + len(rows) * (CELL + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    for index, text in enumerate(columns):
        x = LABEL + index * (CELL + GAP) + CELL // 2
        draw.text((x, HEAD // 2), clip(text, small, CELL), fill=MUTED, font=small, anchor="mm")
    for index, row in enumerate(rows):
        top = HEAD + index * (CELL + GAP)
        draw.text((8, top + CELL // 2 - 9), clip(row.label, font, LABEL - 12), fill=INK, font=font, anchor="lm")
        draw.text((8, top + CELL // 2 + 10), clip(row.note, small, LABEL - 12), fill=MUTED, font=small, anchor="lm")
        for place, picture in enumerate(row.pictures):
            # Nearest: the model draws 32 pixels, and smoothing would show what it did not draw.
            large = picture.resize((CELL, CELL), Image.Resampling.NEAREST)
            sheet.paste(large, (LABEL + place * (CELL + GAP), top))
    return sheet


def clip(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` cut so that it fits `width` pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
