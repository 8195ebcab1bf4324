"""Proves tokens untouched from a part of the dictionary.

Formula: for any set H of features (hot ones are best) with none of the erased set M in it,

    bound[t]     = (the k-th best of p[t, H]) - margin[t]          a lower bound of the k-th best of all scores
    certified[t] = p[t, M_j] <= 0 or p[t, M_j] < bound[t]          for every j

A score below the bound is beaten k times within H alone, so that the feature is not among the k best whatever the rest
of the dictionary does. There is no false proof; a token that is not certified may still be untouched, and the whole
encoder has to be asked. That a feature *is* among the k best cannot be proved this way.

The margin makes the proof hold for scores summed in any order: a float32 sum of n products errs by at most
n u (|x| |w| + |b|) with u = 2^-23 (tensor cores truncate), and four such errors stand between the two scores here and
the two that are compared elsewhere.

Shapes:
    x          [*, d], w_enc [h, d], b_enc [h], b_pre [d]
    features   [m]    the erased features
    hot        [s]    a part of the dictionary, at least k features; those of M are left out
    bound      [*]    float32
    certified  [*]    bool

Cost: (s + m) rows of the encoder instead of h. All paths run the torch code below; the products are the whole of it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.sae_encoder import Encoder, check_ids, check_k, make_encoder, no_autocast

BLOCK = 512  # rows of the encoder that are gathered at a time


def _scores(encoder: Encoder, centered: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Scores `[T, n]` of some features, and the largest error that float32 sums of them may have, `[T]`."""
    scores = centered.new_empty(centered.shape[0], ids.shape[0], dtype=encoder.compute)
    norm = scores.new_zeros(())
    bias = scores.new_zeros(())
    for first in range(0, ids.shape[0], BLOCK):
        part = ids[first : first + BLOCK]
        rows = encoder.weight[part]
        own = None if encoder.bias is None else encoder.bias[part]
        scores[:, first : first + BLOCK] = encoder.product(centered, rows, own)
        norm = torch.maximum(norm, torch.linalg.vector_norm(encoder.operand(rows), dim=1).max())
        bias = bias if own is None else torch.maximum(bias, own.to(encoder.compute).abs().max())
    unit = (centered.shape[1] + 2) * torch.finfo(encoder.compute).eps
    error = unit * (torch.linalg.vector_norm(centered.to(encoder.compute), dim=1) * norm + bias)
    return scores.nan_to_num_(nan=torch.inf, posinf=torch.inf, neginf=-torch.inf), error


def certificate(x: Tensor, encoder: Encoder, features: Tensor, hot: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The formula, on any device without waiting for it: x [T, d] gives bound and certified [T]."""
    centered = encoder.center(x)
    own, own_error = _scores(encoder, centered, features)
    scores, error = _scores(encoder, centered, hot)
    scores.masked_fill_(torch.isin(hot, features), -torch.inf)
    bound = scores.topk(k, dim=1).values[:, -1] - 2 * (error + own_error)
    bound = bound.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)  # a token with NaN proves nothing
    return bound, ((own <= 0) | (own < bound[:, None])).all(1)


def sae_certificate(
    x: Tensor,
    w_enc: Tensor,
    features: Tensor,
    hot: Tensor,
    k: int,
    *,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    encode_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Which tokens are proved untouched by erasing some features.

    Args:
        x: `[*, d]`, hidden states; float32, float16, bfloat16 or float64.
        w_enc: `[h, d]`, the encoder, of any strides.
        features: `[m]`, the erased features: distinct ids, int64.
        hot: `[s]`, at least k other features: those that are active most often prove the most.
        k: how many features a token has.
        b_enc: `[h]`, the encoder's bias.
        b_pre: `[d]`, subtracted from x first.
        encode_dtype: the dtype of the product's operands; None for that of w_enc.

    Returns:
        bound `[*]`, float32: scores below it are beaten k times (for `sae_rank_count`); certified `[*]`, bool: no
        erased feature is active. `certified.float().mean()` is the share of tokens that were spared.

    Raises:
        InvalidInputError: if shapes, dtypes, devices, ids or k do not fit.
    """
    encoder = make_encoder("sae_certificate", x, w_enc, b_enc, b_pre, encode_dtype)
    check_k("sae_certificate", k, w_enc.shape[0])
    check_ids("sae_certificate", "features", features, w_enc.shape[0])
    check_ids("sae_certificate", "hot", hot, w_enc.shape[0])
    if hot.shape[0] < k:
        raise InvalidInputError(
            "sae_certificate: hot",
            expected=f"at least k = {k} features",
            found=str(hot.shape[0]),
            fix="Take the features that are active most often on ordinary inputs; some thousands prove the most.",
        )
    with torch.no_grad(), no_autocast(x):
        bound, certified = certificate(x.reshape(-1, x.shape[-1]), encoder, features, hot, k)
    return bound.view(x.shape[:-1]), certified.view(x.shape[:-1])
