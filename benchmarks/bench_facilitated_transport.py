"""facilitated_transport: gates of N SPMs from text states and token ids, against a loop over concepts.

python benchmarks/bench_facilitated_transport.py [--device cuda] [--csv OUT.csv] [--seconds 4]
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from timing import Setting, compiled, run_benchmark
from torch import Tensor

from expunge.kernels.facilitated_transport import TokenIds, facilitated_transport

TOKENS, CONCEPT_TOKENS = 16, 3  # distinct tokens of a prompt and of a concept


def naive(states: Tensor, concepts: Tensor, threshold: Tensor, tokens: TokenIds) -> tuple[Tensor, Tensor]:
    """One concept at a time, as a reader of the paper would write it: (gates, scores)."""
    rows, scores = states.flatten(1).to(concepts.dtype), []
    for concept, ids in zip(concepts, tokens.concepts, strict=True):
        cosine = torch.cosine_similarity(rows, concept.flatten()[None], dim=1)
        share = (tokens.prompts[:, :, None] == ids).any(1).to(concepts.dtype).mean(1)
        scores.append(torch.maximum(cosine, share))
    joined = torch.stack(scores, 1).clamp(0.0, 1.0)
    return torch.where(joined >= threshold, joined, 0.0), joined


def inputs(device: torch.device, dtype: torch.dtype, shape: tuple[int, int], rows: int, n: int) -> tuple[Tensor, ...]:
    """States, concepts, thresholds, prompts' and concepts' token ids; some prompts name some concepts."""
    shared = torch.randn(shape)
    states = (torch.randn(rows, *shape) + shared).to(device, dtype)
    concepts = (torch.randn(n, *shape) + shared).to(device)
    ids = torch.arange(1, n * CONCEPT_TOKENS + 1).view(n, CONCEPT_TOKENS)
    prompts = torch.arange(rows * TOKENS).view(rows, TOKENS)
    threshold = torch.full((n,), 0.9, device=device)
    return states, concepts, threshold, prompts.to(device), ids.to(device)


def settings(device: torch.device) -> Iterator[Setting]:
    """SD 1.5 and SDXL, 2 and 8 rows, 1 to 100 SPMs; half precision only where it is stored, the sums are float32."""
    dtypes = (torch.float16, torch.bfloat16, torch.float32) if device.type == "cuda" else (torch.float32,)
    for model, shape in (("SD 1.5", (77, 768)), ("SDXL", (77, 2048))):
        for dtype in dtypes:
            for rows, n in ((2, 1), (2, 10), (2, 100), (8, 100)):
                states, concepts, threshold, prompts, ids = inputs(device, dtype, shape, rows, n)
                owner = torch.arange(n, device=device)
                tokens = TokenIds(prompts, ids, owner)
                expected = naive(states.double(), concepts.double(), threshold, tokens)

                def ours(
                    given: tuple[Tensor, ...] = (states, concepts, owner, threshold), tokens: TokenIds = tokens
                ) -> tuple[Tensor, Tensor]:
                    gates, scores, _ = facilitated_transport(*given, tokens)
                    return gates, scores

                def loop(
                    given: tuple[Tensor, ...] = (states, concepts, threshold), tokens: TokenIds = tokens
                ) -> tuple[Tensor, Tensor]:
                    return naive(*given, tokens)

                too_long = "the compiler unrolls the loop over its 100 concepts"
                providers = {"expunge": ours, "naive": loop, "naive compiled": compiled(loop) if n < 100 else too_long}
                least = states.nbytes + concepts.nbytes + prompts.nbytes + ids.nbytes + 8 * rows * n
                name = f"{model}, {rows} rows, N={n}"
                yield Setting(name, str(dtype)[6:], "forward", providers, expected, 1e-5, least)


if __name__ == "__main__":
    raise SystemExit(run_benchmark("facilitated_transport", settings))
