"""Puts measured rows into README.md, between its markers.

    python benchmarks/bench_spm_images.py --json benchmarks/results/spm_images.json   # and the other tables
    python benchmarks/readme_figures.py [--check]

The JSON files are what the scripts wrote; this one only sets them as tables. `--check` fails if README.md differs.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
# Marker in README.md -> the result files whose rows stand there.
FIGURES = {"spm_images": ("spm_images",), "spm_cost": ("spm_cost", "spm_training", "spm_fixtures")}


def table(names: tuple[str, ...]) -> str:
    """The rows of the named result files as one Markdown table."""
    lines = ["| what | bar | found |", "|---|---|---|"]
    for name in names:
        record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        lines += [f"| {row['what']} | {row['bar']} | {row['found']} |" for row in record["rows"]]
    return "\n".join(lines)


def filled(text: str) -> str:
    """README.md's text with every marked table made anew."""
    for marker, names in FIGURES.items():
        pattern = rf"(<!-- figures: {marker} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, names=names: f"{m[1]}{table(names)}\n{m[2]}", text, count=1, flags=re.S)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Puts measured rows into README.md.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if README.md differs")
    check = parser.parse_args().check
    readme = ROOT / "README.md"
    text = readme.read_text(encoding="utf-8")
    if not check:
        readme.write_text(filled(text), encoding="utf-8")
    return int(check and filled(text) != text)


if __name__ == "__main__":
    raise SystemExit(main())
