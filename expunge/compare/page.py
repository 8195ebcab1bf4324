"""The comparison's files: `results.json`, `grid.png`, and one page with both in it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

import expunge
from expunge.compare.result import Comparison, Strips
from expunge.compare.trials import told
from expunge.demo_run.pictures import GridRow, data_uri, grid, stacked, to_images

TEMPLATE = "page.html.j2"


def write(comparison: Comparison, strips: Mapping[str, Strips]) -> None:
    """Writes all three into the comparison's folder.

    Args:
        comparison: what was found.
        strips: what to show, by concept.
    """
    folder = comparison.folder
    text = json.dumps(comparison.to_dict(), indent=2, ensure_ascii=False, allow_nan=False)
    (folder / "results.json").write_text(text + "\n", encoding="utf-8")
    sheets = {concept: sheet_of(concept, strip) for concept, strip in strips.items()}
    stacked(list(sheets.values())).save(folder / "grid.png")
    (folder / "index.html").write_text(render(comparison, sheets), encoding="utf-8")


def sheet_of(concept: str, strips: Strips) -> Image.Image:
    """A row of pictures of the base model and of each method; a column starts from one noise."""
    rows = [
        GridRow(name, "nothing erased" if name == "base" else f"{concept} erased", to_images(_floats(pictures)))
        for name, pictures in strips.rows.items()
    ]
    return grid(strips.columns, rows, strips.split)


def _floats(pictures: Sequence[Any]) -> torch.Tensor:
    """uint8 arrays `[3, H, W]` -> float32 `[B, 3, H, W]` in 0..1."""
    return torch.stack([torch.from_numpy(array) for array in pictures]).float() / 255


def render(comparison: Comparison, sheets: Mapping[str, Image.Image]) -> str:
    """The page as HTML text; texts are escaped, the grids are inlined, by concept."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["percent"] = lambda share: f"{100 * share.value:.1f}"
    return environment.get_template(TEMPLATE).render(
        comparison=comparison,
        grids={concept: data_uri(sheet) for concept, sheet in sheets.items()},
        methods={row.row: told(row.row) for row in comparison.rows},
        version=expunge.__version__,
    )
