"""Inputs and naive forms of the SAE benchmarks: everything dense, as published code has it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.kernels.sae_topk import sae_topk

K = 64
ERASED = 256
WIDTH = 768  # CLIP-L's text encoder
TOKENS = 77
BLOCK = 8192  # features that float64 checks hold at a time


@dataclass(frozen=True)
class Inputs:
    """An autoencoder with random weights, hidden states, and erased features that fire on a tenth of the tokens."""

    x: Tensor
    w_enc: Tensor
    b_enc: Tensor
    b_pre: Tensor
    w_dec: Tensor
    features: Tensor

    @property
    def biases(self) -> dict[str, Tensor]:
        return {"b_enc": self.b_enc, "b_pre": self.b_pre}


def make_inputs(features: int, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Inputs:
    """Erased are features that are active nowhere; then one token in ten is pushed towards one of them."""
    generator = torch.Generator(device).manual_seed(0)
    sizes = [(TOKENS, WIDTH), (features, WIDTH), (features,), (WIDTH,), (features, WIDTH)]
    scales = (1.0, WIDTH**-0.5, 0.01, 0.1, WIDTH**-0.5)
    x, w_enc, b_enc, b_pre, w_dec = (
        torch.randn(*size, generator=generator, device=device).mul_(scale).to(dtype)
        for size, scale in zip(sizes, scales, strict=True)
    )
    idle = torch.ones(features, dtype=torch.bool, device=device)
    idle[sae_topk(x, w_enc, K, b_enc=b_enc, b_pre=b_pre)[1].flatten()] = False
    erased = idle.nonzero()[:, 0][:: max(1, features // (2 * ERASED))][:ERASED].contiguous()
    pushed = torch.arange(0, TOKENS, 10, device=device)
    x[pushed] += 8 * w_enc[erased[: len(pushed)]]
    return Inputs(x, w_enc, b_enc, b_pre, w_dec, erased)


def naive_codes(given: Inputs) -> Tensor:
    """Activations of the whole dictionary, [T, h]."""
    p = F.linear(given.x - given.b_pre, given.w_enc, given.b_enc)
    values, ids = p.topk(K, dim=-1)
    return torch.zeros_like(p).scatter_(-1, ids, values.relu_())


def naive_replace(given: Inputs) -> Tensor:
    """One dense decode of the edited activations, which takes the hidden states' place (Interpret-then-Deactivate)."""
    z = naive_codes(given)
    z[:, given.features] = 0
    return z @ given.w_dec + given.b_pre


def naive_difference(given: Inputs) -> Tensor:
    """Two dense decodes, so that the reconstruction's error stays (SAeUron, SAELens): what `sae_erase` computes."""
    z = naive_codes(given)
    error = given.x - z @ given.w_dec
    z[:, given.features] = 0
    return z @ given.w_dec + error


def exact(given: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """In float64, a block of features at a time: values and ids of the k best, and x without the erased ones."""
    x = given.x.double()
    centered = (given.x.float() - given.b_pre.float()).to(given.w_enc.dtype).double()
    values = ids = None
    for first in range(0, given.w_enc.shape[0], BLOCK):
        part = slice(first, first + BLOCK)
        best, at = (centered @ given.w_enc[part].double().mT + given.b_enc[part].double()).topk(K)
        values = best if values is None else torch.cat([values, best], 1)
        ids = at if ids is None else torch.cat([ids, at + first], 1)
        values, order = values.topk(K)
        ids = ids.gather(1, order)
    assert values is not None and ids is not None
    acts = torch.where(torch.isin(ids, given.features), values.relu(), 0)
    token, slot = acts.nonzero(as_tuple=True)
    x.index_put_((token,), -acts[token, slot, None] * given.w_dec[ids[token, slot]].double(), accumulate=True)
    return values.relu(), ids, x
