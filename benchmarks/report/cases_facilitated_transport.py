"""Gates of 1, 10 and 100 SPMs at Stable Diffusion 1.5's (CLIP-L) and SDXL's text states."""

from __future__ import annotations

from functools import partial

import torch

from expunge.kernels.gpu.facilitated_transport import launch_facilitated_transport
from report.case import Case

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
STATES = {"SD 1.5": (77, 768), "SDXL": (77, 2048)}


def gates(device: torch.device, states: tuple[int, int], dtype: str, rows: int, k: int, n: int) -> None:
    length, width = states
    x = torch.randn(rows, k * length, width, device=device).to(DTYPES[dtype])
    concepts, owner = torch.randn(n, length, width, device=device), torch.arange(n, device=device)
    sets = (torch.arange(rows * 77, device=device).view(rows, 77), torch.arange(n * 4, device=device).view(n, 4), owner)
    threshold = torch.full((n,), 0.5, device=device)
    launch_facilitated_transport(x, concepts, owner, threshold, *sets)


def least(states: tuple[int, int], dtype: str, rows: int, k: int, n: int) -> int:
    """States and concepts read once, token ids, owners and thresholds read once, three outputs written once."""
    width = states[0] * states[1]
    ids = 8 * (77 * rows + 4 * n + n)
    return rows * k * width * DTYPES[dtype].itemsize + 4 * n * width + 12 * n + ids + 12 * rows * n


def case(model: str, dtype: str, rows: int, k: int, n: int, *, pinned: bool = False) -> Case:
    given = {"states": STATES[model], "dtype": dtype, "rows": rows, "k": k, "n": n}
    return Case(
        "facilitated_transport",
        f"{model}, {rows} rows of {k} x {STATES[model][0]}, N={n}, {dtype}",
        partial(gates, **given),
        least=least(**given),
        flops=2 * rows * k * n * STATES[model][0] * STATES[model][1],
        dot_bits=32,
        streams=("x_ptr", "c_ptr"),
        pinned=pinned,
        counted=(model, dtype) == ("SD 1.5", "fp16") and n <= 10,
    )


CASES = [
    case(model, dtype, rows, 1, n, pinned=(model, rows, n) == ("SD 1.5", 2, 10))
    for model in STATES
    for dtype in DTYPES
    for rows in (2, 8)
    for n in (1, 10, 100)
] + [case("SD 1.5", "fp16", 2, 3, 10, pinned=True)]
