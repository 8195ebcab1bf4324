"""The last and longest range of `sae_topk`."""

from __future__ import annotations

import torch

from expunge.kernels.gpu.sae_topk import launch_range
from report.sae_shapes import START, K, Shape, cases, inputs


def topk(device: torch.device, shape: Shape, dtype: str) -> None:
    x, encoder = inputs(device, shape, dtype)
    best = torch.empty(shape[0], K, dtype=torch.int64, device=device)
    launch_range(x, encoder, best, START, shape[1], 32 * K)


CASES = cases("sae_topk", topk)
