"""Thresholded loss masking: which groups of a loss are kept.

Formula: rows r with losses l_r lie in groups g, which are windows of consecutive rows, or single rows (tokens):

    S_g = Σ_{r in g} l_r        m_g = 1 if S_g > threshold else 0 (strictly greater)
    L = Σ_g m_g S_g / max(1, Σ_g m_g)  for reduction "kept",     L = Σ_g m_g S_g  for "sum"

The mask is a constant for autograd: dL/dl_r = m_g(r) / max(1, Σ_g m_g). EAR (arXiv 2506.20151) gates windows of 12 to
100 decoding steps; tokens and elements (`masked_mse`) are the same rule for smaller groups.

Shapes:
    losses     [R] float32 (float64 for float64 inputs), rows in order; the last window may be shorter
    counts     [R] or None: a row with 0 is no part of its group; a group of such rows is neither kept nor counted
    threshold  [] or [G], one for all groups or one for each
    sums, kept [G], G = ceil(R / window)

Numbers that are not finite: a sum that is NaN is kept, so that the loss is NaN, and not silently masked because NaN is
greater than nothing; a threshold that is NaN makes the loss and its gradients NaN; a group that is gated off adds
exactly 0, whatever it holds. `inf` gates everything off, `-inf` nothing.

The torch code below is the CPU path and the oracle of the tests.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.errors import InvalidInputError

Granularity = Literal["window", "token", "element"]
Reduction = Literal["kept", "sum"]


class GatedLoss(NamedTuple):
    """A gated loss and what was kept of it.

    loss: `[]`, differentiable.
    group_losses: `[G]`, the loss of each group before the gate; for elements `[R]`, the sum of each row's kept ones.
    kept: `[G]` int32, 1 for a group that is kept and 0 for one that is not; for elements `[R]`, how many of the row's.
    """

    loss: Tensor
    group_losses: Tensor
    kept: Tensor


def loss_gate_reference(
    losses: Tensor, threshold: Tensor, window: int, mean: bool, counts: Tensor | None = None
) -> GatedLoss:
    """The formula; differentiable with respect to the losses."""
    sums = group_sums(losses, window)
    kept = open_groups(sums.detach(), threshold, None if counts is None else group_sums(counts, window))
    norm = normaliser(kept.sum(), threshold, mean)
    return GatedLoss(torch.where(kept, sums, 0).sum() / norm, sums.detach(), kept.int())


def group_sums(values: Tensor, window: int) -> Tensor:
    """Sums over windows of consecutive rows: [R] -> [G]."""
    window = min(window, max(values.shape[0], 1))
    if window == 1:
        return values
    groups = -(-values.shape[0] // window)
    return F.pad(values, (0, groups * window - values.shape[0])).view(groups, window).sum(1)  # [G, window]


def open_groups(sums: Tensor, threshold: Tensor, counts: Tensor | None) -> Tensor:
    """The mask [G]; written so that NaN is kept."""
    kept = ~(sums <= threshold)
    return kept if counts is None else kept & (counts > 0)


def normaliser(kept: Tensor, threshold: Tensor, mean: bool) -> Tensor:
    """max(1, kept) or 1, as a float; NaN if a threshold is, so that neither loss nor gradients pass for numbers."""
    norm = kept.to(threshold.dtype).clamp_min(1) if mean else torch.ones_like(kept, dtype=threshold.dtype)
    return torch.where(threshold.isnan().any(), math.nan, norm)


def spread(groups: Tensor, window: int, rows: int) -> Tensor:
    """The value of each row's group: [G] -> [R]."""
    return groups if window == 1 else groups[:, None].expand(-1, window).reshape(-1)[:rows]


def scale_rows(rows: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """rows [R, D] times factor [R] in the factor's dtype; a factor of 0 gives 0 whatever the row holds."""
    return torch.where(factor[:, None] == 0, 0, rows * factor[:, None]).to(dtype)


def scale_rows_eagerly(rows: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """The same with one pass over the rows instead of two; reads back which are to be 0."""
    scaled = (rows * factor[:, None]).to(dtype)
    return scaled.index_fill_(0, (factor == 0).nonzero()[:, 0], 0)


def loss_gate(
    losses: Tensor,
    threshold: float | Tensor,
    *,
    granularity: Granularity = "token",
    window: int | None = None,
    reduction: Reduction = "kept",
) -> GatedLoss:
    """Gates losses that were computed elsewhere.

    Args:
        losses: `[*]`, one floating-point loss for each row; windows are taken of the rows in order.
        threshold: a number, or a tensor `[]` or `[G]`; a group is kept if its sum is strictly greater. Compared in
            float32 (float64 for float64 losses). Within `torch.compile` pass a tensor: its value may change without
            recompiling.
        granularity: "window" or "token"; a single loss has no elements.
        window: rows of a window, at least 1, for granularity "window" only.
        reduction: "kept" divides by the number of groups that were kept, "sum" by nothing.

    Returns:
        `GatedLoss`; its loss is differentiable with respect to `losses`, with the mask as a constant.

    Raises:
        InvalidInputError: if an argument is outside of what is named here.
    """
    check_floating("loss_gate", losses=losses)
    size = check_gate("loss_gate", granularity, window, reduction, ("window", "token"))
    values = losses.flatten().to(sum_dtype(losses))
    limit = as_threshold("loss_gate", threshold, -(-values.shape[0] // size), values)
    return loss_gate_reference(values, limit, size, reduction == "kept")


def sum_dtype(tensor: Tensor) -> torch.dtype:
    """What losses of such a tensor are summed and compared in."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def check_floating(op: str, **tensors: Tensor) -> None:
    """Refuses integer and complex tensors."""
    for name, tensor in tensors.items():
        if not tensor.is_floating_point():
            raise InvalidInputError(
                f"{op}: {name}", expected="a floating-point tensor", found=str(tensor.dtype), fix="Convert it first."
            )


def check_gate(
    op: str, granularity: str, window: int | None, reduction: str, allowed: tuple[str, ...] = get_args(Granularity)
) -> int:
    """Checks the gate's words and returns the number of rows of a group."""
    if granularity not in allowed:
        raise InvalidInputError(
            f"{op}: granularity", expected=f"one of {', '.join(allowed)}", found=repr(granularity), fix="Choose one."
        )
    if reduction not in get_args(Reduction):
        raise InvalidInputError(
            f"{op}: reduction", expected="kept or sum", found=repr(reduction), fix="Choose one of the two."
        )
    if granularity != "window":
        if window is not None:
            raise InvalidInputError(
                f"{op}: window",
                expected=f"none for granularity {granularity}",
                found=repr(window),
                fix='Pass granularity="window", or leave the window out.',
            )
        return 1
    if not isinstance(window, int) or isinstance(window, bool) or window < 1:
        raise InvalidInputError(
            f"{op}: window",
            expected="a whole number of rows, at least 1",
            found=repr(window),
            fix="Pass how many consecutive rows are gated together.",
        )
    return window


def as_threshold(op: str, threshold: float | Tensor, groups: int, like: Tensor) -> Tensor:
    """The threshold as a constant tensor [] or [groups], in the dtype and on the device of the sums."""
    if isinstance(threshold, Tensor):
        if threshold.shape not in ((), (groups,)) or not threshold.is_floating_point():
            raise InvalidInputError(
                f"{op}: threshold",
                expected=f"a number, or a floating-point tensor [] or [{groups}], one for each group",
                found=f"{list(threshold.shape)} {threshold.dtype}",
                fix="Pass one threshold for all groups or one for each.",
            )
        return threshold.detach().to(device=like.device, dtype=like.dtype)
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or math.isnan(threshold):
        raise InvalidInputError(
            f"{op}: threshold",
            expected="a number that is not NaN, or a tensor",
            found=repr(threshold),
            fix="Pass the largest loss that is to be left alone; -inf keeps everything.",
        )
    return torch.full((), threshold, dtype=like.dtype, device=like.device)
