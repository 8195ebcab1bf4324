"""Bars of facilitated_transport: launches and bytes, counted in Triton's interpreter."""

from __future__ import annotations

import torch
from bars import Bar

from expunge.kernels.facilitated_transport import TokenIds, padded_ids


def rows() -> list[Bar]:
    """Two launches whatever the number of SPMs, and unique bytes over the least at Stable Diffusion 1.5's states."""
    from expunge.kernels.gpu.facilitated_transport import launch_facilitated_transport
    from expunge.kernels.testing.guard import guard

    launches, ratios = [], []
    for n in (1, 10):
        states, concepts = torch.randn(2, 77, 768).half(), torch.randn(n, 77, 768)
        owner, threshold = torch.arange(n), torch.full((n,), 0.5)
        tokens = TokenIds(padded_ids([range(20)] * 2), padded_ids([{spm, spm + 1} for spm in range(n)]), owner)
        with guard() as counts:
            out = launch_facilitated_transport(states, concepts, owner, threshold, *tokens)
        least = sum(one.nbytes for one in (states, concepts, owner, threshold, *tokens, out))
        launches.append(len(counts.launches))
        ratios.append(counts.unique / least)
    shape = "counted; 2 rows of 77 x 768 fp16, N = 1 and 10"
    bytes_found = " and ".join(f"{ratio:.3f}" for ratio in ratios)
    return [
        Bar(
            "facilitated_transport: launches, any N",
            "2",
            f"{launches[0]} and {launches[1]} ({shape})",
            set(launches) == {2},
        ),
        Bar(
            "facilitated_transport: unique bytes over the least",
            "<= 1.02",
            f"{bytes_found} ({shape})",
            max(ratios) <= 1.02,
            {"ratios": ratios},
        ),
    ]
