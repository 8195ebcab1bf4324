"""Every kernel test runs under the interpreter's guard: stray accesses, races and bfloat16 arithmetic fail it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

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


@dataclass
class Sae:
    """A small sparse autoencoder and hidden states; `scores` is the oracle's p, in float64."""

    x: Tensor
    w_enc: Tensor
    b_enc: Tensor
    b_pre: Tensor
    w_dec: Tensor

    @property
    def biases(self) -> dict[str, Tensor]:
        return {"b_enc": self.b_enc, "b_pre": self.b_pre}

    @property
    def scores(self) -> Tensor:
        centered = (self.x.float() - self.b_pre.float()).to(self.w_enc.dtype)
        return centered.double() @ self.w_enc.double().mT + self.b_enc.double()


@pytest.fixture(scope="session")
def make_sae() -> Callable[..., Sae]:
    """Factory: `make_sae(tokens, features, width, dtype=torch.float32, whole=False, seed=0)`.

    whole: whole numbers, so that sums are exact in any order and ties are many.
    """

    def make(*shape: int, dtype: torch.dtype = torch.float32, whole: bool = False, seed: int = 0) -> Sae:
        tokens, features, width = shape
        generator = torch.Generator().manual_seed(seed)
        sizes = [(tokens, width), (features, width), (features,), (width,), (features, width)]
        parts = [torch.randn(*size, generator=generator) for size in sizes]
        parts = [(2 * part).round() if whole else part for part in parts]
        return Sae(*(part.to(dtype) for part in parts))

    return make


@pytest.fixture(params=["torch", "triton"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The test runs once on each path."""
    monkeypatch.setenv("EXPUNGE_KERNELS", request.param)
    return str(request.param)
