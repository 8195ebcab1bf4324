"""The pass over the encoder of `sae_rank_count`."""

from __future__ import annotations

import torch

from expunge.kernels.gpu.sae_rank_count import launch_rank_count
from report.sae_shapes import K, Shape, cases, inputs


def rank_count(device: torch.device, shape: Shape, dtype: str) -> None:
    x, encoder = inputs(device, shape, dtype)
    values = torch.randn(K, shape[0], device=device)
    ids = torch.empty_like(values, dtype=torch.int32)
    launch_rank_count(x, encoder, values, ids, torch.empty(shape[0], dtype=torch.int32, device=device))


CASES = cases("sae_rank_count", rank_count)
