"""Draws the CSVs of the microbenchmarks: for each op one picture, p50 by provider with p20 to p80 as whiskers.

python benchmarks/bench_facilitated_transport.py
python benchmarks/plot_kernels.py [bench-output/*.csv] [--format svg png] [--out FOLDER]
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
# Okabe and Ito's colours, which people of every colour vision tell apart.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    """The rows of one run."""
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    if not rows:
        raise SystemExit(f"{path} has no rows: run the benchmark again")
    return rows


def draw(rows: Rows, paths: list[Path]) -> None:
    """One group of bars for each shape, dtype and mode; one colour for each provider; a logarithmic scale."""
    groups = list(dict.fromkeys((row["shape"], row["dtype"], row["mode"]) for row in rows))
    providers = list(dict.fromkeys(row["provider"] for row in rows))
    figure, axes = plt.subplots(figsize=(9, 1.2 + 0.22 * len(groups) * (len(providers) + 1)), layout="constrained")
    height = 0.8 / len(providers)
    for place, provider in enumerate(providers):
        own = {(row["shape"], row["dtype"], row["mode"]): row for row in rows if row["provider"] == provider}
        at = [index + (place - (len(providers) - 1) / 2) * height for index, group in enumerate(groups) if group in own]
        low, middle, high = (
            [float(own[group][name]) for group in groups if group in own] for name in ("p20", "p50", "p80")
        )
        whiskers = [
            [m - a for m, a in zip(middle, low, strict=True)],
            [b - m for m, b in zip(middle, high, strict=True)],
        ]
        colour = COLOURS[place % len(COLOURS)]
        axes.barh(at, middle, height, xerr=whiskers, label=provider, color=colour, error_kw={"elinewidth": 0.8})
    axes.set_yticks(range(len(groups)), ["\n".join((shape, f"{dtype}, {mode}")) for shape, dtype, mode in groups])
    axes.invert_yaxis()
    axes.set_xscale("log")
    first = rows[0]
    axes.set_xlabel(f"milliseconds a call ({first['clock']}, {first['device']})")
    axes.set_title(f"{first['op']} at {first['commit']}", loc="left")
    axes.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0), frameon=False)
    for path in paths:
        # Without a date and with fixed ids the same CSV gives the same picture.
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None, dpi=150)
    plt.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Draws the CSVs of the microbenchmarks.")
    parser.add_argument("csv", nargs="*", type=Path, help="default: bench-output/*.csv")
    parser.add_argument("--format", nargs="+", choices=("svg", "png"), default=["svg"])
    parser.add_argument("--out", type=Path, help="folder of the pictures; default: beside each CSV")
    given = parser.parse_args(arguments)
    plt.rcParams |= {"svg.hashsalt": "expunge", "svg.fonttype": "none"}
    paths = given.csv or sorted((ROOT / "bench-output").glob("*.csv"))
    if not paths:
        raise SystemExit("no CSV in bench-output/: run benchmarks/bench_*.py first")
    for path in paths:
        folder = given.out or path.parent
        folder.mkdir(parents=True, exist_ok=True)
        pictures = [folder / f"{path.stem}.{suffix}" for suffix in given.format]
        draw(read(path), pictures)
        print(*pictures, sep="\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
