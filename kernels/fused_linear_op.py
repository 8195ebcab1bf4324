"""`fused_linear_loss` for autograd, eager and within `torch.compile`; formulas in `fused_linear_chunks`.

Within `torch.compile` it is one custom op on every device: taken apart, its loop over chunks would be unrolled into the
graph, and Inductor's own plan of buffers would decide how many logits exist at a time.

Shapes, in the op's order of results: loss [], group_losses [G], kept [G], factor [R], gradients of states [R, D],
weight [V, D] and bias [V]; a gradient that is not wanted has no elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from expunge.kernels.dispatch import kernel_path
from expunge.kernels.fused_linear_chunks import Chunks, Problem, Result, Wanted
from expunge.kernels.loss_gate import GatedLoss, scale_rows, scale_rows_eagerly

Scale = Callable[[Tensor, Tensor, Tensor, torch.dtype], Tensor]
Seven = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]


def forward(problem: Problem, wanted: Wanted, chunk_rows: int | None, chunk_words: int | None) -> Result:
    """Loss, gates and gradients, on the path that the tensors are for."""
    if kernel_path("fused_linear_loss", problem.states, problem.weight) == "torch":
        with torch.autocast(problem.states.device.type, enabled=False):
            return Chunks(problem, wanted, chunk_rows, chunk_words).run()
    from expunge.kernels.gpu.fused_linear_loss import launch_fused_linear_loss

    return launch_fused_linear_loss(problem, wanted, chunk_rows)


def remember(ctx: Any, results: Seven, bias: Tensor | None, states: Tensor, weight: Tensor) -> None:
    """Keeps what backward needs."""
    ctx.save_for_backward(*results[3:])
    ctx.dtypes = states.dtype, weight.dtype, weight.dtype if bias is None else bias.dtype


def backward(ctx: Any, upstream: Tensor, scale: Scale) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of states, weight and bias that are needed: those of forward times the loss's own."""
    factor, states, *head = ctx.saved_tensors
    scaled = [scale(states, factor, upstream, ctx.dtypes[0]) if ctx.needs_input_grad[0] else None]
    for gradient, dtype, needed in zip(head, ctx.dtypes[1:], ctx.needs_input_grad[1:3], strict=True):
        scaled.append((gradient * upstream).to(dtype) if needed else None)
    return scaled[0], scaled[1], scaled[2]


def scale_traced(states: Tensor, factor: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """states [R, D] times each row's factor, for the compiler to fuse with what follows."""
    return scale_rows(states, factor * upstream, dtype)


def scale_eager(states: Tensor, factor: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """The same in one kernel, where there is one."""
    if kernel_path("fused_linear_loss", states) == "torch":
        return scale_rows_eagerly(states, factor * upstream, dtype)
    from expunge.kernels.gpu.loss_gate import launch_scale_rows

    return launch_scale_rows(states, factor, upstream, dtype)


class FusedLinearLoss(torch.autograd.Function):
    """Makes the gradients in forward, together with the loss."""

    @staticmethod
    def forward(
        ctx: Any,
        states: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        problem: Problem,
        wanted: Wanted,
        chunks: tuple[int | None, int | None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        result = forward(problem, wanted, *chunks)
        remember(ctx, as_tensors(result), bias, states, weight)
        ctx.mark_non_differentiable(result.gated.group_losses, result.gated.kept)
        return result.gated

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
        return *backward(ctx, upstream, scale_eager), None, None, None


def fused_linear_eager(problem: Problem, wanted: Wanted, chunk_rows: int | None, chunk_words: int | None) -> GatedLoss:
    """The loss for eager code."""
    arguments = problem.states, problem.weight, problem.bias, problem, wanted, (chunk_rows, chunk_words)
    return GatedLoss(*FusedLinearLoss.apply(*arguments))


def as_tensors(result: Result) -> Seven:
    """A result as the op's seven tensors."""
    empty = [result.factor.new_empty(0) if one is None else one for one in (result.states, result.weight, result.bias)]
    return *result.gated, result.factor, *empty  # type: ignore[return-value]


@torch.library.custom_op("expunge::fused_linear_loss", mutates_args=())
def linear_loss(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    teacher: Tensor | None,
    row_weights: Tensor | None,
    threshold: Tensor,
    window: int,
    mean: bool,
    wanted: list[bool],
    chunk_rows: int | None,
    chunk_words: int | None,
) -> Seven:
    problem = Problem(states, weight, bias, labels, valid, teacher, row_weights, threshold, window, mean)
    return as_tensors(forward(problem, Wanted(*wanted), chunk_rows, chunk_words))


@linear_loss.register_fake
def linear_loss_fake(
    states: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    valid: Tensor | None,
    teacher: Tensor | None,
    row_weights: Tensor | None,
    threshold: Tensor,
    window: int,
    mean: bool,
    wanted: list[bool],
    chunk_rows: int | None,
    chunk_words: int | None,
) -> Seven:
    (rows, width), words, new = states.shape, weight.shape[0], threshold.new_empty
    groups = (rows + window - 1) // window
    kept = new(groups, dtype=torch.int32)
    grad_states = states.new_empty((rows, width)) if wanted[0] else new(0)
    grad_weight, grad_bias = new((words, width) if wanted[1] else 0), new(words if wanted[2] else 0)
    return new(()), new(groups), kept, new(rows), grad_states, grad_weight, grad_bias


def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Seven) -> None:
    remember(ctx, output, inputs[2], inputs[0], inputs[1])


def op_backward(ctx: Any, upstream: Tensor, *_: Any) -> tuple[Tensor | None, ...]:
    return *backward(ctx, upstream, scale_traced), *(None,) * 10


linear_loss.register_autograd(op_backward, setup_context=setup_context)


def fused_linear_op(problem: Problem, wanted: Wanted, chunk_rows: int | None, chunk_words: int | None) -> GatedLoss:
    """The loss for compiled code."""
    p = problem
    tensors = p.states, p.weight, p.bias, p.labels, p.valid, p.teacher, p.row_weights, p.threshold
    gradients = [wanted.states, wanted.weight, wanted.bias]
    return GatedLoss(*linear_loss(*tensors, p.window, p.mean, gradients, chunk_rows, chunk_words)[:3])
