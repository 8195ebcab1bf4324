"""Launches of masked_mse: hidden states of Janus-Pro and of small language models."""

from __future__ import annotations

from functools import partial

import torch

from expunge.kernels.gpu.loss_gate import launch_scale_rows
from expunge.kernels.gpu.masked_mse import launch_masked_mse
from report.case import Case

# name, batch, tokens, width, dtype, granularity, window, pinned; tokens first, so that a window holds all of the batch
Shape = tuple[str, int, int, int, torch.dtype, str, int, bool]
SHAPES: tuple[Shape, ...] = (
    ("Janus-Pro 7B, 1 prompt, bf16, one window of 48", 2, 48, 4096, torch.bfloat16, "window", 96, False),
    ("Janus-Pro 7B, 1 prompt, bf16, windows of 48", 2, 576, 4096, torch.bfloat16, "window", 96, True),
    ("Janus-Pro 7B, 8 prompts, bf16, tokens", 16, 576, 4096, torch.bfloat16, "token", 1, False),
    ("Janus-Pro 1B, 1 prompt, fp16, windows of 12", 2, 576, 2048, torch.float16, "window", 24, False),
    ("Janus-Pro 1B, 1 prompt, fp32, elements", 2, 576, 2048, torch.float32, "element", 1, True),
    ("SmolLM 135M, 4096 tokens, bf16, tokens", 8, 512, 576, torch.bfloat16, "token", 1, True),
)


def launch(shape: Shape, device: torch.device) -> object:
    """Loss, residual and the gradient made of it; states [tokens, batch, D] are a view of [batch, tokens, D]."""
    _, batch, tokens, width, dtype, granularity, window, _ = shape
    s, t, p, n = (torch.empty(batch, tokens, width, dtype=dtype, device=device).transpose(0, 1) for _ in range(4))
    threshold, upstream = torch.empty((), device=device), torch.empty((), device=device)
    element = granularity == "element"
    *_, residual, factor = launch_masked_mse(s, t, p, n, threshold, 1.0, window, True, element, grad=True)
    return launch_scale_rows(residual, factor, upstream, dtype)


def case(shape: Shape) -> Case:
    """Four reads and one write forward, one read and one write backward."""
    name, batch, tokens, width, dtype, _, _, pinned = shape
    return Case(
        "masked_mse",
        name,
        partial(launch, shape),
        7 * batch * tokens * width * dtype.itemsize,
        streams=("s", "t", "p", "n", "residual", "x", "y"),
        pinned=pinned,
        counted=tokens == 48,
    )


CASES = [case(shape) for shape in SHAPES]
