"""sae_topk: exact TopK encode at 77 tokens, 2^15 and 2^17 features, k = 64 (2^19 on a GPU).

    python benchmarks/bench_sae_topk.py [--device cuda] [--csv OUT.csv]

Providers: ours; encode, top-k and ReLU over dense scores, eager and compiled; EleutherAI's sparsify (`pip install
eai-sparsify`), its fused encoder; SAELens (`pip install sae-lens`), its TopK autoencoder, whose dense activations are
reduced to the k values that the others return.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import torch
import torch.nn.functional as F
from sae_naive import TOKENS, WIDTH, Inputs, K, exact, make_inputs
from timing import Run, Setting, compiled, peer, run_benchmark
from torch import Tensor

from expunge.kernels.sae_topk import sae_topk


def naive(given: Inputs) -> Tensor:
    return F.linear(given.x - given.b_pre, given.w_enc, given.b_enc).topk(K).values.relu()


def sparsify(given: Inputs) -> Run:
    """Its fused encoder takes x without the decoder's bias."""
    if given.x.device.type == "cpu":
        os.environ["SPARSIFY_DISABLE_TRITON"] = "1"  # with Triton and no GPU its import would ask for a driver
    from sparsify.fused_encoder import fused_encoder

    return lambda: fused_encoder(given.x - given.b_pre, given.w_enc, given.b_enc, K, "topk").top_acts.relu()


def saelens(given: Inputs) -> Run:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    dtype, device = str(given.x.dtype)[6:], str(given.x.device)
    sae = TopKSAE(TopKSAEConfig(k=K, d_in=WIDTH, d_sae=given.w_enc.shape[0], dtype=dtype, device=device))
    with torch.no_grad():
        sae.W_enc.copy_(given.w_enc.T)
        sae.b_enc.copy_(given.b_enc)
        sae.b_dec.copy_(given.b_pre)
    return lambda: sae.encode(given.x).topk(K).values


def without_gradients(run: Run | str) -> Run | str:
    return run if isinstance(run, str) else torch.no_grad()(run)


def settings(device: torch.device) -> Iterator[Setting]:
    """Half precision on a GPU, float32 elsewhere."""
    gpu = device.type == "cuda"
    dtype = torch.float16 if gpu else torch.float32
    for power in (15, 17, 19) if gpu else (15, 17):
        given = make_inputs(2**power, device, dtype)
        forms: dict[str, Callable[[], Run | str]] = {
            "expunge": lambda given=given: lambda: sae_topk(given.x, given.w_enc, K, **given.biases)[0],
            "naive": lambda given=given: lambda: naive(given),
            "naive compiled": lambda given=given: compiled(lambda: naive(given)),
            "sparsify": lambda given=given: peer("sparsify", lambda: sparsify(given)),
            "SAELens": lambda given=given: peer("sae_lens", lambda: saelens(given)),
        }
        yield Setting(
            f"{TOKENS} x 2^{power} x {WIDTH}, k={K}",
            str(dtype)[6:],
            "forward",
            {name: without_gradients(make()) for name, make in forms.items()},
            expected=exact(given)[0],
            tolerance=2e-3 if gpu else 1e-5,
            least=given.w_enc.nbytes + given.b_enc.nbytes + given.x.nbytes + 12 * TOKENS * K,
        )


if __name__ == "__main__":
    raise SystemExit(run_benchmark("sae_topk", settings))
