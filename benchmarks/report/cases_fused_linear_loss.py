"""Launches of fused_linear_loss: heads of language models and Janus-Pro's image head."""

from __future__ import annotations

from functools import partial

import torch

from expunge.kernels.fused_linear_chunks import Problem, Wanted
from expunge.kernels.gpu.fused_linear_loss import launch_fused_linear_loss
from report.case import Case

# name, rows, words, width, dtype, what the loss is, whether the head trains, pinned
Shape = tuple[str, int, int, int, torch.dtype, str, bool, bool]
SHAPES: tuple[Shape, ...] = (
    ("SmolLM 135M, 4096 tokens, bf16, weighted CE, head trains", 4096, 49152, 576, torch.bfloat16, "CE", True, True),
    ("SmolLM 135M, 4096 tokens, fp16, weighted CE, head trains", 4096, 49152, 576, torch.float16, "CE", True, False),
    ("SmolLM 135M, 4096 tokens, fp32, weighted CE, head trains", 4096, 49152, 576, torch.float32, "CE", True, True),
    ("Llama 3.2 1B, 4096 tokens, bf16, weighted CE", 4096, 128256, 2048, torch.bfloat16, "CE", False, False),
    ("Janus-Pro 7B, 16 prompts, bf16, gated KL", 9216, 16384, 4096, torch.bfloat16, "KL", False, True),
    ("Janus-Pro 7B, 1 prompt, bf16, gated KL", 1152, 16384, 4096, torch.bfloat16, "KL", False, False),
    ("Janus-Pro 1B, 16 prompts, fp16, gated KL", 9216, 16384, 2048, torch.float16, "KL", False, False),
    ("Janus-Pro 1B, 1 prompt, fp32, gated KL", 1152, 16384, 2048, torch.float32, "KL", False, True),
)


def launch(shape: Shape, device: torch.device) -> object:
    """Loss and gradients."""
    _, rows, words, width, dtype, kind, trains, _ = shape
    states = torch.empty(rows, width, dtype=dtype, device=device)
    weight = torch.empty(words, width, dtype=dtype, device=device)
    bias = torch.empty(words, dtype=dtype, device=device) if kind == "KL" else None
    labels = valid = weights = teacher = None
    if kind == "CE":
        labels = torch.empty(rows, dtype=torch.int64, device=device)
        valid = torch.empty(rows, dtype=torch.bool, device=device)
        weights = torch.empty(rows, device=device)
    else:
        teacher = torch.empty(rows, width, device=device)
    threshold = torch.empty((), device=device)
    window = 1 if kind == "CE" else 48
    problem = Problem(states, weight, bias, labels, valid, teacher, weights, threshold, window, True)
    return launch_fused_linear_loss(problem, Wanted(True, trains, False), None)


def case(shape: Shape) -> Case:
    """States, head and teacher read once, gradients written once; logits are made twice, and multiplied with once or
    twice more: once for the states, once for a head that trains."""
    name, rows, words, width, dtype, kind, trains, pinned = shape
    size = dtype.itemsize
    least = 2 * rows * width * size + words * width * size + (rows * width * 4 if kind == "KL" else 8 * rows)
    least += words * width * 4 * trains
    products = 2 * (1 if kind == "CE" else 2 if size == 4 else 3) + 1 + trains
    streams = ("s", "w", "dz", "ds", *["dw"] * trains, *["t"] * (kind == "KL"), *["low"] * (kind == "KL" and size == 2))
    return Case(
        "fused_linear_loss",
        name,
        partial(launch, shape),
        least,
        flops=2 * rows * words * width * products,
        dot_bits=8 * size,
        streams=streams,
        pinned=pinned,
    )


CASES = [case(shape) for shape in SHAPES]
