"""Shapes of the SAE cases: widths of CLIP-L and 1024, one and 8 prompts of 77 tokens, 2^17 and 2^19 features, k = 64.

Width 770 stands for rows that do not begin at a multiple of 16 bytes: smaller tiles, and single loads.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from expunge.kernels.sae_encoder import Encoder
from report.case import Case

ERASED = 256
K = 64
START = 32768  # of the last range of sae_topk
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
SHAPES = ((77, 2**19, 768), (616, 2**17, 1024), (7, 2**17, 768), (77, 2**17, 770))

Shape = tuple[int, int, int]


def inputs(device: torch.device, shape: Shape, dtype: str) -> tuple[torch.Tensor, Encoder]:
    tokens, features, width = shape
    weight = torch.randn(features, width, device=device, dtype=DTYPES[dtype])
    bias = torch.randn(features, device=device, dtype=DTYPES[dtype])
    x = torch.randn(tokens, width, device=device, dtype=DTYPES[dtype])
    return x, Encoder(weight, bias, None, DTYPES[dtype])


def bytes_of(op: str, shape: Shape, dtype: str) -> int:
    """What must move: encoder, bias and tokens once; candidates, their counts, newcomers or amounts once."""
    tokens, features, width = shape
    item = DTYPES[dtype].itemsize
    row = item * (width + 1)
    return {
        "sae_encoder": ERASED * (row + 8) + tokens * (item * width + 4 * ERASED),
        "sae_rank_count": features * row + tokens * (item * width + 12 * K + 4),
        "sae_topk": (features - START) * row + tokens * (item * width + 8 * 16 * K + 16),
        "sae_delta": tokens * (2 * item * width + 4 * ERASED) + ERASED * (item * width + 8),
    }[op]


def flops_of(op: str, shape: Shape) -> int:
    tokens, features, width = shape
    rows = {"sae_encoder": ERASED, "sae_rank_count": features, "sae_topk": features - START, "sae_delta": 0}[op]
    return 2 * tokens * width * rows


def case(op: str, launch: Callable[[torch.device, Shape, str], None], shape: Shape, dtype: str) -> Case:
    tokens, features, width = shape
    aligned = width * DTYPES[dtype].itemsize % 16 == 0
    streams = ("x_ptr", "w_ptr", *(("out_ptr",) if op == "sae_delta" else ()))
    return Case(
        op,
        f"{tokens} x 2^{features.bit_length() - 1} x {width}, {dtype}",
        partial(launch, shape=shape, dtype=dtype),
        least=bytes_of(op, shape, dtype),
        flops=flops_of(op, shape),
        dot_bits=8 * DTYPES[dtype].itemsize,
        streams=streams if aligned else (),
        pinned=shape == SHAPES[0] and (dtype == "fp16" or (op in ("sae_rank_count", "sae_delta") and dtype == "fp32")),
    )


def cases(op: str, launch: Callable[[torch.device, Shape, str], None]) -> list[Case]:
    """The op's launch at every shape and dtype."""
    return [case(op, launch, shape, dtype) for dtype in DTYPES for shape in SHAPES]
