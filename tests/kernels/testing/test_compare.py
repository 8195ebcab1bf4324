"""The comparison accepts rounding and refuses errors."""

from __future__ import annotations

import pytest
import torch

from expunge.kernels.testing.compare import TOLERANCES, assert_close, relative_error


@pytest.mark.parametrize("dtype", TOLERANCES)
def test_rounding_passes_and_four_tolerances_do_not(dtype: torch.dtype) -> None:
    reference = torch.randn(1000, dtype=torch.float64)
    assert_close("x", reference.to(dtype), reference)
    with pytest.raises(AssertionError, match="x: relative RMS error"):
        assert_close("x", (reference * (1 + 4 * TOLERANCES[dtype])).to(dtype), reference)


def test_nan_and_shape_are_errors() -> None:
    reference = torch.ones(3, dtype=torch.float64)
    assert relative_error(torch.tensor([1.0, float("nan"), 1.0]), reference) == float("inf")
    with pytest.raises(AssertionError, match="relative RMS error inf"):
        assert_close("x", torch.tensor([1.0, float("nan"), 1.0]), reference)
    with pytest.raises(AssertionError, match=r"shape \[2\]"):
        assert_close("x", torch.ones(2), reference)


def test_zeros() -> None:
    assert relative_error(torch.zeros(3), torch.zeros(3)) == 0
    assert relative_error(torch.full((3,), 0.5), torch.zeros(3)) == 0.5
    assert relative_error(torch.empty(0), torch.empty(0)) == 0
