"""The encoder of a sparse autoencoder, one tile of its dictionary at a time.

Formula:

    p = (x - b_pre) W_encᵀ + b_enc                       the score of every feature for every token

Shapes:
    x      [*, d]   hidden states
    w_enc  [h, d]   encoder, one row a feature (h up to 2^19 and beyond; any strides)
    b_enc  [h]      its bias, or None
    b_pre  [d]      what is subtracted from x first, or None
    p      [T, h]   never exists as a whole: T tokens times a tile of features at a time

Precision: the choice of the k best is discontinuous, so that it is pinned. x - b_pre is formed in float32 and rounded
to the encode dtype, which is the one w_enc is stored in unless another is named, never the one that x or autocast
happens to have; products are summed in float32 (in float64 only if the encode dtype is float64).

Order: features stand in the order of (score descending, id ascending). A NaN score ranks as +inf does, so that a token
that holds NaN shows it and is never taken for one that needs no edit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from expunge.errors import InvalidInputError

TILE_BYTES = 1 << 20  # scores of a tile: half of a core's second-level cache, so that what reads them finds them there
FIRST_TILE = 512  # tiles double from here on: each then brings about as many newcomers a token as the one before
ROWS = 512  # tokens that are streamed together; more of them would make the tiles narrow
ENCODE_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Encoder:
    """What turns hidden states into scores; see the module's formula."""

    weight: Tensor  # [h, d]
    bias: Tensor | None = None  # [h]
    pre: Tensor | None = None  # [d]
    dtype: torch.dtype = torch.float32  # of the operands

    @property
    def compute(self) -> torch.dtype:
        """The dtype of sums and scores."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def center(self, x: Tensor) -> Tensor:
        """x - b_pre in float32, rounded to the encode dtype: `[T, d]`, contiguous."""
        rows = x.reshape(-1, x.shape[-1]).to(self.compute)  # [*, d] -> [T, d]
        if self.pre is not None:
            rows = rows - self.pre.to(self.compute)
        return rows.to(self.dtype).contiguous()

    def operand(self, rows: Tensor) -> Tensor:
        """Rows of the weight as they enter the product: rounded to the encode dtype, held in the compute dtype."""
        return rows.to(self.dtype).to(self.compute)

    def gather(self, centered: Tensor, ids: Tensor) -> Tensor:
        """Scores of chosen features: `centered` [T, d] and ids [m] give [T, m]; reads m rows of the weight."""
        return self.product(centered, self.weight[ids], None if self.bias is None else self.bias[ids])

    def product(self, centered: Tensor, rows: Tensor, bias: Tensor | None) -> Tensor:
        """`[T, d]` times rows `[n, d]` plus bias `[n]`: `[T, n]`."""
        scores = centered.to(self.compute) @ self.operand(rows).mT
        return scores if bias is None else scores.add_(bias.to(self.compute))


class TileStream:
    """Scores of successive features in buffers that are used again for every tile."""

    def __init__(self, encoder: Encoder, rows: int) -> None:
        width = encoder.weight.shape[1]
        self.encoder = encoder
        self.casts = encoder.weight.dtype != encoder.compute or encoder.dtype != encoder.compute
        per_feature = encoder.compute.itemsize * (rows + (width if self.casts else 0))
        self.widest = max(64, 1 << (TILE_BYTES // max(per_feature, 1)).bit_length() - 1)
        self.widest = min(self.widest, max(encoder.weight.shape[0], 1))
        self.scores = encoder.weight.new_empty(rows * self.widest, dtype=encoder.compute)

    def bounds(self, first: int = FIRST_TILE) -> Iterator[tuple[int, int]]:
        """Where tiles begin and end: `first` features, then twice as many each time until the widest."""
        count, start, width = self.encoder.weight.shape[0], 0, first
        while start < count:
            stop = min(start + min(width, max(self.widest, first)), count)
            yield start, stop
            start, width = stop, 2 * width

    def tile(self, centered: Tensor, start: int, stop: int) -> Tensor:
        """Scores `[T, stop - start]` of the tokens `centered` [T, d]; valid until the next call."""
        encoder, shape = self.encoder, (centered.shape[0], stop - start)
        if shape[0] * shape[1] > self.scores.numel():
            self.scores = self.scores.new_empty(shape[0] * shape[1])
        out = self.scores[: shape[0] * shape[1]].view(shape)
        rows = encoder.weight[start:stop]
        rows = encoder.operand(rows) if self.casts else rows
        if encoder.bias is None:
            return torch.mm(centered, rows.mT, out=out)
        return torch.addmm(encoder.bias[start:stop].to(encoder.compute), centered, rows.mT, out=out)


def no_autocast(x: Tensor) -> torch.autocast:
    """A context without autocast, which would round operands to another dtype than the encode dtype."""
    return torch.autocast(x.device.type, enabled=False)


def make_encoder(
    op: str, x: Tensor, w_enc: Tensor, b_enc: Tensor | None, b_pre: Tensor | None, dtype: torch.dtype | None
) -> Encoder:
    """An encoder of arguments that belong together.

    Raises:
        InvalidInputError: if a shape, dtype or device does not fit the others.
    """
    if w_enc.ndim != 2 or x.ndim < 1 or x.shape[-1] != w_enc.shape[1]:
        raise InvalidInputError(
            f"{op}: x and w_enc",
            expected="x [*, d] and w_enc [h, d] of one width d",
            found=f"x {list(x.shape)} and w_enc {list(w_enc.shape)}",
            fix="Encoders stored as [d, h] (SAELens) are passed as w_enc.T, which needs no copy.",
        )
    for name, bias, size in (("b_enc", b_enc, w_enc.shape[0]), ("b_pre", b_pre, w_enc.shape[1])):
        if bias is not None and bias.shape != (size,):
            raise InvalidInputError(
                f"{op}: {name}",
                expected=f"shape [{size}]",
                found=f"{list(bias.shape)}",
                fix="b_enc holds one number a feature, b_pre one a channel of x.",
            )
    for name, tensor in (("x", x), ("w_enc", w_enc), ("b_enc", b_enc), ("b_pre", b_pre)):
        if tensor is not None and (tensor.dtype not in ENCODE_DTYPES or tensor.device != x.device):
            raise InvalidInputError(
                f"{op}: {name}",
                expected=f"float32, float16, bfloat16 or float64 on {x.device}",
                found=f"{tensor.dtype} on {tensor.device}",
                fix="Dequantise weights first, and keep the autoencoder on the device of the hidden states.",
            )
    dtype = w_enc.dtype if dtype is None else dtype
    if dtype not in ENCODE_DTYPES:
        raise InvalidInputError(
            f"{op}: encode_dtype",
            expected="float32, float16, bfloat16 or float64",
            found=str(dtype),
            fix="Leave encode_dtype out for the dtype that w_enc is stored in.",
        )
    return Encoder(w_enc, b_enc, b_pre, dtype)


def check_k(op: str, k: int, features: int) -> None:
    """Refuses a k that no dictionary of `features` features has.

    Raises:
        InvalidInputError: if k is outside 1..features.
    """
    if not 1 <= k <= features:
        raise InvalidInputError(
            f"{op}: k",
            expected=f"1 to {features}, the size of the dictionary",
            found=str(k),
            fix="Take the k that the autoencoder was trained with.",
        )


# Ids that were found sound, by identity and version: looking at them again would make a GPU wait at every call.
_checked = WeakTensorKeyDictionary()


def check_ids(op: str, name: str, ids: Tensor, features: int) -> None:
    """Refuses ids that are not distinct features of the dictionary; a tensor once checked is trusted until written to.

    Raises:
        InvalidInputError: if ids is not a vector of distinct int64 in 0..features - 1.
    """
    if ids.ndim != 1 or ids.dtype != torch.int64:
        raise InvalidInputError(
            f"{op}: {name}",
            expected="feature ids [m], int64",
            found=f"{list(ids.shape)}, {ids.dtype}",
            fix="torch.tensor(list_of_ids) makes one.",
        )
    if torch.compiler.is_compiling():
        return  # there are no values yet; the custom op checks them when it runs
    if ids.numel() == 0 or _checked.get(ids) == (ids._version, features):
        return
    ordered = ids.sort().values
    low, high, twice = int(ordered[0]), int(ordered[-1]), int((ordered[1:] == ordered[:-1]).sum())
    if low < 0 or high >= features or twice:
        raise InvalidInputError(
            f"{op}: {name}",
            expected=f"distinct ids from 0 to {features - 1}",
            found=f"ids from {low} to {high}, {twice} of them twice",
            fix="Merge the concepts' features as a set (torch.unique) and take them from this autoencoder.",
        )
    _checked[ids] = (ids._version, features)
