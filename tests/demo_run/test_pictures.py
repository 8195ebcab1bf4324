"""Sheets of pictures: where each one lands, and what the data URIs hold."""

from __future__ import annotations

import base64
import io

import numpy as np
import torch
from PIL import Image, ImageFont

from expunge.demo_run.pictures import CELL, GAP, HEAD, LABEL, SPLIT, GridRow, clip, data_uri, grid, stacked, to_images


def plain(colour: tuple[int, int, int]) -> Image.Image:
    return Image.new("RGB", (4, 4), colour)


def test_pictures_land_in_their_cells() -> None:
    red, blue = (200, 10, 10), (10, 10, 200)
    sheet = grid(
        ["noto", "pixel"], [GridRow("cat", "before", [plain(red), plain(blue)]), GridRow("", "", [plain(blue)])]
    )
    assert sheet.size == (LABEL + 2 * (CELL + GAP), HEAD + 2 * (CELL + GAP))
    middle = CELL // 2
    assert sheet.getpixel((LABEL + middle, HEAD + middle)) == red
    assert sheet.getpixel((LABEL + CELL + GAP + middle, HEAD + middle)) == blue
    assert sheet.getpixel((LABEL + middle, HEAD + CELL + GAP + middle)) == blue
    labels = np.asarray(sheet)[HEAD : HEAD + CELL, :LABEL]
    assert labels.min() < 100  # the label is drawn


def test_a_gap_parts_two_groups_and_sheets_stand_below_each_other() -> None:
    red, blue = (200, 10, 10), (10, 10, 200)
    sheet = grid(["a", "b"], [GridRow("cat", "", [plain(red), plain(blue)])], split=1)
    assert sheet.width == LABEL + 2 * (CELL + GAP) + SPLIT
    assert sheet.getpixel((LABEL + CELL + GAP + SPLIT, HEAD)) == blue
    both = stacked([sheet, plain(red)])
    assert both.size == (sheet.width, sheet.height + SPLIT + 4) and both.getpixel((0, sheet.height + SPLIT)) == red


def test_tensors_become_pictures() -> None:
    pictures = torch.zeros(2, 3, 4, 5)
    pictures[1, 0] = 1.7  # clamped
    first, second = to_images(pictures)
    assert first.size == (5, 4)
    assert first.getpixel((0, 0)) == (0, 0, 0)
    assert second.getpixel((4, 3)) == (255, 0, 0)


def test_a_data_uri_is_the_same_picture() -> None:
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8))
    head, _, body = data_uri(picture).partition(",")
    assert head == "data:image/png;base64"
    again = Image.open(io.BytesIO(base64.b64decode(body)))
    assert np.array_equal(np.asarray(again), np.asarray(picture))


def test_long_labels_are_cut_to_their_room() -> None:
    font = ImageFont.load_default(15)
    short = clip("hippopotamus in the bath", font, 60)
    assert short.endswith("…")
    assert font.getlength(short) <= 60
    assert clip("cat", font, 60) == "cat"
