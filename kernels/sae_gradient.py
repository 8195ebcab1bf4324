"""Gradients of the scores of chosen features, shared by the ops that choose.

Formula: for scores s_j = (x - b_pre) · w_j + b_j of the features j that were chosen for a token, with the gradients g_j
that are zero wherever ReLU was,

    dx = Σ_j g_j w_j      dw_j += g_j (x - b_pre)      db_j += g_j      db_pre = -Σ_tokens dx

Rounding to the encode dtype is taken for the identity. Only rows of the weight that were chosen are read.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.kernels.sae_encoder import Encoder, no_autocast

BLOCK = 1 << 18  # elements of gathered rows that are held at a time

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]


def save_encoder(ctx: Any, x: Tensor, encoder: Encoder, *more: Tensor) -> None:
    """Keeps what the backward pass reads."""
    ctx.save_for_backward(x, encoder.weight, encoder.bias, encoder.pre, *more)
    ctx.dtype = encoder.dtype


def saved_encoder(ctx: Any) -> tuple[Tensor, Encoder, list[Tensor]]:
    """What `save_encoder` kept: x, the encoder, and the rest."""
    x, weight, bias, pre, *more = ctx.saved_tensors
    return x, Encoder(weight, bias, pre, ctx.dtype), more


def own_choice_backward(x: Tensor, encoder: Encoder, grad: Tensor, ids: Tensor, needs: tuple[bool, ...]) -> Gradients:
    """Gradients of (x, w_enc, b_enc, b_pre) where each token chose its own features: grad and ids [T, k], x [T, d]."""
    centered = encoder.center(x).to(encoder.compute)
    d_rows = torch.zeros_like(centered)
    wants_weight, wants_bias = needs[1], needs[2] and encoder.bias is not None
    d_weight = torch.zeros_like(encoder.weight, dtype=encoder.compute) if wants_weight else None
    d_bias = centered.new_zeros(encoder.weight.shape[0]) if wants_bias else None
    step = max(1, BLOCK // max(1, ids.shape[1] * x.shape[1]))
    for first in range(0, x.shape[0], step):
        part = slice(first, first + step)
        chosen, g = ids[part], grad[part]
        with no_autocast(x):
            rows = encoder.operand(encoder.weight[chosen])  # [c, k, d]
            d_rows[part] = torch.bmm(g[:, None, :], rows)[:, 0]
        if d_weight is not None:
            # index_put_ sums in a fixed order on every device.
            d_weight.index_put_((chosen,), g[:, :, None] * centered[part, None, :], accumulate=True)
    if d_bias is not None:
        d_bias.index_put_((ids.flatten(),), grad.flatten(), accumulate=True)
    return _in_the_inputs_dtypes(x, encoder, needs, d_rows, d_weight, d_bias)


def common_choice_backward(
    x: Tensor, encoder: Encoder, grad: Tensor, ids: Tensor, needs: tuple[bool, ...]
) -> Gradients:
    """Gradients of (x, w_enc, b_enc, b_pre) where all tokens share the features: grad [T, m], ids [m], x [T, d]."""
    d_weight = d_bias = None
    with no_autocast(x):
        d_rows = grad @ encoder.operand(encoder.weight[ids])
        if needs[1]:
            d_weight = torch.zeros_like(encoder.weight, dtype=encoder.compute)
            d_weight[ids] = grad.mT @ encoder.center(x).to(encoder.compute)
    if needs[2] and encoder.bias is not None:
        d_bias = grad.new_zeros(encoder.weight.shape[0])
        d_bias[ids] = grad.sum(0)
    return _in_the_inputs_dtypes(x, encoder, needs, d_rows, d_weight, d_bias)


def _in_the_inputs_dtypes(
    x: Tensor,
    encoder: Encoder,
    needs: tuple[bool, ...],
    d_rows: Tensor,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
) -> Gradients:
    return (
        d_rows.to(x.dtype) if needs[0] else None,
        None if d_weight is None else d_weight.to(encoder.weight.dtype),
        None if d_bias is None or encoder.bias is None else d_bias.to(encoder.bias.dtype),
        d_rows.sum(0).neg().to(encoder.pre.dtype) if needs[3] and encoder.pre is not None else None,
    )
