"""Erases features of a sparse autoencoder from hidden states: certificate, rank count and delta in one call.

Formula:

    a  = TopK activations of the erased features    `sae_rank_count`, for tokens that `sae_certificate` leaves over
    x' = x - Σ_j (1 - s_j) a_j d_j                  `sae_delta`

Nothing of the size tokens x dictionary exists, no decoder row is read but those of erased features that fire, and a
token where none fires keeps its bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.sae_certificate import sae_certificate
from expunge.kernels.sae_delta import sae_delta
from expunge.kernels.sae_rank_count import sae_rank_count


@dataclass(frozen=True)
class EraseReport:
    """What an erasing call found; tensors stay on their device until they are looked at."""

    acts: Tensor  # [*, m] float32: activations of the erased features before the edit, 0 where not active
    certified: Tensor | None  # [*] bool: tokens proved untouched by the hot features; None where none were given

    @property
    def fired(self) -> Tensor:
        """`[*]` bool: tokens that were edited."""
        return (self.acts != 0).any(-1)

    @property
    def certified_fraction(self) -> float | None:
        """The share of tokens that the certificate spared, or None without one."""
        return None if self.certified is None else self.certified.float().mean().item()


def sae_erase(
    x: Tensor,
    w_enc: Tensor,
    w_dec: Tensor,
    features: Tensor,
    k: int,
    *,
    strength: float | Tensor = 0.0,
    b_enc: Tensor | None = None,
    b_pre: Tensor | None = None,
    hot: Tensor | None = None,
    token_mask: Tensor | None = None,
    encode_dtype: torch.dtype | None = None,
) -> tuple[Tensor, EraseReport]:
    """Hidden states without the erased features, and what was found in them.

    Args:
        x: `[*, d]`, hidden states; float32, float16, bfloat16 or float64.
        w_enc: `[h, d]`, the encoder, of any strides.
        w_dec: `[h, d]`, the decoder, or `[m, d]`, its rows of the erased features in their order; any strides.
        features: `[m]`, the erased features: distinct ids, int64.
        k: how many features a token has.
        strength: what erased activations are multiplied by, one number or `[m]`: 0 takes them out.
        b_enc: `[h]`, the encoder's bias.
        b_pre: `[d]`, subtracted from x before encoding.
        hot: `[s]`, at least k features: spares the tokens that they prove untouched the rest of the encoder.
        token_mask: `[*]`, bool: False leaves a token as it is (the first token of CLIP, say).
        encode_dtype: the dtype of the encoder's product; None for that of w_enc.

    Returns:
        `[*, d]` in the dtype of x, and the report. Differentiable as `sae_rank_count` and `sae_delta` are.

    Raises:
        InvalidInputError: if shapes, dtypes, devices, ids or k do not fit.
    """
    if token_mask is not None and (token_mask.shape != x.shape[:-1] or token_mask.dtype != torch.bool):
        raise InvalidInputError(
            "sae_erase: token_mask",
            expected=f"bool of shape {list(x.shape[:-1])}, one a token",
            found=f"{token_mask.dtype} of shape {list(token_mask.shape)}",
            fix="Expand the mask of a prompt over its batch, and compare it with 0 to make it bool.",
        )
    if w_dec.ndim != 2 or w_dec.shape[0] not in (w_enc.shape[0], *features.shape):
        raise InvalidInputError(
            "sae_erase: w_dec",
            expected=f"[{w_enc.shape[0]}, d], or the rows of {list(features.shape)} features",
            found=f"{list(w_dec.shape)}",
            fix="Decoders stored as [d, h] (torch.nn.Linear) are passed as w_dec.T, which needs no copy.",
        )
    encoder = {"b_enc": b_enc, "b_pre": b_pre}
    bound = certified = None
    if hot is not None:
        bound, certified = sae_certificate(x, w_enc, features, hot, k, encode_dtype=encode_dtype, **encoder)
    if token_mask is not None:
        limit = torch.full_like(token_mask, -torch.inf, dtype=torch.float32) if bound is None else bound
        bound = limit.masked_fill(~token_mask, torch.inf)  # their candidates need not be counted
    acts, _ = sae_rank_count(x, w_enc, features, k, bound=bound, encode_dtype=encode_dtype, **encoder)
    if token_mask is not None:
        acts = acts.masked_fill(~token_mask[..., None], 0)  # a score of +inf passes any bound
    whole = w_dec.shape[0] == w_enc.shape[0]
    out = sae_delta(x, acts, w_dec, features=features if whole else None, strength=strength)
    return out, EraseReport(acts.detach(), certified)
