"""Which of a given set of features are among the k best of each token, by counting what beats them.

Formula (p as in `sae_encoder`; M the set of m features that are asked about):

    counts[t, j]  = #{i : p[t, i] before p[t, M_j] in the order (score descending, id ascending)}, at most k
    acts[t, j]    = p[t, M_j]  if counts[t, j] < k and p[t, M_j] > 0,  else 0

acts are what TopK and ReLU give for the features of M, exactly, with no list of the k best and no dense activations.
A feature whose score is not positive is not active whatever its rank: nothing is counted for it (counts = k).

Shapes:
    x         [*, d], w_enc [h, d], b_enc [h], b_pre [d]
    features  [m]      int64, distinct, in any order
    bound     [*]      optional: scores below it are known to be beaten k times (`sae_certificate` makes one)
    acts      [*, m]   float32 (float64 if the encode dtype is)
    counts    [*, m]   int32

The reference is the oracle of tests. The CPU scores the features of M first and then streams the encoder in tiles: a
candidate leaves when k features have beaten it, a token when its last candidate has left, and the stream ends with the
last token. Each feature of M has one score, the first: the tiles' own are overwritten by it, so that no sum in another
order can let a feature beat itself.

Gradient: of acts to x, w_enc, b_enc and b_pre through the active scores; counts have none.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.dispatch import kernel_path
from expunge.kernels.sae_encoder import (
    FIRST_TILE,
    ROWS,
    Encoder,
    TileStream,
    check_ids,
    check_k,
    make_encoder,
    no_autocast,
)
from expunge.kernels.sae_gradient import common_choice_backward, save_encoder, saved_encoder

PAIRS = 1 << 17  # comparisons of a candidate with a feature that are made at once: half a megabyte of scores


def sae_rank_count_reference(
    x: Tensor, w_enc: Tensor, features: Tensor, k: int, b_enc: Tensor | None = None, b_pre: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """The formula, word for word: all scores at once, each feature of M compared with each of the dictionary."""
    p = (x if b_pre is None else x - b_pre) @ w_enc.mT
    p = p if b_enc is None else p + b_enc
    own = p[..., features]  # [*, m]
    ids = torch.arange(w_enc.shape[0])
    before = (p[..., None, :] > own[..., None]) | ((p[..., None, :] == own[..., None]) & (ids < features[:, None]))
    counts = torch.where(own > 0, before.sum(-1).clamp(max=k), k)
    return torch.where(counts < k, own, 0), counts.int()


def rank_count_streamed(
    x: Tensor, encoder: Encoder, features: Tensor, k: int, bound: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The same in tiles: x [T, d] and bound [T] give acts and counts [T, m]."""
    count, m = x.shape[0], features.shape[0]
    acts = x.new_empty(count, m, dtype=encoder.compute)
    counts = x.new_empty(count, m, dtype=torch.int32)
    for first in range(0, count, ROWS):
        rows = slice(first, first + ROWS)
        centered = encoder.center(x[rows]).to(encoder.compute)
        own = encoder.gather(centered, features).nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        candidates = own > 0
        if bound is not None:
            candidates &= own >= bound[rows, None]
        counts[rows] = _count(centered, encoder, features, own, candidates, k)
        acts[rows] = torch.where(counts[rows] < k, own, 0)
    return acts, counts


def _count(centered: Tensor, encoder: Encoder, features: Tensor, own: Tensor, candidates: Tensor, k: int) -> Tensor:
    """counts [T, m] of the candidates [T, m], k for the others; own [T, m] are their scores."""
    counts = torch.where(candidates, 0, k)
    ordered, position = features.sort()
    stream = TileStream(encoder, centered.shape[0])
    token, slot = candidates.nonzero(as_tuple=True)
    rows = torch.arange(centered.shape[0], device=token.device)  # tokens that are still streamed
    for start, stop in stream.bounds(first=max(FIRST_TILE, k)):
        if token.numel() == 0:
            break
        present = token.unique()  # ascending
        if present.numel() <= 0.9 * rows.numel():  # a narrower product is worth copying the rows that are left
            centered, rows = centered[torch.searchsorted(rows, present)], present
        scores = stream.tile(centered, start, stop)
        low, high = torch.searchsorted(ordered, ordered.new_tensor([start, stop])).tolist()
        inside = position[low:high]
        scores[:, features[inside] - start] = own[rows[:, None], inside]
        line, value, place = torch.searchsorted(rows, token), own[token, slot], features[slot] - start
        if start == 0:
            # The k-th best of the first tile drops most candidates at once.
            scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
            alive = value >= scores.topk(k, dim=1).values[line, -1]
            counts[token[~alive], slot[~alive]] = k
            token, slot, line, value, place = (part[alive] for part in (token, slot, line, value, place))
        counts[token, slot] += _beaten(scores, line, value, place)
        alive = counts[token, slot] < k
        token, slot = token[alive], slot[alive]
    return counts.clamp_(max=k)


def _beaten(scores: Tensor, line: Tensor, value: Tensor, place: Tensor) -> Tensor:
    """How many of a tile's features come before each candidate, which stands in row `line` and column `place`."""
    width = scores.shape[1]
    column = torch.arange(width, device=scores.device)
    found = [line.new_empty(0)]
    for first in range(0, line.numel(), max(1, PAIRS // width)):
        part = slice(first, first + max(1, PAIRS // width))
        rows, own = scores[line[part]], value[part, None]  # [c, n], [c, 1]
        rows.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf)
        tied = (rows == own) & (column < place[part, None])
        found.append((rows > own).sum(1) + tied.sum(1))
    return torch.cat(found)


def _count_by_path(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    features: Tensor,
    bound: Tensor | None,
    k: int,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """x [T, d] to acts and counts [T, m], by the path that the dispatch names."""
    check_ids("sae_rank_count", "features", features, w_enc.shape[0])
    encoder = Encoder(w_enc, b_enc, b_pre, dtype)
    run = rank_count_streamed
    if encoder.compute != torch.float64 and kernel_path("sae_rank_count", x, w_enc) != "torch":
        from expunge.kernels.gpu.sae_rank_count import launch_sae_rank_count_forward as run
    with no_autocast(x):
        return run(x, encoder, features, k, bound)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, w_enc, b_enc, b_pre, features, _, _, dtype = inputs
    save_encoder(ctx, x, Encoder(w_enc, b_enc, b_pre, dtype), features, output[0])


def _backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    x, encoder, (features, acts) = saved_encoder(ctx)
    grad = torch.where(acts > 0, grads[0], 0)
    return *common_choice_backward(x, encoder, grad, features, ctx.needs_input_grad), None, None, None, None


class _RankCount(torch.autograd.Function):
    forward = staticmethod(_count_by_path)
    setup_context = staticmethod(_setup)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Any) -> Any:
        return _backward(ctx, *grads)


# What torch.compile sees: how long the stream runs depends on the data, which would break a graph.
_op = torch.library.custom_op("expunge::sae_rank_count", _count_by_path, mutates_args=())
_op.register_autograd(_backward, setup_context=_setup)


@_op.register_fake
def _(
    x: Tensor,
    w_enc: Tensor,
    b_enc: Tensor | None,
    b_pre: Tensor | None,
    features: Tensor,
    bound: Tensor | None,
    k: int,
    dtype: torch.dtype,
) -> Any:
    shape, compute = (x.shape[0], features.shape[0]), torch.float64 if dtype == torch.float64 else torch.float32
    return x.new_empty(shape, dtype=compute), x.new_empty(shape, dtype=torch.int32)


def sae_rank_count(
    x: Tensor,
    w_enc: Tensor,
    features: Tensor,
    k: int,
    *,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    bound: Tensor | None = None,
    encode_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """What TopK gives for some features, without finding the k best.

    Args:
        x: `[*, d]`, hidden states; float32, float16, bfloat16 or float64.
        w_enc: `[h, d]`, the encoder, of any strides.
        features: `[m]`, distinct ids, int64.
        k: how many features a token has.
        b_enc: `[h]`, the encoder's bias.
        b_pre: `[d]`, subtracted from x first.
        bound: `[*]`, scores below which are known to be beaten k times; +inf leaves a token out.
        encode_dtype: the dtype of the product's operands; None for that of w_enc. Sums are float32 in any case.

    Returns:
        acts `[*, m]`, float32: the activation of each feature, 0 where it is not active; and counts `[*, m]`, int32:
        how many features come before it, at most k, and k where its score is not positive. A NaN score counts as +inf.

    Raises:
        InvalidInputError: if shapes, dtypes, devices, ids or k do not fit.
    """
    encoder = make_encoder("sae_rank_count", x, w_enc, b_enc, b_pre, encode_dtype)
    check_k("sae_rank_count", k, w_enc.shape[0])
    check_ids("sae_rank_count", "features", features, w_enc.shape[0])
    if bound is not None and bound.shape != x.shape[:-1]:
        raise InvalidInputError(
            "sae_rank_count: bound",
            expected=f"one number a token, {list(x.shape[:-1])}",
            found=f"{list(bound.shape)}",
            fix="sae_certificate makes one for the same x.",
        )
    call = _op if torch.compiler.is_compiling() else _RankCount.apply
    rows = x.reshape(-1, x.shape[-1])  # [*, d] -> [T, d]
    limit = None if bound is None else bound.reshape(-1)
    acts, counts = call(rows, w_enc, b_enc, b_pre, features, limit, k, encoder.dtype)
    shape = (*x.shape[:-1], features.shape[0])
    return acts.view(shape), counts.view(shape)
