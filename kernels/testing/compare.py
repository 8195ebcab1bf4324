"""Comparison with a float64 reference by relative root-mean-square error, with one stated tolerance a dtype."""

from __future__ import annotations

import torch
from torch import Tensor

# About three roundings of each dtype: sums are accumulated in float32, inputs and results are rounded.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.2e-2}


def relative_error(got: Tensor, reference: Tensor) -> float:
    """rms(got - reference) / rms(reference), in float64; 0 when both are all zero, and infinite where NaNs differ."""
    got, reference = got.detach().double(), reference.detach().double()
    if got.numel() == 0:
        return 0.0
    difference = (got - reference).square().mean().sqrt()
    if not torch.isfinite(difference):
        return float("inf")
    size = reference.square().mean().sqrt()
    return float(difference / size) if size > 0 else float(difference)


def assert_close(name: str, got: Tensor, reference: Tensor, tolerance: float | None = None) -> None:
    """Fails if `got` has another shape than the float64 `reference` or differs by more than its dtype's tolerance.

    Args:
        name: what is compared, for the message.
        got: the result, in the dtype that it was computed for.
        reference: the same from a reference in float64, of inputs that were rounded to the dtype beforehand.
        tolerance: relative RMS error allowed; None: `TOLERANCES` of the result's dtype.

    Raises:
        AssertionError: with name, error and tolerance.
    """
    if got.shape != reference.shape:
        raise AssertionError(f"{name}: shape {list(got.shape)}, the reference has {list(reference.shape)}")
    allowed = TOLERANCES[got.dtype] if tolerance is None else tolerance
    error = relative_error(got, reference)
    if not error <= allowed:
        raise AssertionError(f"{name}: relative RMS error {error:.2e}, allowed {allowed:.2e} ({got.dtype})")
