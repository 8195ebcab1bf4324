"""Taking 256 features out, `sae_delta`."""

from __future__ import annotations

import torch

from expunge.kernels.gpu.sae_delta import launch_sae_delta_forward
from report.sae_shapes import ERASED, Shape, cases, inputs


def delta(device: torch.device, shape: Shape, dtype: str) -> None:
    x, encoder = inputs(device, shape, dtype)
    amount = torch.randn(shape[0], ERASED, device=device)
    launch_sae_delta_forward(x, amount, encoder.weight, torch.arange(ERASED, device=device))


CASES = cases("sae_delta", delta)
