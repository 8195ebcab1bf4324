"""Mean squared error to a composed target, masked where it is small.

Formula (EAR, arXiv 2506.20151, for windows; tokens and elements are the same rule for smaller groups): with the hidden
states s of the model that is trained and t, p, n of the frozen one,

    d_r = s_r - (t_r - eta (p_r - n_r))        l_r = mean_j d_rj²        L = gate(l), see `loss_gate`
    dL/ds_rj = m_g(r) (2 / D) d_rj / norm

For granularity "element" every d_rj² is a group of its own: L = Σ m_rj d_rj² / norm, and dL/ds = m (2 / norm) d.

Shapes:
    s, t, p, n  [*, D], any floating dtypes and strides; rows are counted in order over the leading dimensions
    loss        [] float32 (float64 for a float64 s)

Bytes: the gradient does not depend on the gate but for a factor a row, so that one kernel reads s, t, p and n once and
writes the residual d in place of the gradient; a small kernel sums and gates the rows' losses, and backward scales the
residual's rows. The residual and not the gradient is what is stored, since (2 / D) d may be too small for float16.

The torch reference below is the oracle of the tests, and what Inductor compiles on a CPU. In eager mode a CPU takes the
same way as the kernel, some rows at a time, so that what is in between stays in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expunge.errors import InvalidInputError
from expunge.kernels.dispatch import kernel_path
from expunge.kernels.loss_gate import (
    GatedLoss,
    Granularity,
    Reduction,
    as_threshold,
    check_floating,
    check_gate,
    loss_gate_reference,
    normaliser,
    scale_rows_eagerly,
    spread,
    sum_dtype,
)

BLOCK = 1 << 16  # elements of a block of rows: its four states and what is made of them stay in a core's cache


def masked_mse_reference(
    student: Tensor,
    target: Tensor,
    positive: Tensor | None,
    neutral: Tensor | None,
    eta: float,
    threshold: Tensor,
    window: int,
    *,
    mean: bool,
    element: bool,
) -> GatedLoss:
    """The formula; `threshold` has the dtype that everything is computed in."""
    composed = compose(target, positive, neutral, eta, threshold.dtype)
    squares = (student.to(threshold.dtype) - composed).square().flatten(0, -2)  # [*, D] -> [R, D]
    if not element:
        return loss_gate_reference(squares.mean(1), threshold, window, mean)
    kept = ~(squares.detach() <= threshold)
    losses = torch.where(kept, squares, 0).sum(1)
    norm = normaliser(kept.sum(), threshold, mean)
    return GatedLoss(losses.sum() / norm, losses.detach(), kept.sum(1, dtype=torch.int32))


class MaskedMseBlocks(torch.autograd.Function):
    """The formula on student, target and, if they are there, positive and neutral [R, D], a block of rows at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Sequence[Tensor],
        eta: float,
        threshold: Tensor,
        window: int,
        mean: bool,
        element: bool,
        student: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`states` are constants; `student` is the first of them once more, for its gradient."""
        (rows, width), dtype = student.shape, threshold.dtype
        residual, losses = torch.empty_like(student), threshold.new_empty(rows)
        counts = torch.zeros(rows, dtype=torch.int32, device=student.device)
        step = max(1, BLOCK // width)
        for start in range(0, rows, step):
            block = slice(start, start + step)
            s, t, *moved = (one[block].to(dtype) for one in states)
            d = s - (torch.add(t, moved[0] - moved[1], alpha=-eta) if moved else t)
            squares = d * d
            if element:
                gated = squares <= threshold
                d, squares = d.masked_fill_(gated, 0), squares.masked_fill_(gated, 0)
                counts[block] = width - gated.sum(1, dtype=torch.int32)
            losses[block] = squares.sum(1)
            residual[block] = d
        if element:
            norm = normaliser(counts.sum(), threshold, mean)
            gated_loss = GatedLoss(losses.sum() / norm, losses, counts)
            factor = (2 / norm).expand(rows)
        else:
            gated_loss = loss_gate_reference(losses.div_(width), threshold, window, mean)
            scale = 2 / width / normaliser(gated_loss.kept.sum(), threshold, mean)
            factor = spread(gated_loss.kept * scale, window, rows)
        ctx.save_for_backward(residual, factor)
        ctx.mark_non_differentiable(gated_loss.group_losses, gated_loss.kept)
        return gated_loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        residual, factor = ctx.saved_tensors
        return *(None,) * 6, scale_rows_eagerly(residual, factor * upstream, residual.dtype)


def masked_mse_blocks(
    student: Tensor,
    target: Tensor,
    positive: Tensor | None,
    neutral: Tensor | None,
    eta: float,
    threshold: Tensor,
    window: int,
    *,
    mean: bool,
    element: bool,
) -> GatedLoss:
    """The formula for eager code without a kernel."""
    given = [one.flatten(0, -2) for one in (student, target, positive, neutral) if one is not None]  # [*, D] -> [R, D]
    return GatedLoss(
        *MaskedMseBlocks.apply([one.detach() for one in given], eta, threshold, window, mean, element, given[0])
    )


def compose(target: Tensor, positive: Tensor | None, neutral: Tensor | None, eta: float, dtype: torch.dtype) -> Tensor:
    """t - eta (p - n) as a constant in `dtype`; exactly t where p equals n."""
    composed = target.detach().to(dtype)
    if positive is None or neutral is None:
        return composed
    return composed - eta * (positive.detach().to(dtype) - neutral.detach().to(dtype))


def masked_mse(
    student: Tensor,
    target: Tensor,
    positive: Tensor | None = None,
    neutral: Tensor | None = None,
    *,
    eta: float = 1.0,
    threshold: float | Tensor = -math.inf,
    granularity: Granularity = "token",
    window: int | None = None,
    reduction: Reduction = "kept",
) -> GatedLoss:
    """Mean squared error between hidden states and `target - eta (positive - neutral)`, gated.

    Args:
        student: `[*, D]`, the hidden states that are trained, with at least one leading dimension.
        target: `[*, D]`, of student's shape and device; no gradient flows to it, nor to the next two.
        positive: `[*, D]`, hidden states of the prompts with the concept; None, with `neutral`, for the plain target.
        neutral: `[*, D]`, hidden states of the prompts without it.
        eta: how far the target is moved away from the concept.
        threshold: a group is kept if its loss is strictly greater; a number, or a tensor `[]` or, but for elements, one
            for each group. Within `torch.compile` pass a tensor: its value may change without recompiling.
        granularity: "window" (the sum of the mean squares of its rows), "token" (the mean square of a row) or "element"
            (each square).
        window: rows of a window, counted over the leading dimensions in order: pass `[tokens, batch, D]` to gate all
            rows of some tokens together.
        reduction: "kept" divides by the number of groups that were kept, "sum" by nothing.

    Returns:
        `GatedLoss`; its loss is differentiable with respect to `student`.

    Raises:
        InvalidInputError: if shapes, dtypes or words do not fit.
    """
    teachers = check_states("masked_mse", student, target, positive, neutral)
    size = check_gate("masked_mse", granularity, window, reduction)
    if not student.shape[-1]:
        raise InvalidInputError(
            "masked_mse: student", expected="[*, D] with D >= 1", found=str(list(student.shape)), fix="Pass states."
        )
    rows = student.numel() // student.shape[-1]
    like = student.new_empty(0, dtype=sum_dtype(student))
    limit = as_threshold("masked_mse", threshold, -1 if granularity == "element" else -(-rows // size), like)
    path = kernel_path("masked_mse", student, *teachers)
    words = {"mean": reduction == "kept", "element": granularity == "element"}
    if path == "torch":
        run = masked_mse_reference if torch.compiler.is_compiling() else masked_mse_blocks
        return run(student, target, positive, neutral, eta, limit, size, **words)
    from expunge.kernels.gpu.masked_mse import masked_mse_eager, masked_mse_op

    launch = masked_mse_eager if path == "triton" else masked_mse_op
    return GatedLoss(*launch(student, target, positive, neutral, limit, eta, size, **words)[:3])


def check_states(
    op: str, student: Tensor, target: Tensor | None, positive: Tensor | None, neutral: Tensor | None
) -> list[Tensor]:
    """Refuses states of different shapes or devices, and half a pair; returns those that are there."""
    named = {"target": target, "positive": positive, "neutral": neutral}
    given = {name: states for name, states in named.items() if states is not None}
    check_floating(op, student=student, **given)
    if (positive is None) != (neutral is None):
        raise InvalidInputError(
            f"{op}: positive, neutral",
            expected="both or none",
            found="one",
            fix="The target is moved by their difference.",
        )
    if student.ndim < 2:
        raise InvalidInputError(
            f"{op}: student",
            expected="[*, D] with rows",
            found=str(list(student.shape)),
            fix="Add a dimension of rows.",
        )
    for name, states in given.items():
        if states.shape != student.shape or states.device != student.device:
            raise InvalidInputError(
                f"{op}: {name}",
                expected=f"{list(student.shape)} on {student.device}, as the student's states",
                found=f"{list(states.shape)} on {states.device}",
                fix="Run both models on the same tokens, and move the states to one device.",
            )
    return list(given.values())
