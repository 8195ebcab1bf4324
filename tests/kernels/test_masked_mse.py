"""masked_mse on its torch path: formula, gradients, gates, compilation, bad input. The kernel has a file of its own."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from expunge.errors import InvalidInputError
from expunge.kernels import masked_mse as module
from expunge.kernels.masked_mse import masked_mse

GRANULARITIES: tuple[dict[str, Any], ...] = (
    {"granularity": "token"},
    {"granularity": "window", "window": 4},
    {"granularity": "element"},
)


def states(*shape: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Student, target, positive, neutral."""
    return [torch.randn(shape, dtype=torch.float64).to(dtype) for _ in range(4)]


@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 6),
    quantile=st.floats(0, 1),
    words=st.sampled_from(GRANULARITIES),
    mean=st.booleans(),
    eta=st.floats(-2, 2),
    block=st.integers(1, 60),
    seed=st.integers(0, 99),
)
def test_the_formula_by_loops(
    rows: int, width: int, quantile: float, words: dict[str, Any], mean: bool, eta: float, block: int, seed: int
) -> None:
    torch.manual_seed(seed)
    s, t, p, n = states(rows, width)
    d = s - (t - eta * (p - n))
    squares = [[value * value for value in row] for row in d.tolist()]
    means = [math.fsum(row) / width for row in squares]
    size = words.get("window", 1)
    element = words["granularity"] == "element"
    groups = (
        [value for row in squares for value in row]
        if element
        else [math.fsum(means[i : i + size]) for i in range(0, rows, size)]
    )
    threshold = sorted(groups)[int(quantile * (len(groups) - 1))] + 1e-9 if groups else 0.0
    kept = [value > threshold for value in groups]
    norm = max(1, sum(kept)) if mean else 1
    with mock.patch.object(module, "BLOCK", block):
        out = masked_mse(
            s.requires_grad_(), t, p, n, eta=eta, threshold=threshold, reduction="kept" if mean else "sum", **words
        )
    assert out.loss.item() == pytest.approx(sum(v for v, k in zip(groups, kept, strict=True) if k) / norm, rel=1e-9)
    (grad,) = torch.autograd.grad(out.loss, s)
    for row in range(rows):
        for column in range(width):
            mask = kept[row * width + column] if element else kept[row // size] / width
            assert grad[row, column].item() == pytest.approx(2 * mask * d[row, column].item() / norm, rel=1e-9)
    counts = [sum(kept[row * width : (row + 1) * width]) for row in range(rows)] if element else kept
    assert out.kept.tolist() == counts


def test_without_a_gate_it_is_the_mean_squared_error() -> None:
    s, t, p, n = states(2, 5, 7)
    expected = torch.nn.functional.mse_loss(s, t - 0.5 * (p - n))
    for words in GRANULARITIES[::2]:
        torch.testing.assert_close(masked_mse(s, t, p, n, eta=0.5, **words).loss, expected)
    torch.testing.assert_close(masked_mse(s, t).loss, torch.nn.functional.mse_loss(s, t))


def test_windows_of_tokens_across_the_batch() -> None:
    """[tokens, batch, D] gates all rows of some tokens together, as one decoding step after another adds up."""
    s, t, p, n = (one.transpose(0, 1) for one in states(2, 6, 5))  # [tokens, batch, D], a view
    out = masked_mse(s, t, p, n, granularity="window", window=3 * 2)
    d = s - (t - (p - n))
    torch.testing.assert_close(out.group_losses, d.square().mean(2).view(2, 3, 2).sum((1, 2)))


def test_equal_teachers_and_student_leave_exactly_nothing() -> None:
    s = torch.randn(5, 7, dtype=torch.bfloat16)
    p = torch.randn(5, 7)
    out = masked_mse(s, s, p, p, eta=3.0, threshold=0.0)
    assert out.loss.item() == 0.0
    assert out.kept.sum() == 0


@pytest.mark.parametrize("words", GRANULARITIES, ids=lambda words: words["granularity"])
def test_gradcheck_away_from_the_threshold(words: dict[str, Any]) -> None:
    s, t, p, n = states(6, 3)
    sums = masked_mse(s, t, p, n, **words).group_losses
    threshold = float(sums.median()) + 0.05
    s.requires_grad_()
    assert torch.autograd.gradcheck(lambda s: masked_mse(s, t, p, n, threshold=threshold, **words).loss, s)


def test_no_gradient_flows_to_the_teacher_or_the_threshold() -> None:
    s, t, p, n = (one.requires_grad_() for one in states(4, 3))
    threshold = torch.tensor(0.1, dtype=torch.float64, requires_grad=True)
    masked_mse(s, t, p, n, threshold=threshold).loss.backward()
    assert s.grad is not None
    assert t.grad is p.grad is n.grad is threshold.grad is None


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    s, t, p, n = states(3, 4096, dtype=dtype)
    exact = masked_mse(*(one.double() for one in (s, t, p, n)))
    out = masked_mse(s.requires_grad_(), t, p, n)
    assert out.loss.dtype == torch.float32
    assert out.loss.item() == pytest.approx(exact.loss.item(), rel=1e-6)
    (grad,) = torch.autograd.grad(out.loss, s)
    assert grad.dtype == dtype


def test_nan_is_kept_where_it_stands_and_silent_nowhere() -> None:
    s, t, p, n = states(4, 3)
    s[1, 2] = math.nan
    for words in GRANULARITIES:
        out = masked_mse(s, t, p, n, threshold=1e3, **words)
        assert math.isnan(out.loss.item())
        assert out.kept.sum() == 1
    assert math.isnan(masked_mse(t, t, threshold=torch.tensor(math.nan), granularity="element").loss.item())


def test_compiled_without_breaks_and_once_for_all_thresholds() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(s: Tensor, t: Tensor, p: Tensor, n: Tensor, threshold: Tensor) -> Tensor:
        return masked_mse(s, t, p, n, threshold=threshold, granularity="window", window=2).loss

    s, t, p, n = states(5, 3)
    s.requires_grad_()
    for threshold in (0.0, 0.5, 2.0, 1e9):
        loss = step(s, t, p, n, torch.tensor(threshold))
        expected = masked_mse(s, t, p, n, threshold=threshold, granularity="window", window=2).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(expected, s))
    assert counter.frame_count == 1


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"target": torch.ones(3, 4)}, r"target: expected \[4, 3\]"),
        ({"neutral": torch.ones(4, 3)}, "positive, neutral: expected both"),
        ({"student": torch.ones(3)}, "with rows"),
        ({"student": torch.ones(4, 0), "target": torch.ones(4, 0)}, "D >= 1"),
        ({"target": torch.ones(4, 3, dtype=torch.int64)}, "target: expected a floating-point tensor"),
        ({"granularity": "element", "threshold": torch.ones(4)}, "threshold"),
        ({"granularity": "tokens"}, "granularity"),
        ({"target": torch.ones(4, 3, device="meta")}, "on cpu"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        masked_mse(**{"student": torch.ones(4, 3), "target": torch.ones(4, 3), **change})
