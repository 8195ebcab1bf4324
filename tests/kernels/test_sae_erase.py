"""sae_erase against a dense encode, top-k and two decodes in float64; what stays bit-identical; memory; compiling."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.sae_erase import sae_erase
from expunge.kernels.testing.compare import assert_close
from expunge.kernels.testing.recorder import Recorder

Make = Callable[..., Any]


def dense(sae: Any, features: Tensor, k: int, strength: float) -> Tensor:
    """x + decode(edited activations) - decode(activations), in float64."""
    values, ids = sae.scores.topk(k)
    z = torch.zeros_like(sae.scores).scatter_(1, ids, values.relu())
    edited = z.clone()
    edited[:, features] *= strength
    decoder = sae.w_dec.double()
    return sae.x.double() + edited @ decoder - z @ decoder


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("strength", [0.0, -8.0])
def test_what_dense_decoding_gives(make_sae: Make, path: str, dtype: torch.dtype, strength: float) -> None:
    sae = make_sae(11, 90, 24, dtype=dtype)
    features = torch.tensor([80, 3, 55, 7])
    out, report = sae_erase(sae.x, sae.w_enc, sae.w_dec, features, 30, strength=strength, **sae.biases)
    assert out.dtype == dtype and report.certified is None and report.certified_fraction is None
    assert_close("x'", out, dense(sae, features, 30, strength))
    assert report.fired.any() and torch.equal(out[~report.fired], sae.x[~report.fired])
    rows = sae_erase(sae.x, sae.w_enc, sae.w_dec[features], features, 30, strength=strength, **sae.biases)[0]
    assert torch.equal(rows, out)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_nothing_fires_and_the_bits_stay(make_sae: Make, path: str, dtype: torch.dtype) -> None:
    sae = make_sae(6, 90, 24, dtype=dtype)
    features = torch.tensor([80, 3])
    sae.b_enc[features] = -1000.0
    out, report = sae_erase(sae.x, sae.w_enc, sae.w_dec, features, 30, **sae.biases)
    assert not report.fired.any()
    assert torch.equal(out.view(torch.uint8), sae.x.view(torch.uint8))


def test_the_certificate_changes_nothing_but_the_work(make_sae: Make, path: str) -> None:
    sae = make_sae(20, 200, 8)
    features, hot = torch.tensor([150, 3, 77]), torch.arange(10, 120)
    out, report = sae_erase(sae.x, sae.w_enc, sae.w_dec, features, 5, **sae.biases)
    sharp, proved = sae_erase(sae.x, sae.w_enc, sae.w_dec, features, 5, hot=hot, **sae.biases)
    assert torch.equal(out, sharp) and torch.equal(report.acts, proved.acts)
    assert proved.certified is not None and not (proved.certified & report.fired).any()
    assert proved.certified_fraction == proved.certified.float().mean() > 0.5


def test_masked_tokens_keep_their_bits(make_sae: Make, path: str) -> None:
    sae = make_sae(6, 60, 24)
    x = sae.x.view(2, 3, 24).clone()
    features = torch.arange(20)
    mask = torch.ones(2, 3, dtype=torch.bool)
    mask[:, 0] = False
    plain, _ = sae_erase(x, sae.w_enc, sae.w_dec, features, 30)
    for hot in (None, torch.arange(20, 60)):
        out, report = sae_erase(x, sae.w_enc, sae.w_dec, features, 30, token_mask=mask, hot=hot)
        assert torch.equal(out[:, 0], x[:, 0]) and not report.fired[:, 0].any()
        assert torch.equal(out[:, 1:], plain[:, 1:]) and not torch.equal(plain[:, 0], x[:, 0])
    x[0, 0, 0] = torch.nan
    out, _ = sae_erase(x, sae.w_enc, sae.w_dec, features, 30, token_mask=mask)
    assert torch.equal(out[0, 0].isnan(), x[0, 0].isnan())


def test_nothing_of_the_size_tokens_x_dictionary_is_allocated(make_sae: Make) -> None:
    sae = make_sae(77, 16384, 16)
    with Recorder() as record:
        sae_erase(sae.x, sae.w_enc, sae.w_dec, torch.arange(256), 16, **sae.biases)
    assert record.largest < 77 * 16384 / 4


def test_gradients_reach_everything(make_sae: Make, path: str) -> None:
    sae = make_sae(5, 60, 12)
    inputs = [part.requires_grad_() for part in (sae.x, sae.w_enc, sae.w_dec, sae.b_enc, sae.b_pre)]
    out, report = sae_erase(*inputs[:3], torch.arange(0, 60, 3), 30, b_enc=inputs[3], b_pre=inputs[4])
    assert not report.acts.requires_grad
    for grad in torch.autograd.grad(out.square().sum(), inputs):
        assert grad.abs().sum() > 0 and torch.isfinite(grad).all()


def test_compiles_in_one_graph(make_sae: Make) -> None:
    sae = make_sae(7, 600, 8)
    features, hot = torch.arange(50), torch.arange(50, 300)

    def run(x: Tensor) -> tuple[Tensor, Tensor]:
        out, report = sae_erase(x, sae.w_enc, sae.w_dec, features, 20, hot=hot, **sae.biases)
        return out, report.acts

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(sae.x), run(sae.x), strict=True):
        assert torch.equal(got, wanted)


def test_refuses_what_does_not_fit() -> None:
    x, w_enc, w_dec, ids = torch.ones(2, 4), torch.ones(40, 4), torch.ones(40, 4), torch.tensor([1, 2])
    with pytest.raises(InvalidInputError, match="token_mask"):
        sae_erase(x, w_enc, w_dec, ids, 3, token_mask=torch.ones(2))
    with pytest.raises(InvalidInputError, match="token_mask"):
        sae_erase(x, w_enc, w_dec, ids, 3, token_mask=torch.ones(3, dtype=torch.bool))
    with pytest.raises(InvalidInputError, match="w_dec"):
        sae_erase(x, w_enc, w_dec[:5], ids, 3)
    with pytest.raises(InvalidInputError, match="features"):
        sae_erase(x, w_enc, w_dec, torch.tensor([1, 1]), 3)
