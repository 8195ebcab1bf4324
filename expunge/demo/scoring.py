"""Pictures from a pipeline at given seeds, and shares with confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

STEPS, GUIDANCE = 20, 3.0


def generate(
    pipe: Any,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = STEPS,
    guidance_scale: float = GUIDANCE,
    batch_size: int = 16,
    on_batch: Callable[[int], None] | None = None,
    **kwargs: Any,
) -> Tensor:
    """One picture a prompt, each from its own seed, so that a picture does not depend on its batch.

    Returns:
        float32 [len(prompts), 3, 32, 32] in 0..1, on the CPU.
    """
    shown = pipe.__dict__.get("_progress_bar_config")
    pipe.set_progress_bar_config(disable=True)
    pictures = []
    try:
        for start in range(0, len(prompts), batch_size):
            chunk = list(prompts[start : start + batch_size])
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[start : start + batch_size]]
            result = pipe(
                chunk,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                generator=generators,
                output_type="pt",
                **kwargs,
            )
            pictures.append(result.images.float().cpu())
            if on_batch is not None:
                on_batch(len(chunk))
    finally:
        pipe.set_progress_bar_config(**(shown or {}))
    return torch.cat(pictures)


@dataclass(frozen=True)
class Share:
    """A share of `n` pictures with its 95 % Wilson interval."""

    hits: int
    n: int

    @property
    def value(self) -> float:
        return self.hits / max(self.n, 1)

    @property
    def interval(self) -> tuple[float, float]:
        """Wilson's score interval at 95 %."""
        if self.n == 0:
            return 0.0, 1.0
        z, p, n = 1.959964, self.value, self.n
        middle = (p + z * z / (2 * n)) / (1 + z * z / n)
        half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
        return max(0.0, middle - half), min(1.0, middle + half)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{100 * self.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}] (n={self.n})"
