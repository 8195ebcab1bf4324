"""Exact TopK encode of a sparse autoencoder, without a tokens x dictionary tensor.

Formula (Gao et al. 2024, arXiv 2406.04093; p as in `sae_encoder`):

    ids = the k best of p in the order (score descending, id ascending)         per token
    values = relu(p[ids])

ReLU comes after the choice: a token with fewer than k positive scores gets the next best ids, with the value 0.

Shapes:
    x        [*, d], w_enc [h, d], b_enc [h], b_pre [d]
    values   [*, k]   float32 (float64 if the encode dtype is)
    indices  [*, k]   int64

The reference is the oracle of tests. The CPU streams tiles instead: whatever of a tile beats the k-th best so far is
merged with the k best so far. Later tiles hold larger ids, so that a tie never displaces and a stable sort keeps the
order.

Gradient: to x, w_enc, b_enc and b_pre through the chosen positive scores. The choice itself has none, nor has the
rounding to the encode dtype.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.kernels.dispatch import kernel_path
from expunge.kernels.sae_encoder import FIRST_TILE, ROWS, Encoder, TileStream, check_k, make_encoder, no_autocast
from expunge.kernels.sae_gradient import own_choice_backward, save_encoder, saved_encoder


def sae_topk_reference(
    x: Tensor, w_enc: Tensor, k: int, b_enc: Tensor | None = None, b_pre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula, word for word: all scores at once, and a stable sort for the order of ties."""
    p = (x if b_pre is None else x - b_pre) @ w_enc.mT
    p = p if b_enc is None else p + b_enc
    values, indices = p.sort(dim=-1, descending=True, stable=True)
    return values[..., :k].relu(), indices[..., :k]


def topk_streamed(x: Tensor, encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    """The same in tiles, on any device: x [T, d] gives values and ids [T, k]."""
    count = x.shape[0]
    values = x.new_empty(count, k, dtype=encoder.compute)
    indices = x.new_empty(count, k, dtype=torch.int64)
    for first in range(0, count, ROWS):
        rows = slice(first, first + ROWS)
        values[rows], indices[rows] = _topk_of_rows(encoder.center(x[rows]).to(encoder.compute), encoder, k)
    return values.relu_(), indices


def _topk_of_rows(centered: Tensor, encoder: Encoder, k: int) -> tuple[Tensor, Tensor]:
    stream = TileStream(encoder, centered.shape[0])
    values = indices = centered.new_empty(0)
    for start, stop in stream.bounds(first=max(FIRST_TILE, k)):
        scores = stream.tile(centered, start, stop)
        if start == 0:
            values, indices = _best_of_first(scores, k)
        else:
            fresh, ids = _newcomers(scores, values[:, -1:], start)
            values, order = torch.cat([values, fresh], 1).sort(dim=1, descending=True, stable=True)
            indices = torch.cat([indices, ids], 1).gather(1, order)
        values, indices = values[:, :k].clone(), indices[:, :k].clone()  # the rest of the sort is let go
    return values, indices


def _best_of_first(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """At least the k best of the first tile's scores [T, n], n >= k, in order: all not below the k-th, sorted."""
    scores = scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
    worst = scores.topk(k, dim=1).values[:, -1:]
    if bool((worst == -torch.inf).any()):  # nothing is below it, and which of them are taken is for their ids to say
        return scores.sort(dim=1, descending=True, stable=True)
    values, ids = _newcomers(scores, worst.nextafter(worst.new_tensor(-torch.inf)), 0)
    values, order = values.sort(dim=1, descending=True, stable=True)
    return values, ids.gather(1, order)


def _newcomers(scores: Tensor, worst: Tensor, start: int) -> tuple[Tensor, Tensor]:
    """What beats each token's k-th best, packed to the left in the order of ids: values and ids [T, most].

    Rows with fewer are filled with -inf, which a stable sort leaves behind everything else.
    """
    better = (scores <= worst).logical_not_()  # NaN too
    row, column = better.nonzero(as_tuple=True)
    per_row = torch.bincount(row, minlength=scores.shape[0])
    most = int(per_row.max()) if row.numel() else 0
    place = torch.arange(row.numel(), device=row.device) - (per_row.cumsum(0) - per_row)[row]
    values = scores.new_full((scores.shape[0], most), -torch.inf)
    ids = row.new_zeros(scores.shape[0], most)
    found = scores[row, column]
    values[row, place] = torch.where(found.isnan(), torch.inf, found)
    ids[row, place] = column + start
    return values, ids


def _choose(
    x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_pre: Tensor | None, k: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x [T, d] to values and ids [T, k], by the path that the dispatch names."""
    encoder = Encoder(w_enc, b_enc, b_pre, dtype)
    run = topk_streamed
    if encoder.compute != torch.float64 and kernel_path("sae_topk", x, w_enc) != "torch":
        from expunge.kernels.gpu.sae_topk import launch_sae_topk_forward as run
    with no_autocast(x):
        return run(x, encoder, k)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_enc, b_enc, b_pre, _, dtype = inputs
    save_encoder(ctx, x, Encoder(w_enc, b_enc, b_pre, dtype), *output)


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, encoder, (values, ids) = saved_encoder(ctx)
    grad = torch.where(values > 0, grads[0], 0)
    return *own_choice_backward(x, encoder, grad, ids, ctx.needs_input_grad), None, None


class _TopK(torch.autograd.Function):
    forward = staticmethod(_choose)
    setup_context = staticmethod(_setup)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)


# What torch.compile sees: the number of survivors of a tile depends on the data, which would break a graph.
_op = torch.library.custom_op("expunge::sae_topk", _choose, mutates_args=())
_op.register_autograd(_backward, setup_context=_setup)


@_op.register_fake
def _(x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_pre: Tensor | None, k: int, dtype: torch.dtype) -> Any:
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    return x.new_empty(x.shape[0], k, dtype=compute), x.new_empty(x.shape[0], k, dtype=torch.int64)


def sae_topk(
    x: Tensor,
    w_enc: Tensor,
    k: int,
    *,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    encode_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The k active features of each token.

    Args:
        x: `[*, d]`, hidden states; float32, float16, bfloat16 or float64.
        w_enc: `[h, d]`, the encoder, of any strides.
        k: how many features a token has.
        b_enc: `[h]`, the encoder's bias.
        b_pre: `[d]`, subtracted from x first.
        encode_dtype: the dtype of the product's operands; None for that of w_enc. Sums are float32 in any case.

    Returns:
        values `[*, k]`, float32 and at least 0, and indices `[*, k]`, int64, in the order (score descending, id
        ascending). A NaN score counts as +inf.

    Raises:
        InvalidInputError: if shapes, dtypes, devices or k do not fit.
    """
    encoder = make_encoder("sae_topk", x, w_enc, b_enc, b_pre, encode_dtype)
    check_k("sae_topk", k, w_enc.shape[0])
    call = _op if torch.compiler.is_compiling() else _TopK.apply
    values, indices = call(x.reshape(-1, x.shape[-1]), w_enc, b_enc, b_pre, k, encoder.dtype)  # [*, d] -> [T, d]
    return values.view(*x.shape[:-1], k), indices.view(*x.shape[:-1], k)
