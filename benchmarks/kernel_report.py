"""What the compilers make of the kernels, for GPUs that need not be here.

    python benchmarks/kernel_report.py [--op NAME] [--pinned] [--target sm_90 ...] [--json OUT.json]

Calls the library's launch functions with fake CUDA tensors, compiles exactly what they launch for sm_80, sm_90, sm_100
and gfx942, and prints registers, spills, shared memory, occupancy, access widths by argument and tensor-core
instructions; then for each case its launches, the least bytes, the bytes counted in Triton's interpreter over the least
where the case is small enough, and a roofline bound from data-sheet figures. Exits with 1 on a spill, a half-precision
dot without tensor cores, a block or grid that is too large, or a narrow access on a main stream. Triton caches what it
compiled (TRITON_CACHE_DIR). `report/__init__.py` says how to add an op.
"""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
if os.environ.get("TRITON_INTERPRET", "0") not in ("", "0"):
    raise SystemExit("TRITON_INTERPRET is set: interpreted kernels cannot be compiled. Unset it for this script.")

import torch
import triton
from report.case import CASE_FILES, load_cases
from report.count import Counted, count_cases
from report.drive import TARGETS
from report.measure import Driven, Record, all_problems, measure
from report.table import print_cases, print_kernels


def as_json(
    records: list[Record], driven: list[Driven], counts: dict[tuple[str, str], Counted], problems: list[str]
) -> str:
    """The report as data."""
    kernels = [{**asdict(record), "streams": sorted(record.streams)} for record in records]
    cases = [
        {"op": one.case.op, "name": one.case.name, "least": one.case.least, "flops": one.case.flops}
        | {"launches": one.launches}
        | {"asked": counted.asked if (counted := counts.get((one.case.op, one.case.name))) else None}
        | {"unique": counted.unique if counted else None}
        for one in driven
    ]
    versions = {"torch": torch.__version__, "triton": triton.__version__}
    return json.dumps({"versions": versions, "problems": problems, "kernels": kernels, "cases": cases}, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile report of the kernels.")
    parser.add_argument("--op", help="only this op")
    parser.add_argument("--pinned", action="store_true", help="only the representative subset that a test holds")
    parser.add_argument("--target", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--cases", nargs="+", type=Path, default=CASE_FILES, help="other case files than the shipped")
    parser.add_argument("--no-counts", action="store_true", help="count no bytes in the interpreter")
    parser.add_argument("--json", type=Path, help="also write the report here")
    arguments = parser.parse_args()
    cases = load_cases(arguments.cases, arguments.op, pinned=arguments.pinned)
    if not cases:
        raise SystemExit(f"no cases of op {arguments.op}")
    records, driven = measure(cases, arguments.target)
    problems = list(all_problems(records, driven))
    print_kernels(records)
    counts = {} if arguments.no_counts else count_cases(arguments.cases, arguments.op)
    print_cases(driven, arguments.target, counts)
    for problem in problems:
        print("PROBLEM", problem)
    if arguments.json:
        arguments.json.write_text(as_json(records, driven, counts, problems) + "\n", encoding="utf-8")
    return 1 if problems else 0


if __name__ == "__main__":
    raise SystemExit(main())
