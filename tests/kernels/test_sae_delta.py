"""sae_delta against the formula in float64, on both paths: bits that stay, rows that are read, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.sae_delta import sae_delta, sae_delta_reference
from expunge.kernels.testing.compare import assert_close

Make = Callable[..., Any]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


def acts_of(tokens: int, m: int, share: float = 0.3) -> Tensor:
    return torch.where(torch.rand(tokens, m) < share, torch.rand(tokens, m) + 0.5, 0)


def bits(x: Tensor) -> Tensor:
    return x.view({2: torch.int16, 4: torch.int32}[x.element_size()])


def wanted(x: Tensor, acts: Tensor, rows: Tensor, strength: float | Tensor) -> Tensor:
    out = x.double().clone()
    factor = 1 - torch.as_tensor(strength).double().expand(acts.shape[1])
    for token, feature in acts.nonzero().tolist():
        out[token] -= factor[feature] * acts[token, feature].double() * rows[feature].double()
    return out


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(4, 13, 70), (1, 1, 1), (3, 33, 32)], ids=str)
def test_takes_active_features_out(path: str, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
    tokens, m, d = shape
    x, rows, acts = torch.randn(tokens, d).to(dtype), torch.randn(m, d).to(dtype), acts_of(tokens, m, 0.5)
    strengths: list[float | Tensor] = [0.0, -2.0, torch.rand(m)]
    for strength in strengths:
        out = sae_delta(x, acts, rows, strength=strength)
        assert out.dtype == dtype
        assert_close("x'", out, wanted(x, acts, rows, strength))
    whole = torch.randn(2 * m, d).to(dtype)
    ids = torch.randperm(2 * m)[:m]
    assert_close("of a whole decoder", sae_delta(x, acts, whole, features=ids), wanted(x, acts, whole[ids], 0.0))
    assert_close("reference", sae_delta_reference(x, acts, whole, ids), wanted(x, acts, whole[ids], 0.0))


@pytest.mark.parametrize("dtype", DTYPES)
def test_where_nothing_fires_the_bits_stay(path: str, dtype: torch.dtype) -> None:
    special = torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-8, 65504.0, 1.0]).to(dtype)
    x = torch.cat([special.expand(3, 8), torch.randn(3, 8).to(dtype)])
    bits(x)[0, 2] ^= 5  # NaNs of another payload
    acts = torch.zeros(6, 4)
    rows = torch.full((4, 8), torch.nan, dtype=dtype)  # were one read, it would show
    assert torch.equal(bits(sae_delta(x, acts, rows)), bits(x))
    acts[4, 2] = 1.0
    rows[2] = 1.0
    out = sae_delta(x, acts, rows)
    rest = [0, 1, 2, 3, 5]
    assert torch.equal(bits(out)[rest], bits(x)[rest])
    assert_close("the token that fires", out[4], x[4].double() - 1)
    assert torch.equal(bits(sae_delta(x, acts, rows, strength=1.0)), bits(x))
    assert sae_delta(x, torch.zeros(6, 4), rows).data_ptr() != x.data_ptr()


@given(
    tokens=st.integers(1, 5),
    m=st.integers(0, 12),
    d=st.integers(1, 40),
    share=st.sampled_from([0.0, 0.1, 1.0]),
    triton=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whole_numbers_come_out_exactly(
    monkeypatch: pytest.MonkeyPatch, tokens: int, m: int, d: int, share: float, triton: bool, seed: int
) -> None:
    monkeypatch.setenv("EXPUNGE_KERNELS", "triton" if triton else "torch")
    torch.manual_seed(seed)
    x, rows = torch.randint(-9, 9, (tokens, d)).float(), torch.randint(-9, 9, (m, d)).float()
    acts = (4 * acts_of(tokens, m, share)).round()
    assert torch.equal(sae_delta(x, acts, rows).double(), wanted(x, acts, rows, 0.0))


def test_reads_only_the_rows_that_fire(triton_path: None, counts: Any) -> None:
    x, rows, acts = torch.randn(5, 32), torch.randn(40, 32), torch.zeros(5, 40)
    acts[3, 7] = acts[1, 30] = 1.0
    sae_delta(x, acts, rows)
    if counts is not None:
        assert counts.read_asked == x.nbytes + acts.nbytes + 2 * 32 * 4
        assert counts.written_asked == x.nbytes


def test_leading_dimensions_and_strides(path: str) -> None:
    x, rows, acts = torch.randn(12, 34), torch.randn(5, 34), acts_of(12, 5)
    expected = sae_delta(x, acts, rows)
    assert torch.equal(sae_delta(x.view(2, 6, 34), acts.view(2, 6, 5), rows).view(12, 34), expected)
    assert torch.equal(sae_delta(x.T.contiguous().T, acts.T.contiguous().T, rows.T.contiguous().T), expected)
    assert_close("one token", sae_delta(x[0], acts[0], rows), expected[0].double())
    assert sae_delta(x[:0], acts[:0], rows).shape == (0, 34)


def test_nan_activations_show(path: str) -> None:
    acts = torch.tensor([[torch.nan], [0.0]])
    out = sae_delta(torch.ones(2, 3), acts, torch.ones(1, 3))
    assert out[0].isnan().all() and (out[1] == 1).all()


def test_autocast_changes_nothing(path: str) -> None:
    x, rows, acts = torch.randn(4, 32), torch.randn(5, 32), acts_of(4, 5)
    expected = sae_delta(x, acts, rows)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(sae_delta(x, acts, rows), expected)


@pytest.mark.parametrize("whole", [False, True])
def test_gradients_are_those_of_the_reference(path: str, whole: bool) -> None:
    x, rows, acts = torch.randn(6, 12), torch.randn(9, 12), acts_of(6, 5)
    ids = torch.tensor([8, 0, 3, 4, 6]) if whole else None
    rows = rows if whole else rows[:5]
    strength, weights = torch.rand(5), torch.randn(6, 12)
    inputs = [part.requires_grad_() for part in (x, acts, rows, strength)]
    out = sae_delta(x, acts, rows, features=ids, strength=strength)
    got = torch.autograd.grad((out * weights).sum(), inputs)
    double = [part.detach().double().requires_grad_() for part in inputs]
    chosen = double[2] if ids is None else double[2][ids]
    exact = double[0] - ((1 - double[3]) * double[1]) @ chosen
    expected = torch.autograd.grad((exact * weights).sum(), double)
    for name, mine, theirs in zip(("x", "acts", "w_dec", "strength"), got, expected, strict=True):
        assert_close(name, mine, theirs)


def test_gradcheck() -> None:
    inputs = [torch.randn(3, 4), acts_of(3, 2), torch.randn(6, 4), torch.rand(2)]
    double = [part.double().requires_grad_() for part in inputs]
    ids = torch.tensor([4, 1])
    torch.autograd.gradcheck(lambda x, a, w, s: sae_delta(x, a, w, features=ids, strength=s), double)


def test_the_op_passes_opcheck(path: str) -> None:
    x, rows, acts = torch.randn(6, 12), torch.randn(9, 12), acts_of(6, 5)
    arguments = (x.requires_grad_(), acts.requires_grad_(), rows.requires_grad_(), torch.arange(5))
    torch.library.opcheck(torch.ops.expunge.sae_delta.default, arguments)


def test_compiles_in_one_graph() -> None:
    x, rows, acts = torch.randn(6, 12), torch.randn(5, 12), acts_of(6, 5)
    call = torch.compile(lambda *tensors: sae_delta(*tensors, strength=0.5), fullgraph=True, backend="aot_eager")
    assert torch.equal(call(x, acts, rows), sae_delta(x, acts, rows, strength=0.5))


BAD: dict[str, dict[str, Any]] = {
    "width": {"w_dec": torch.ones(3, 5)},
    "count": {"w_dec": torch.ones(4, 4)},
    "tokens": {"acts": torch.ones(3, 3)},
    "ids": {"features": torch.tensor([0, 1])},
    "ids beyond": {"features": torch.tensor([0, 1, 3])},
    "strength": {"strength": torch.ones(2)},
    "integers": {"w_dec": torch.ones(3, 4, dtype=torch.int8)},
    "device": {"w_dec": torch.ones(3, 4, device="meta")},
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_does_not_fit(name: str) -> None:
    arguments = {"x": torch.ones(2, 4), "acts": torch.ones(2, 3), "w_dec": torch.ones(3, 4)} | BAD[name]
    with pytest.raises(InvalidInputError, match="sae_delta"):
        sae_delta(**arguments)
