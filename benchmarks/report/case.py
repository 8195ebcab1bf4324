"""What the report compiles: named calls of the library's launch functions, gathered from the `cases_*.py` files."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import torch

CASE_FILES = tuple(sorted(Path(__file__).parent.glob("cases_*.py")))


@dataclass(frozen=True)
class Case:
    """One call as the library makes it.

    Args:
        op: the kernel file's name, `kernels/{op}.py`.
        name: model, site, sizes, dtype and direction; unique within the op.
        launch: makes its tensors on the given device and calls the launch functions.
        least: bytes that must move: every input read once, every output written once.
        flops: useful floating-point operations of its matrix products (2 a multiply-add).
        dot_bits: bits of the products' operands, which choose the roofline's peak: 16 or 32.
        streams: pointer arguments of the kernels that carry the bulk of the bytes: the test wants 128-bit accesses.
        pinned: whether the test compiles it.
        counted: whether it is small enough for the interpreter to count its bytes.
    """

    op: str
    name: str
    launch: Callable[[torch.device], object]
    least: int
    flops: int = 0
    dot_bits: int = 16
    streams: tuple[str, ...] = ()
    pinned: bool = False
    counted: bool = False


def load_cases(files: Sequence[Path] = CASE_FILES, op: str | None = None, *, pinned: bool = False) -> list[Case]:
    """All cases of the files, or those of one op, or the pinned ones; a name that stands twice is refused."""
    cases: list[Case] = []
    for path in files:
        spec = spec_from_file_location(f"report.{path.stem}", path)
        assert spec is not None and spec.loader is not None
        module = module_from_spec(spec)
        spec.loader.exec_module(module)
        cases += module.CASES
    names = [(case.op, case.name) for case in cases]
    twice = {name for name in names if names.count(name) > 1}
    if twice:
        raise SystemExit(f"cases named twice: {sorted(twice)}")
    return [case for case in cases if op in (None, case.op) and (case.pinned or not pinned)]
