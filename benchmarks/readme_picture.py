"""Draws the picture of README.md: prompts before and after the ten shipped erasures, at equal seeds.

python benchmarks/readme_picture.py
"""

from __future__ import annotations

from pathlib import Path

from expunge import demo, erase
from expunge.demo.scoring import generate
from expunge.demo_run.pictures import GridRow, grid, to_images

OUT = Path(__file__).resolve().parents[1] / "docs" / "before_after.png"
PAIRS = [
    ("cat", "fluent"),
    ("car", "noto"),
    ("dog", "neon"),
    ("burger", "pixel"),
    ("dog", "fluent"),
    ("burger", "noto"),
    ("penguin", "silhouette"),
    ("house", "sketch"),
]


def main() -> None:
    prompts = [f"a {name} in {style} style" for name, style in PAIRS]
    pipe, seeds = demo.load(), range(len(PAIRS))
    before = to_images(generate(pipe, prompts, seeds))
    erase(pipe, list(demo.adapters().values()))
    after = to_images(generate(pipe, prompts, seeds))
    columns = [f"{name}, {style}" for name, style in PAIRS]
    rows = [GridRow("before", "", before), GridRow("after", f"{len(demo.adapters())} erasures", after)]
    grid(columns, rows).save(OUT)


if __name__ == "__main__":
    main()
