"""Scores of the erased features alone, which `sae_rank_count` begins with."""

from __future__ import annotations

import torch

from expunge.kernels.gpu.sae_scores import launch_scores
from report.sae_shapes import ERASED, Shape, cases, inputs


def scores(device: torch.device, shape: Shape, dtype: str) -> None:
    x, encoder = inputs(device, shape, dtype)
    launch_scores(x, encoder, torch.arange(ERASED, device=device), ERASED)


CASES = cases("sae_encoder", scores)
