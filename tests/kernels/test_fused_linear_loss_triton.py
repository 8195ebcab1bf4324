"""The Triton kernels of fused_linear_loss in the interpreter: results, gates, gradients, memory, compilation."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from expunge.kernels.fused_linear_loss import fused_linear_loss, fused_linear_loss_reference
from expunge.kernels.loss_gate import GatedLoss
from expunge.kernels.testing.compare import assert_close, relative_error
from expunge.kernels.testing.recorder import Recorder

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("triton_path")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
KINDS = ("cross entropy", "KL")
# Logits and their exponentials differ by a few roundings of float32, relative to logits of about 5.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}


def problem(kind: str, rows: int, words: int, width: int, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Arguments, with a head that trains; every fifth label is ignored."""
    hidden, positive, neutral = (torch.randn(rows, width).to(dtype) for _ in range(3))
    weight, bias = (torch.randn(words, width) / 4).to(dtype), torch.randn(words).to(dtype)
    given: dict[str, Any] = {"hidden": hidden, "weight": weight, "bias": bias}
    for tensor in given.values():
        tensor.requires_grad_()
    if kind == "KL":
        return given | {"positive": positive, "neutral": neutral, "eta": 0.7}
    labels = torch.randint(0, words, (rows,))
    labels[2::5] = -100
    return given | {"labels": labels, "token_weights": torch.randn(rows)}


def exact(
    given: dict[str, Any], threshold: float, window: int = 1, mean: bool = True
) -> tuple[GatedLoss, list[Tensor]]:
    """The reference in float64, and its states, weight and bias."""
    given = {k: v.detach().double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    if "labels" not in given:
        neutral, positive = given.pop("neutral"), given.pop("positive")
        given["teachers"] = (neutral, positive, neutral)
    leaves = [given.pop(name).requires_grad_() for name in ("hidden", "weight", "bias")]
    limit = torch.as_tensor(threshold, dtype=torch.float64)
    return fused_linear_loss_reference(*leaves, limit, window, mean=mean, **given), leaves


def check(
    given: dict[str, Any], threshold: float, window: int = 1, mean: bool = True, chunk_rows: int = 16
) -> GatedLoss:
    """Loss, gates and all gradients against the reference."""
    reduction: Any = "kept" if mean else "sum"
    expected, leaves = exact(given, threshold, window, mean)
    out = fused_linear_loss(
        **given, threshold=threshold, granularity="window", window=window, reduction=reduction, chunk_rows=chunk_rows
    )
    assert torch.equal(out.kept, expected.kept)
    assert_close("group losses", out.group_losses, expected.group_losses, 3e-6)
    assert_close("loss", out.loss, expected.loss, 3e-6)
    found = torch.autograd.grad(out.loss * 3, [given[name] for name in ("hidden", "weight", "bias")])
    for name, one, other in zip(given, found, torch.autograd.grad(expected.loss * 3, leaves), strict=False):
        assert_close(name, one, other, TOLERANCES[one.dtype])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("window", [1, 6])
def test_against_the_reference(kind: str, window: int, dtype: torch.dtype) -> None:
    given = problem(kind, 21, 45, 35, dtype)
    ordered = exact(given, 0.0, window)[0].group_losses.sort().values
    middle = len(ordered) // 2  # between two groups: equal to float64's gates whatever the rounding
    out = check(given, ordered[middle - 1 : middle + 1].mean().item(), window)
    assert 0 < out.kept.sum() < len(ordered)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=10)
@given(
    kind=st.sampled_from(KINDS),
    dtype=st.sampled_from(DTYPES),
    rows=st.integers(0, 18),
    words=st.integers(1, 35),
    width=st.integers(1, 20),
    window=st.integers(1, 20),
    mean=st.booleans(),
    chunk_rows=st.integers(1, 20),
    seed=st.integers(0, 99),
)
def test_every_shape(
    kind: str,
    dtype: torch.dtype,
    rows: int,
    words: int,
    width: int,
    window: int,
    mean: bool,
    chunk_rows: int,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    given = problem(kind, rows, words, width, dtype)
    if kind == "cross entropy":
        given["token_weights"] = torch.rand(rows) + 0.5  # no sums near 0, whose relative error says nothing
    if words == 1:  # nothing to learn: all of it is rounding
        out = fused_linear_loss(**given)
        assert out.loss.abs().item() < 1e-5
        assert all(one.abs().max() < 1e-2 for one in torch.autograd.grad(out.loss, [given["weight"]]) if rows)
        return
    check(given, -math.inf, window, mean, chunk_rows)


@pytest.mark.parametrize("kind", KINDS)
def test_gated_off_costs_no_logits_and_gives_zeros(kind: str, counts: Any) -> None:
    given = problem(kind, 20, 33, 17)
    out = fused_linear_loss(**given, threshold=math.inf, chunk_rows=10)
    flops = counts.flops
    assert out.loss.item() == 0.0
    assert not any(one.any() for one in torch.autograd.grad(out.loss, [given[n] for n in ("hidden", "weight", "bias")]))
    fused_linear_loss(**{**given, "hidden": given["hidden"].detach(), "weight": given["weight"].detach(), "bias": None})
    logits = counts.flops - flops  # of the losses alone
    assert flops <= logits + 2 * 48 * 32 * 32  # and the head's products of zeros


def test_only_what_is_wanted_is_launched(counts: Any) -> None:
    given = problem("cross entropy", 8, 20, 9)
    with torch.no_grad():
        fused_linear_loss(**given)
    assert counts.launches == ["linear_statistics_kernel", "join_splits_kernel", "loss_gate_kernel"]
    del counts.launches[:]
    frozen = {**given, "weight": given["weight"].detach(), "bias": given["bias"].detach()}
    fused_linear_loss(**frozen, chunk_rows=4)
    assert counts.launches[3:] == ["linear_gap_kernel", "linear_states_kernel"] * 2
    del counts.launches[:]
    only_bias = {**given, "weight": given["weight"].detach(), "hidden": given["hidden"].detach()}
    out = fused_linear_loss(**only_bias, chunk_rows=4)
    assert counts.launches[3:] == ["linear_gap_kernel", "linear_head_kernel"] * 2
    expected, leaves = exact(given, -math.inf)
    (grad,) = torch.autograd.grad(out.loss, [given["bias"]])
    assert_close("bias", grad, torch.autograd.grad(expected.loss, leaves[2:])[0], 5e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_no_tensor_of_rows_times_words_is_ever_allocated(kind: str) -> None:
    given = problem(kind, 24, 70, 5)
    with Recorder() as record:
        fused_linear_loss(**given, chunk_rows=8).loss.backward()
    assert record.largest == 8 * 128  # rows of dz are padded to 64 words
    with Recorder() as record:
        fused_linear_loss(**given).loss.backward()
    assert record.largest < 24 * 70


def test_the_composed_teacher_costs_no_digits() -> None:
    given = problem("KL", 18, 30, 24, torch.bfloat16) | {"eta": 3.0}
    expected, _ = exact(given, -math.inf)
    out = fused_linear_loss(**given)
    assert relative_error(out.group_losses, expected.group_losses) < 1e-4  # one bfloat16 rounding is 4e-3
    same = {**given, "positive": given["hidden"].detach(), "neutral": given["hidden"].detach()}
    out = fused_linear_loss(**same, threshold=0.0)
    assert out.group_losses.tolist() == [0.0] * 18
    assert not torch.autograd.grad(out.loss, given["hidden"])[0].any()


def test_strides_are_honoured() -> None:
    hidden = torch.randn(3, 40, 6).transpose(1, 2)[:, :, ::2]
    weight = torch.randn(20, 25).T
    labels = torch.randint(0, 25, (3, 6))
    out = fused_linear_loss(hidden.requires_grad_(), weight, labels=labels)
    dense = hidden.detach().contiguous().requires_grad_()
    expected = fused_linear_loss(dense, weight.contiguous(), labels=labels)
    assert torch.equal(out.loss, expected.loss)
    assert torch.equal(torch.autograd.grad(out.loss, hidden)[0], torch.autograd.grad(expected.loss, dense)[0])


@pytest.mark.parametrize("kind", KINDS)
def test_banned_words(kind: str) -> None:
    given = problem(kind, 6, 40, 8)
    given["bias"].data[:33] = -math.inf  # a whole split of the words
    if kind == "cross entropy":
        given["labels"] = torch.full((6,), 35)
    out = fused_linear_loss(**given)
    grads = torch.autograd.grad(out.loss, [given[name] for name in ("hidden", "weight", "bias")])
    allowed = {k: v[33:] if k in ("weight", "bias") else v for k, v in given.items()}
    if kind == "cross entropy":
        allowed["labels"] = given["labels"] - 33
    expected, leaves = exact(allowed, -math.inf)
    assert_close("loss", out.loss, expected.loss, 3e-6)
    for one, other in zip(grads, torch.autograd.grad(expected.loss, leaves), strict=True):
        assert_close("gradient", one[-len(other) :], other, 5e-6)
    assert not grads[1][:33].any()


def test_numbers_that_are_not_finite_are_loud_and_ignored_rows_silent() -> None:
    given = problem("cross entropy", 10, 9, 4)
    leaves = [given[name] for name in ("hidden", "weight", "bias")]
    given["hidden"].data[2] = math.nan  # an ignored row
    out = fused_linear_loss(**given)
    assert all(torch.isfinite(one).all() for one in (out.loss, *torch.autograd.grad(out.loss, leaves)))
    given["hidden"].data[3] = math.nan
    out = fused_linear_loss(**given, threshold=2.0)
    assert math.isnan(out.loss.item())
    assert out.kept[3] == 1
    assert all(one.isnan().any() for one in torch.autograd.grad(out.loss, leaves))


def test_small_factors_do_not_vanish_in_float16() -> None:
    given = problem("cross entropy", 20, 40, 8, torch.float16)
    given["token_weights"] = torch.full((20,), 1e-6)
    out = fused_linear_loss(**given)
    expected, leaves = exact(given, -math.inf)
    for name, one, other in zip(
        given, out_grads(out, given), torch.autograd.grad(expected.loss * 2.0**20, leaves), strict=False
    ):
        assert_close(name, one, other)


def out_grads(out: GatedLoss, given: dict[str, Any]) -> tuple[Tensor, ...]:
    return torch.autograd.grad(out.loss * 2.0**20, [given[name] for name in ("hidden", "weight", "bias")])


@pytest.mark.parametrize("kind", KINDS)
def test_compiled_it_is_one_op_for_all_thresholds(kind: str) -> None:
    counter = CompileCounter()
    given = problem(kind, 7, 20, 9)
    if kind == "KL":
        del given["eta"]  # a number is compiled in

    @torch.compile(backend=counter, fullgraph=True)
    def step(threshold: Tensor, **given: Any) -> Tensor:
        return fused_linear_loss(**given, threshold=threshold).loss

    for threshold in (-1.0, 0.5, math.inf):
        loss = step(torch.tensor(threshold), **given)
        eager = fused_linear_loss(**given, threshold=threshold).loss
        torch.testing.assert_close(loss, eager)
        leaves = [given[name] for name in ("hidden", "weight", "bias")]
        torch.testing.assert_close(torch.autograd.grad(loss, leaves), torch.autograd.grad(eager, leaves))
    assert counter.frame_count == 1


def test_the_custom_op_passes_opcheck() -> None:
    from expunge.kernels.fused_linear_op import linear_loss

    given = problem("cross entropy", 5, 9, 4)
    labels, valid = given["labels"].clamp_min(0), given["labels"] != -100
    leaves = [given[name] for name in ("hidden", "weight", "bias")]
    rest = (labels, valid, None, given["token_weights"], torch.tensor(1.0), 2, True, [True, True, True], 4, None)
    torch.library.opcheck(linear_loss, (*leaves, *rest))
