"""Counts what cases move, in Triton's interpreter on CPU tensors, with the tiles of a GPU.

Run as a process of its own, since a process interprets or compiles: `count_cases` starts it. The guard counts exactly
which bytes are read and written, and refuses stray accesses and races at these sizes as well.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from report.case import CASE_FILES, load_cases


@dataclass(frozen=True)
class Counted:
    """Bytes of one case, reads and writes together: asked for by all programs, and at different addresses a launch."""

    op: str
    name: str
    asked: int
    unique: int
    flops: int
    launches: int


def count_cases(files: Sequence[Path] = CASE_FILES, op: str | None = None) -> dict[tuple[str, str], Counted]:
    """What the cases marked `counted` move, by (op, name); in a process that interprets."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "counts.json")
        command = [sys.executable, "-m", "report.count", str(out), "--cases", *(str(path.resolve()) for path in files)]
        environment = os.environ | {"TRITON_INTERPRET": "1"}
        place = Path(__file__).resolve().parents[1]
        subprocess.run([*command, *(["--op", op] if op else [])], cwd=place, env=environment, check=True)
        rows = [Counted(**row) for row in json.loads(out.read_text(encoding="utf-8"))]
    return {(row.op, row.name): row for row in rows}


def main() -> int:
    parser = argparse.ArgumentParser(description="Counts what cases move, under TRITON_INTERPRET=1.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--cases", nargs="+", type=Path, default=CASE_FILES)
    parser.add_argument("--op")
    given = parser.parse_args()
    import expunge.kernels.gpu.common as common
    from expunge.kernels.testing.guard import guard

    common.INTERPRETED = False  # type: ignore[misc]  # before the ops are imported: the tiles that a GPU gets
    rows = []
    for case in load_cases(given.cases, given.op):
        if case.counted:
            torch.manual_seed(0)
            with guard() as counts, torch.no_grad():
                case.launch(torch.device("cpu"))
            row = Counted(case.op, case.name, counts.asked, counts.unique, counts.flops, len(counts.launches))
            rows.append(asdict(row))
    given.out.write_text(json.dumps(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
