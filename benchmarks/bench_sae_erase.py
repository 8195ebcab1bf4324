"""SAE erasing: rank count and delta together, and each alone, at 77 tokens and 2^17 features (2^19 on a GPU).

    python benchmarks/bench_sae_erase.py [--device cuda] [--csv OUT.csv]

Modes: "erase", `sae_erase` against two dense decodes; "rank count", `sae_rank_count` against dense scores, top-k and a
look-up of the erased features; "delta", `sae_delta` against the decode of a dense [tokens, dictionary] tensor.
SAELens (`pip install sae-lens`) is a peer of "erase": its TopK autoencoder encodes, the erased features are zeroed, and
it decodes twice, which keeps the reconstruction's error as its own hooks do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from bench_sae_topk import without_gradients
from sae_naive import TOKENS, WIDTH, Inputs, K, exact, make_inputs, naive_codes, naive_difference
from timing import Run, Setting, compiled, peer, run_benchmark

from expunge.kernels.sae_delta import sae_delta
from expunge.kernels.sae_erase import sae_erase
from expunge.kernels.sae_rank_count import sae_rank_count


def saelens(given: Inputs) -> Run:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    dtype, device = str(given.x.dtype)[6:], str(given.x.device)
    sae = TopKSAE(TopKSAEConfig(k=K, d_in=WIDTH, d_sae=given.w_enc.shape[0], dtype=dtype, device=device))
    with torch.no_grad():
        for parameter, value in (
            (sae.W_enc, given.w_enc.T),
            (sae.b_enc, given.b_enc),
            (sae.b_dec, given.b_pre),
            (sae.W_dec, given.w_dec),
        ):
            parameter.copy_(value)

    def run() -> torch.Tensor:
        z = sae.encode(given.x)
        error = given.x - sae.decode(z)
        z[:, given.features] = 0
        return sae.decode(z) + error

    return run


def modes(given: Inputs) -> Mapping[str, tuple[Mapping[str, Run | str], torch.Tensor, int]]:
    """Providers, the exact result, and the bytes that must move, of each mode."""
    values, ids, out = exact(given)
    acts = torch.zeros(TOKENS, given.w_enc.shape[0], device=given.x.device).scatter_(1, ids, values.float())
    chosen = acts[:, given.features].contiguous()
    codes = torch.zeros_like(acts).index_copy_(1, given.features, chosen).to(given.x.dtype)
    encoder = given.w_enc.nbytes + given.b_enc.nbytes + given.x.nbytes
    fired = int((chosen != 0).any(0).sum()) * WIDTH * given.w_dec.element_size()
    erase: dict[str, Run | str] = {
        "expunge": lambda: sae_erase(given.x, given.w_enc, given.w_dec, given.features, K, **given.biases)[0],
        "naive": lambda: naive_difference(given),
        "naive compiled": compiled(lambda: naive_difference(given)),
        "SAELens": peer("sae_lens", lambda: saelens(given)),
    }
    rank: dict[str, Run | str] = {
        "expunge": lambda: sae_rank_count(given.x, given.w_enc, given.features, K, **given.biases)[0],
        "naive": lambda: naive_codes(given)[:, given.features],
    }
    delta: dict[str, Run | str] = {
        "expunge": lambda: sae_delta(given.x, chosen, given.w_dec, features=given.features),
        "naive": lambda: given.x - codes @ given.w_dec,
    }
    return {
        "erase": (erase, out, encoder + given.x.nbytes + fired),
        "rank count": (rank, chosen.double(), encoder + chosen.nbytes),
        "delta": (delta, out, 2 * given.x.nbytes + chosen.nbytes + fired),
    }


def settings(device: torch.device) -> Iterator[Setting]:
    """Half precision on a GPU, float32 elsewhere."""
    gpu = device.type == "cuda"
    dtype = torch.float16 if gpu else torch.float32
    for power in (17, 19) if gpu else (17,):
        given = make_inputs(2**power, device, dtype)
        for mode, (providers, expected, least) in modes(given).items():
            yield Setting(
                f"{TOKENS} x 2^{power} x {WIDTH}, k={K}",
                str(dtype)[6:],
                mode,
                {name: without_gradients(run) for name, run in providers.items()},
                expected=expected,
                tolerance=4e-3 if gpu else 1e-5,
                least=least,
            )


if __name__ == "__main__":
    raise SystemExit(run_benchmark("sae_erase", settings))
