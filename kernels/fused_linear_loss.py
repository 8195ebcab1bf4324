"""A linear head with a gated loss of its logits, which never exist whole.

Formula: with the states h [R, D] that are trained, the head W [V, D], b [V] and z = h Wᵀ + b,

    cross entropy:  l_r = w_r (log Σ_v exp z_rv - z_r,y(r)), 0 for a row whose label is the ignored one
    KL:             l_r = w_r Σ_v q_rv (log q_rv - log softmax(z_r)_v),  q = softmax(z_t - eta (z_p - z_n))
    L = gate(l), see `loss_gate`;   dL/dz_r = (w_r m_g(r) / norm) (softmax(z_r) - onehot(y_r) or q_r)

z_t, z_p and z_n are the frozen model's states through the same head. Weights may be negative
(gradient ascent): the gate looks at the weighted loss, so that w = -1 and threshold = -3 go up on those tokens only
whose cross entropy is below 3.

Shapes:
    hidden, target, positive, neutral [*, D]; weight [V, D]; bias [V]; labels [*] int64; token_weights [*]
    loss [] float32 (float64 for float64 states)

Memory: naively R x V logits are made and kept several times over. Here chunks of rows pass through the head and leave
their losses and the gradient of their states: one buffer of a chunk's logits at a time, two for KL. The CPU path is
`fused_linear_chunks`, with the chunks' formulas; the reference below makes all logits and is the oracle of the tests.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.fused_linear_chunks import Problem, Wanted
from expunge.kernels.fused_linear_op import fused_linear_eager, fused_linear_op
from expunge.kernels.loss_gate import (
    GatedLoss,
    Granularity,
    Reduction,
    as_threshold,
    check_floating,
    check_gate,
    loss_gate_reference,
    sum_dtype,
)
from expunge.kernels.masked_mse import check_states, compose


def fused_linear_loss_reference(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    window: int,
    *,
    mean: bool,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    teachers: tuple[Tensor, ...] = (),
    eta: float = 1.0,
) -> GatedLoss:
    """The formula with whole logits; `threshold` has the dtype that everything is computed in, states are [R, D]."""

    dtype = threshold.dtype

    def head(states: Tensor) -> Tensor:
        return F.linear(states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))

    log_p = head(hidden).log_softmax(1)  # [R, V]
    if labels is not None:
        valid = labels != ignore_index
        losses = -log_p.gather(1, torch.where(valid, labels, 0)[:, None])[:, 0]
    else:
        valid = None
        with torch.no_grad():
            z_t, *others = map(head, teachers)  # t, or t, p and n
            log_q = (z_t - eta * (others[0] - others[1]) if others else z_t).log_softmax(1)
        losses = (log_q.exp() * torch.where(log_q == -math.inf, 0, log_q - log_p)).sum(1)  # 0 log 0 = 0
    losses = losses if token_weights is None else losses * token_weights.to(losses.dtype)
    if valid is None:
        return loss_gate_reference(losses, threshold, window, mean)
    return loss_gate_reference(torch.where(valid, losses, 0), threshold, window, mean, valid.int())


def fused_linear_loss(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    labels: Tensor | None = None,
    ignore_index: int = -100,
    token_weights: Tensor | None = None,
    target: Tensor | None = None,
    positive: Tensor | None = None,
    neutral: Tensor | None = None,
    eta: float = 1.0,
    threshold: float | Tensor = -math.inf,
    granularity: Granularity = "token",
    window: int | None = None,
    reduction: Reduction = "kept",
    chunk_rows: int | None = None,
    chunk_words: int | None = None,
) -> GatedLoss:
    """Cross entropy with labels, or KL to a composed teacher, of a linear head's logits, gated.

    Args:
        hidden: `[*, D]`, states before the head, with at least one leading dimension.
        weight: `[V, D]`, the head; its gradient is made if it requires one.
        bias: `[V]`; likewise. May hold -inf for words that are banned.
        labels: `[*]` integers for cross entropy.
        ignore_index: the label of rows that take no part.
        token_weights: `[*]`, a factor for each row's loss, of any sign; None for 1. No gradient flows to it.
        target, positive, neutral: `[*, D]` states of the frozen model for KL, to softmax(z_t - eta (z_p - z_n)): target
            alone, or positive and neutral, with target None for neutral. No gradient flows to them, nor through them
            to a head that trains.
        eta: how far the teacher's distribution is moved away from the concept.
        threshold: a group is kept if its loss is strictly greater; a number, or a tensor `[]` or one for each group.
            Within `torch.compile` pass a tensor: its value may change without recompiling.
        granularity: "window" (the sum of its rows' losses) or "token".
        window: rows of a window, counted over the leading dimensions in order.
        reduction: "kept" divides by the number of groups that were kept, "sum" by nothing.
        chunk_rows: rows whose logits exist at a time; None for 128 on a CPU and 1024 on a GPU. Rounded to whole
            windows where they fit.
        chunk_words: words whose logits exist at a time on the CPU; None for all. Less memory, and one product
            with the head more.

    Returns:
        `GatedLoss`; its loss is differentiable once with respect to `hidden`, `weight` and `bias`.

    Raises:
        InvalidInputError: if shapes, dtypes, labels or words do not fit.
    """
    op = "fused_linear_loss"
    size = check_gate(op, granularity, window, reduction, ("window", "token"))
    if target is None:
        target = neutral
    check_states(op, hidden, target, positive, neutral)
    check_head(op, hidden, weight, bias, labels, target, token_weights)
    for name, value in (("chunk_rows", chunk_rows), ("chunk_words", chunk_words)):
        if value is not None and value < 1:
            raise InvalidInputError(f"{op}: {name}", expected="at least 1", found=str(value), fix="Leave it out.")
    states = hidden.flatten(0, -2)  # [*, D] -> [R, D]
    like = hidden.new_empty(0, dtype=sum_dtype(hidden))
    limit = as_threshold(op, threshold, -(-states.shape[0] // size), like)
    weights = None if token_weights is None else token_weights.detach().flatten().to(like.dtype)
    valid = teacher = None
    if labels is not None:
        labels, valid, weights = known_labels(op, labels.flatten().long(), ignore_index, weight.shape[0], weights, like)
    else:
        assert target is not None
        teacher = compose(target, positive, neutral, eta, like.dtype).flatten(0, -2)
    problem = Problem(states, weight, bias, labels, valid, teacher, weights, limit, size, reduction == "kept")
    grad = torch.is_grad_enabled()
    wanted = Wanted(*(grad and one is not None and one.requires_grad for one in (states, weight, bias)))
    run = fused_linear_op if torch.compiler.is_compiling() else fused_linear_eager
    return run(problem, wanted, chunk_rows, chunk_words)


def check_head(
    op: str,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    labels: Tensor | None,
    target: Tensor | None,
    token_weights: Tensor | None,
) -> None:
    """Refuses a head of another width, rows without a label or weight, and two objectives or none."""
    check_floating(op, weight=weight, **{} if bias is None else {"bias": bias})
    if (labels is None) == (target is None):
        raise InvalidInputError(
            f"{op}: labels, target",
            expected="labels for cross entropy, or a frozen model's states for KL",
            found="neither" if labels is None else "both",
            fix="Pass one of the two; add two calls for a sum of both losses.",
        )
    words = weight.shape[0]
    if weight.ndim != 2 or 0 in weight.shape or weight.shape[1] != hidden.shape[-1]:
        raise InvalidInputError(
            f"{op}: weight",
            expected=f"[V, {hidden.shape[-1]}] with at least one word, as wide as the states",
            found=str(list(weight.shape)),
            fix="Pass the weight of the last linear layer, and the states that go into it.",
        )
    if bias is not None and bias.shape != (words,):
        raise InvalidInputError(
            f"{op}: bias", expected=f"[{words}]", found=str(list(bias.shape)), fix="Pass the bias of the same layer."
        )
    for name, rows in (("labels", labels), ("token_weights", token_weights)):
        if rows is not None and (rows.shape != hidden.shape[:-1] or rows.is_complex()):
            raise InvalidInputError(
                f"{op}: {name}",
                expected=f"{list(hidden.shape[:-1])}, one for each row",
                found=f"{list(rows.shape)} {rows.dtype}",
                fix="Shift labels and states against each other before the call.",
            )
    if labels is not None and (labels.is_floating_point() or labels.dtype == torch.bool):
        raise InvalidInputError(f"{op}: labels", expected="integers", found=str(labels.dtype), fix="Pass word ids.")
    for name, tensor in (("weight", weight), ("bias", bias), ("labels", labels), ("token_weights", token_weights)):
        if tensor is not None and tensor.device != hidden.device:
            raise InvalidInputError(
                f"{op}: {name}", expected=str(hidden.device), found=str(tensor.device), fix="Move it there."
            )


def known_labels(
    op: str, labels: Tensor, ignore_index: int, words: int, weights: Tensor | None, like: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Labels with 0 for the ignored ones, which rows are not ignored, and the weights.

    A label that is no word is an error where it can be seen without waiting for a GPU; elsewhere its weight is NaN.
    """
    valid = labels != ignore_index
    labels = torch.where(valid, labels, 0)
    wrong = (labels < 0) | (labels >= words)
    if labels.is_cpu and not torch.compiler.is_compiling():
        if bool(wrong.any()):
            raise InvalidInputError(
                f"{op}: labels",
                expected=f"0 to {words - 1}, or {ignore_index} to leave a row out",
                found=str(int(labels[wrong][0])),
                fix="Use the head that the labels were made for.",
            )
        return labels, valid, weights
    weights = torch.ones_like(labels, dtype=like.dtype) if weights is None else weights
    return torch.where(wrong, 0, labels), valid, torch.where(wrong, math.nan, weights)
