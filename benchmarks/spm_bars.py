"""The whole table of SPM: pictures, cost, training, and the reference's outputs. Exit status 0 when every row holds.

    python benchmarks/spm_bars.py [--scale 0.1] [--pairs 30] [--results FOLDER]

Each part is a script of its own as well. At full scale it takes about an hour on one core.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path

import bench_spm_cost
import bench_spm_fixtures
import bench_spm_images
import bench_spm_training
import torch
from bars import Bar, print_table, verdict, write_json


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures to make")
    parser.add_argument("--pairs", type=int, default=30, help="paired runs a row")
    parser.add_argument("--results", type=Path, help="also write each part's rows into this folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    parts: dict[str, Callable[[], list[Bar]]] = {
        "spm_fixtures": bench_spm_fixtures.measure,
        "spm_cost": partial(bench_spm_cost.measure, arguments.pairs),
        "spm_training": partial(bench_spm_training.measure_settings, "demo", max(3, arguments.pairs // 3)),
        "spm_images": partial(bench_spm_images.measure, arguments.scale),
    }
    rows = []
    for name, measure in parts.items():
        with torch.enable_grad():  # the parts that only draw turn gradients off
            part = measure()
        if arguments.results:
            write_json(arguments.results / f"{name}.json", part)
        rows += part
    print_table("SPM", rows)
    return verdict(rows)


if __name__ == "__main__":
    raise SystemExit(main())
