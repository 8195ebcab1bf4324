"""Labelled grids of small pictures, as PNG files and as data URIs."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

CELL, GAP, LABEL, HEAD = 96, 6, 150, 26  # pixels: a picture's side, between pictures, row label, column label
SPLIT = 24  # pixels, between two groups of columns, or two sheets
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


def grid(columns: Sequence[str], rows: Sequence[GridRow], split: int | None = None) -> Image.Image:
    """A sheet of rows of pictures with labels at the top and on the left.

    Args:
        columns: the labels at the top.
        rows: the pictures.
        split: the column before which a gap parts two groups of pictures; None for one group.
    """
    places = [
        LABEL + index * (CELL + GAP) + (SPLIT if split is not None and index >= split else 0)
        for index in range(max(len(row.pictures) for row in rows))
    ]
    sheet = Image.new("RGB", (places[-1] + CELL + GAP, HEAD + len(rows) * (CELL + GAP)), PAPER)
    draw = ImageDraw.Draw(sheet)
    font, small = ImageFont.load_default(15), ImageFont.load_default(12)
    for x, text in zip(places, columns, strict=False):
        draw.text((x + CELL // 2, HEAD // 2), clip(text, small, CELL), fill=MUTED, font=small, anchor="mm")
    for index, row in enumerate(rows):
        top = HEAD + index * (CELL + GAP)
        draw.text((8, top + CELL // 2 - 9), clip(row.label, font, LABEL - 12), fill=INK, font=font, anchor="lm")
        draw.text((8, top + CELL // 2 + 10), clip(row.note, small, LABEL - 12), fill=MUTED, font=small, anchor="lm")
        for x, picture in zip(places, row.pictures, strict=False):
            # Nearest: the model draws 32 pixels, and smoothing would show what it did not draw.
            sheet.paste(picture.resize((CELL, CELL), Image.Resampling.NEAREST), (x, top))
    return sheet


def stacked(sheets: Sequence[Image.Image]) -> Image.Image:
    """Sheets below each other."""
    height = sum(sheet.height for sheet in sheets) + SPLIT * (len(sheets) - 1)
    whole, top = Image.new("RGB", (max(sheet.width for sheet in sheets), height), PAPER), 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height + SPLIT
    return whole


def clip(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int) -> str:
    """`text` cut so that it fits `width` pixels, with an ellipsis where something is missing."""
    if font.getlength(text) <= width:
        return text
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text + "…"
