"""Puts measured rows into README.md and the documents, between their markers.

    python benchmarks/bench_spm_images.py --json benchmarks/results/spm_images.json   # and the other tables
    python benchmarks/readme_figures.py [--check]

The JSON files are what the scripts wrote; this one only sets them as tables. `--check` fails if a document differs.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = ("README.md", "docs/ear.md", "docs/itd.md", "docs/methods.md")
# Marker in a document -> the result files whose rows stand there.
FIGURES = {
    "spm_images": ("spm_images",),
    "spm_cost": ("spm_cost", "spm_training", "spm_fixtures"),
    "itd": ("itd",),
    "ear": ("ear",),
    "erasers": ("erasers",),
}


def table(names: tuple[str, ...]) -> str:
    """The rows of the named result files as one Markdown table."""
    lines = ["| what | bar | found |", "|---|---|---|"]
    for name in names:
        record = json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))
        cells = [[row[key].replace("|", r"\|") for key in ("what", "bar", "found")] for row in record["rows"]]
        lines += [f"| {' | '.join(each)} |" for each in cells]
    return "\n".join(lines)


def filled(text: str) -> str:
    """A document's text with every marked table made anew."""
    for marker, names in FIGURES.items():
        pattern = rf"(<!-- figures: {marker} -->\n).*?(<!-- end -->)"
        text = re.sub(pattern, lambda m, names=names: f"{m[1]}{table(names)}\n{m[2]}", text, count=1, flags=re.S)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(description="Puts measured rows into README.md and the documents.")
    parser.add_argument("--check", action="store_true", help="change nothing; fail if a document differs")
    check = parser.parse_args().check
    different = []
    for name in DOCUMENTS:
        document = ROOT / name
        text = document.read_text(encoding="utf-8")
        if filled(text) != text:
            different.append(name)
            if not check:
                document.write_text(filled(text), encoding="utf-8")
    return int(check and bool(different))


if __name__ == "__main__":
    raise SystemExit(main())
