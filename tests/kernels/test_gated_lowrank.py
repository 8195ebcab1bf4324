"""gated_lowrank against the formula written per row and per SPM in float64, and its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expunge.errors import InvalidInputError, UnsupportedOperationError
from expunge.kernels.gated_lowrank import (
    gated_lowrank,
    gated_lowrank_conv,
    gated_lowrank_conv_reference,
    gated_lowrank_reference,
)


def by_hand(x: Tensor, down: Tensor, up: Tensor, gate: Tensor, mix_rank: int | None) -> Tensor:
    """delta W of each row, formed as a matrix, times the row: the definition, in float64."""
    x, down, up, gate = (t.double() for t in (x, down, up, gate.expand(x.shape[0], -1)))
    rows = []
    for row, g in zip(x, gate, strict=True):
        if mix_rank is None:
            delta = sum(g[r] * torch.outer(up[:, r], down[r]) for r in range(len(g)))
        else:
            spms = [slice(start, start + mix_rank) for start in range(0, len(g), mix_rank)]
            delta = sum((up[:, i] * g[i]) @ (down[j] * g[j, None]) for i, j in itertools.product(spms, spms))
        rows.append(row @ delta.T)
    return torch.stack(rows)


@given(
    rows=st.integers(1, 3),
    middle=st.lists(st.integers(1, 3), max_size=2),
    spms=st.integers(1, 4),
    rank=st.integers(1, 3),
    shared=st.booleans(),
    mix=st.booleans(),
    seed=st.integers(0, 99),
)
def test_linear_is_the_sum_over_spms(
    rows: int, middle: list[int], spms: int, rank: int, shared: bool, mix: bool, seed: int
) -> None:
    torch.manual_seed(seed)
    x, out = torch.randn(rows, *middle, 5), torch.randn(rows, *middle, 7)
    down, up = torch.randn(spms * rank, 5), torch.randn(7, spms * rank)
    gate = torch.rand(1 if shared else rows, spms).repeat_interleave(rank, 1)
    mix_rank = rank if mix else None
    delta = by_hand(x, down, up, gate, mix_rank)
    expected = out.double() + delta
    torch.testing.assert_close(
        gated_lowrank(x, down, up, gate, mix_rank=mix_rank).double(), delta, atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(
        gated_lowrank_reference(x, down, up, gate, out, mix_rank).double(), expected, atol=1e-4, rtol=1e-5
    )
    result = gated_lowrank(x, down, up, gate, out=out, mix_rank=mix_rank)
    assert result.data_ptr() == out.data_ptr(), "without gradients the base's output is updated in place"
    torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)


CONVS = {
    "pointwise": {"kernel": (1, 1)},
    "square": {"kernel": (3, 3), "padding": 1},
    "odd": {"kernel": (3, 2), "stride": (2, 1), "padding": (1, 0), "dilation": (1, 2)},
    "strided pointwise": {"kernel": (1, 1), "stride": 2},
    "same": {"kernel": (3, 3), "padding": "same"},
}


@pytest.mark.parametrize("mix", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("name", CONVS)
def test_conv_is_a_conv_with_each_rows_delta(name: str, memory_format: torch.memory_format, mix: bool) -> None:
    conv = dict(CONVS[name])
    kernel = conv.pop("kernel")
    x = torch.randn(3, 4, 7, 6).to(memory_format=memory_format)
    base, down, up = torch.randn(5, 4, *kernel), torch.randn(4, 4, *kernel), torch.randn(5, 4)
    gate = torch.rand(3, 2).repeat_interleave(2, 1)
    mix_rank = 2 if mix else None
    expected = []
    for row, g in zip(x, gate, strict=True):
        scaled = (up * g, down * g[:, None, None, None]) if mix else (up * g, down)
        factors = [t.unflatten(d, (2, 2)).sum(d) if mix else t for d, t in ((1, scaled[0]), (0, scaled[1]))]
        delta = torch.einsum("or,rikl->oikl", *factors)
        expected.append(F.conv2d(row[None], base + delta, **conv))
    out = F.conv2d(x, base, **conv)
    torch.testing.assert_close(
        gated_lowrank_conv_reference(x, down, up, gate, out, mix_rank, **conv),
        torch.cat(expected),
        atol=1e-4,
        rtol=1e-4,
    )
    alone = gated_lowrank_conv(x, down, up, gate, mix_rank=mix_rank, **conv)
    torch.testing.assert_close(out + alone, torch.cat(expected), atol=1e-4, rtol=1e-4)
    result = gated_lowrank_conv(x, down, up, gate, out=out, mix_rank=mix_rank, **conv)
    assert result.data_ptr() == out.data_ptr()
    torch.testing.assert_close(out, torch.cat(expected), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("mix_rank", [None, 2])
def test_linear_gradients(mix_rank: int | None) -> None:
    shapes = [(2, 3, 4), (4, 4), (5, 4), (2, 4), (2, 3, 5)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda x, down, up, gate, out: gated_lowrank(x, down, up, gate, out=out, mix_rank=mix_rank), inputs
    )


@pytest.mark.parametrize("kernel", [1, 3])
def test_conv_gradients(kernel: int) -> None:
    shapes = [(2, 3, 4, 4), (2, 3, kernel, kernel), (5, 2), (2, 2), (2, 5, 4, 4)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    assert torch.autograd.gradcheck(
        lambda x, down, up, gate, out: gated_lowrank_conv(x, down, up, gate, padding=kernel // 2, out=out), inputs
    )


def test_a_needed_gradient_leaves_the_bases_output_alone() -> None:
    x, down, up = torch.randn(2, 4), torch.randn(1, 4, requires_grad=True), torch.randn(3, 1)
    out = torch.randn(2, 3)
    before = out.clone()
    result = gated_lowrank(x, down, up, torch.ones(1, 1), out=out)
    result.sum().backward()
    assert torch.equal(out, before) and down.grad is not None


def test_zero_gates_change_no_bit() -> None:
    x, down, up, out = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(5, 2), torch.randn(2, 3, 5)
    before = out.clone()
    assert torch.equal(gated_lowrank(x, down, up, torch.zeros(2, 2), out=out), before)


def test_output_that_is_not_contiguous() -> None:
    x, down, up, gate = torch.randn(2, 3, 4), torch.randn(2, 4), torch.randn(5, 2), torch.rand(2, 2)
    out = torch.randn(2, 5, 3).mT
    expected = gated_lowrank_reference(x, down, up, gate, out)
    result = gated_lowrank(x, down, up, gate, out=out)
    torch.testing.assert_close(result, expected)
    assert result.data_ptr() == out.data_ptr()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_the_bases_dtype(dtype: torch.dtype) -> None:
    x, down, up, gate = torch.randn(2, 3, 64), torch.randn(3, 64), torch.randn(32, 3), torch.rand(2, 3)
    exact = gated_lowrank_reference(x, down, up, gate)
    result = gated_lowrank(x.to(dtype), down, up, gate)
    assert result.dtype == dtype
    assert (result.float() - exact).norm() / exact.norm() < 2e-2


def test_autocast_follows_the_bases_output() -> None:
    layer, x = torch.nn.Linear(8, 6), torch.randn(2, 3, 8)
    down, up, gate = torch.randn(2, 8), torch.randn(6, 2), torch.rand(2, 2)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        out = layer(x)
        result = gated_lowrank(x, down, up, gate, out=out)
    assert result.dtype == torch.bfloat16
    exact = gated_lowrank_reference(x, down, up, gate, layer(x))
    assert (result.float() - exact).norm() / exact.norm() < 2e-2


def test_rows_without_a_gate_of_their_own_are_refused() -> None:
    with pytest.raises(UnsupportedOperationError, match="3 rows"):
        gated_lowrank(torch.randn(3, 4), torch.randn(1, 4), torch.randn(5, 1), torch.ones(2, 1))


@pytest.mark.parametrize(
    ("down", "up", "gate", "mix_rank"),
    [
        ((2, 5), (5, 2), (1, 2), None),
        ((2, 4), (5, 3), (1, 2), None),
        ((2, 4), (5, 2), (1, 3), None),
        ((3, 4), (5, 3), (1, 3), 2),
    ],
)
def test_factors_that_do_not_belong_together_are_refused(
    down: tuple[int, ...], up: tuple[int, ...], gate: tuple[int, ...], mix_rank: int | None
) -> None:
    with pytest.raises(InvalidInputError, match="gated_lowrank"):
        gated_lowrank(torch.randn(1, 4), torch.randn(down), torch.randn(up), torch.ones(gate), mix_rank=mix_rank)
