"""Every kernel test runs under the interpreter's guard: stray accesses, races and bfloat16 arithmetic fail it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@pytest.fixture(autouse=True)
def counts() -> Iterator[Any]:
    """The guard's counts of what the test's kernels moved and multiplied; None on a GPU."""
    if not INTERPRETED:
        yield None
        return
    from expunge.kernels.testing.guard import guard

    with guard() as counted:
        yield counted


@pytest.fixture
def triton_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """Public functions launch kernels, on CPU tensors by the interpreter."""
    monkeypatch.setenv("EXPUNGE_KERNELS", "triton")
