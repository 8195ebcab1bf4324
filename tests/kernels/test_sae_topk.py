"""sae_topk against a sort of all scores in float64, on both paths: order, ties, shapes, strides, NaN, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.errors import InvalidInputError
from expunge.kernels.sae_encoder import TileStream, make_encoder
from expunge.kernels.sae_topk import sae_topk, sae_topk_reference
from expunge.kernels.testing.compare import assert_close
from expunge.kernels.testing.recorder import Recorder

Make = Callable[..., Any]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 131, 40, 5), (3, 70, 33, 33), (1, 1, 1, 1)], ids=str)
def test_the_k_best_in_order(make_sae: Make, path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sae, k = make_sae(*shape[:3], dtype=dtype), shape[3]
    values, indices = sae_topk(sae.x, sae.w_enc, k, **sae.biases)
    scores = sae.scores
    assert values.dtype == torch.float32 and indices.dtype == torch.int64
    assert_close("values", values, scores.sort(descending=True).values[:, :k].relu())
    assert_close("values are the scores of the ids", values, scores.gather(1, indices).relu())


@given(
    tokens=st.integers(1, 4),
    features=st.integers(1, 90),
    k=st.integers(1, 90),
    seed=st.integers(0, 99),
    triton=st.booleans(),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ties_go_to_the_smaller_id(
    make_sae: Make, monkeypatch: pytest.MonkeyPatch, tokens: int, features: int, k: int, seed: int, triton: bool
) -> None:
    monkeypatch.setenv("EXPUNGE_KERNELS", "triton" if triton else "torch")
    k = min(k, features)
    sae = make_sae(tokens, features, 3, whole=True, seed=seed)
    values, indices = sae_topk(sae.x, sae.w_enc, k, **sae.biases)
    order = sorted
    for token, row in enumerate(sae.scores.tolist()):
        best = order(range(features), key=lambda i, row=row: (-row[i], i))[:k]  # type: ignore[misc]
        assert indices[token].tolist() == best
        assert values[token].tolist() == [max(row[i], 0.0) for i in best]


def test_many_tiles(make_sae: Make) -> None:
    sae = make_sae(37, 9001, 8, whole=True)
    expected = sae_topk_reference(sae.x, sae.w_enc, 40, sae.b_enc, sae.b_pre)
    stream = TileStream(make_encoder("sae_topk", sae.x, sae.w_enc, None, None, None), 37)
    assert len(list(stream.bounds())) > 3
    for got, wanted in zip(sae_topk(sae.x, sae.w_enc, 40, **sae.biases), expected, strict=True):
        assert torch.equal(got, wanted)


def test_many_tokens(make_sae: Make) -> None:
    sae = make_sae(1100, 300, 4, whole=True)
    expected = sae_topk_reference(sae.x, sae.w_enc, 3, sae.b_enc, sae.b_pre)
    assert torch.equal(sae_topk(sae.x, sae.w_enc, 3, **sae.biases)[1], expected[1])


def test_a_list_that_overflows_is_run_again(make_sae: Make, triton_path: None, counts: Any) -> None:
    sae = make_sae(2, 150, 1)
    rising = torch.arange(150.0)[:, None]  # every feature beats all before it
    values, indices = sae_topk(torch.ones(2, 1), rising, 1)
    assert indices.tolist() == [[149], [149]] and values.tolist() == [[149.0], [149.0]]
    if counts is not None:
        assert counts.launches.count("sae_topk_kernel") >= 2
    assert torch.equal(sae_topk(sae.x, sae.w_enc, 1)[1], sae_topk_reference(sae.x, sae.w_enc, 1)[1])


def test_leading_dimensions_and_strides(make_sae: Make, path: str) -> None:
    sae = make_sae(12, 66, 24, whole=True)
    wanted = sae_topk(sae.x, sae.w_enc, 4, **sae.biases)
    shaped = sae_topk(sae.x.view(2, 2, 3, 24), sae.w_enc, 4, **sae.biases)
    assert shaped[0].shape == shaped[1].shape == (2, 2, 3, 4)
    single = sae_topk(sae.x[0], sae.w_enc, 4, **sae.biases)
    turned = sae_topk(sae.x.T.contiguous().T, sae.w_enc.T.contiguous().T, 4, **sae.biases)
    wide = torch.randn(66, 50)
    wide[:, 1:49:2] = sae.w_enc
    stepped = sae_topk(sae.x, wide[:, 1:49:2], 4, **sae.biases)
    for i in range(2):
        assert torch.equal(shaped[i].view(12, 4), wanted[i])
        assert torch.equal(single[i], wanted[i][0])
        assert torch.equal(turned[i], wanted[i]) and torch.equal(stepped[i], wanted[i])


def test_no_tokens(make_sae: Make, path: str) -> None:
    sae = make_sae(5, 40, 8)
    values, indices = sae_topk(sae.x[:0].view(0, 3, 8), sae.w_enc, 2)
    assert values.shape == indices.shape == (0, 3, 2)


def test_zero_rows_have_the_scores_of_the_bias(make_sae: Make, path: str) -> None:
    sae = make_sae(3, 40, 8)
    values, indices = sae_topk(torch.zeros(3, 8), sae.w_enc, 5, b_enc=sae.b_enc)
    assert torch.equal(values, sae.b_enc.topk(5).values.relu().expand(3, 5))
    assert sae_topk(torch.zeros(3, 8), sae.w_enc, 5)[1].tolist() == [list(range(5))] * 3
    assert not indices.equal(torch.arange(5).expand(3, 5))


def test_fewer_positive_scores_than_k(path: str) -> None:
    values, indices = sae_topk(torch.tensor([[1.0]]), torch.tensor([[-1.0], [2.0], [-3.0], [-1.0]]), 3)
    assert values.tolist() == [[2.0, 0.0, 0.0]] and indices.tolist() == [[1, 0, 3]]


def test_nan_counts_as_infinity_and_stays_in_its_token(make_sae: Make, path: str) -> None:
    sae = make_sae(3, 700 if path == "torch" else 100, 8)
    clean = sae_topk(sae.x, sae.w_enc, 4)
    sae.x[1, 2] = torch.nan
    values, indices = sae_topk(sae.x, sae.w_enc, 4)
    assert values[1].isinf().all() and indices[1].tolist() == [0, 1, 2, 3]
    assert torch.equal(values[::2], clean[0][::2]) and torch.equal(indices[::2], clean[1][::2])
    sae.w_enc[-3, 0] = torch.nan
    assert (sae_topk(sae.x[:1], sae.w_enc, 4)[1][0, 0]) == sae.w_enc.shape[0] - 3


def test_the_encode_dtype_is_the_weights(make_sae: Make, path: str) -> None:
    sae = make_sae(9, 60, 16)
    wanted = sae_topk(sae.x.half().float(), sae.w_enc, 4)
    with torch.autocast("cpu", torch.bfloat16):
        got = sae_topk(sae.x.half(), sae.w_enc, 4)
    assert torch.equal(got[0], wanted[0]) and torch.equal(got[1], wanted[1])
    named = sae_topk(sae.x, sae.w_enc, 4, encode_dtype=torch.float16)
    stored = sae_topk(sae.x, sae.w_enc.half(), 4)
    assert torch.equal(named[0], stored[0]) and not torch.equal(named[0], sae_topk(sae.x, sae.w_enc, 4)[0])


def test_gradients_are_those_of_the_reference(make_sae: Make, path: str) -> None:
    sae = make_sae(6, 50, 12)
    inputs = [part.requires_grad_() for part in (sae.x, sae.w_enc, sae.b_enc, sae.b_pre)]
    weights = torch.randn(6, 40)  # k = 40 of 50: some of the values are zeroed by ReLU
    got = torch.autograd.grad((sae_topk(sae.x, sae.w_enc, 40, **sae.biases)[0] * weights).sum(), inputs)
    double = [part.detach().double().requires_grad_() for part in inputs]
    values = sae_topk_reference(double[0], double[1], 40, double[2], double[3])[0]
    wanted = torch.autograd.grad((values * weights).sum(), double)
    for name, mine, theirs in zip(("x", "w_enc", "b_enc", "b_pre"), got, wanted, strict=True):
        assert_close(name, mine, theirs)


def test_gradcheck(make_sae: Make) -> None:
    sae = make_sae(4, 20, 5, dtype=torch.float64)
    inputs = [part.requires_grad_() for part in (sae.x, sae.w_enc, sae.b_enc, sae.b_pre)]
    torch.autograd.gradcheck(lambda x, w, b, p: sae_topk(x, w, 3, b_enc=b, b_pre=p)[0], inputs)


def test_only_what_needs_a_gradient_gets_one(make_sae: Make) -> None:
    sae = make_sae(4, 20, 5)
    sae.x.requires_grad_()
    sae_topk(sae.x, sae.w_enc, 3)[0].sum().backward()
    assert sae.x.grad is not None and sae.w_enc.grad is None


def test_nothing_of_the_size_tokens_x_dictionary_is_allocated(make_sae: Make) -> None:
    sae = make_sae(77, 16384, 16)
    with Recorder() as record:
        sae_topk(sae.x, sae.w_enc, 16, **sae.biases)
    assert record.largest < 77 * 16384 / 4


def test_the_op_passes_opcheck(make_sae: Make, path: str) -> None:
    sae = make_sae(4, 40, 8)
    x, w = sae.x.requires_grad_(), sae.w_enc.requires_grad_()
    torch.library.opcheck(torch.ops.expunge.sae_topk.default, (x, w, sae.b_enc, None, 3, torch.float32))


def test_compiles_in_one_graph(make_sae: Make) -> None:
    sae = make_sae(5, 600, 8)
    call = torch.compile(lambda x, w: sae_topk(x, w, 3, **sae.biases), fullgraph=True, backend="aot_eager")
    for got, wanted in zip(call(sae.x, sae.w_enc), sae_topk(sae.x, sae.w_enc, 3, **sae.biases), strict=True):
        assert torch.equal(got, wanted)


BAD: dict[str, dict[str, Any]] = {
    "width": {"x": torch.ones(2, 5)},
    "vector weight": {"w_enc": torch.ones(4)},
    "k of zero": {"k": 0},
    "k above the dictionary": {"k": 41},
    "bias": {"b_enc": torch.ones(4)},
    "pre-bias": {"b_pre": torch.ones(9)},
    "integers": {"x": torch.ones(2, 4, dtype=torch.int64)},
    "encode dtype": {"encode_dtype": torch.int8},
    "device": {"w_enc": torch.ones(40, 4, device="meta")},
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_does_not_fit(name: str) -> None:
    arguments = {"x": torch.ones(2, 4), "w_enc": torch.ones(40, 4), "k": 3} | BAD[name]
    with pytest.raises(InvalidInputError, match="sae_topk"):
        sae_topk(**arguments)
