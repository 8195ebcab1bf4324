"""Gates of losses: what is kept, ties, numbers that are not finite, gradients, bad words."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.errors import InvalidInputError
from expunge.kernels.loss_gate import loss_gate, scale_rows

numbers = st.floats(-8, 8, width=32)


@given(losses=st.lists(numbers, max_size=12), threshold=numbers, window=st.integers(1, 5), mean=st.booleans())
def test_the_formula_by_lists(losses: list[float], threshold: float, window: int, mean: bool) -> None:
    values = torch.tensor(losses, dtype=torch.float64, requires_grad=True)
    out = loss_gate(values, threshold, granularity="window", window=window, reduction="kept" if mean else "sum")
    sums = [math.fsum(losses[start : start + window]) for start in range(0, len(losses), window)]
    kept = [total > threshold for total in sums]
    norm = max(1, sum(kept)) if mean else 1
    assert out.kept.tolist() == [int(flag) for flag in kept]
    assert out.group_losses.tolist() == pytest.approx(sums)
    assert out.loss.item() == pytest.approx(math.fsum(s for s, flag in zip(sums, kept, strict=True) if flag) / norm)
    out.loss.backward()
    assert values.grad is not None
    assert values.grad.tolist() == pytest.approx([kept[row // window] / norm for row in range(len(losses))])


def test_a_tie_is_not_kept() -> None:
    losses = torch.tensor([0.1, 0.2, 0.3])
    above = torch.nextafter(losses[1], torch.tensor(1.0))
    assert loss_gate(losses, losses[1]).kept.tolist() == [0, 0, 1]
    assert loss_gate(torch.stack([above, losses[1]]), losses[1]).kept.tolist() == [1, 0]


def test_half_precision_losses_are_compared_in_float32() -> None:
    # 0.05 rounds to 0.05005 in bfloat16, which is more than the float32 threshold.
    assert loss_gate(torch.tensor([0.05], dtype=torch.bfloat16), 0.05).kept.tolist() == [1]
    losses = torch.full((1000,), 0.01, dtype=torch.bfloat16)
    total = loss_gate(losses, -math.inf, granularity="window", window=1000).loss
    assert total.item() == pytest.approx(losses[0].item() * 1000, rel=1e-5)


def test_one_threshold_for_each_group() -> None:
    out = loss_gate(torch.arange(5.0), torch.tensor([2.0, 2.0, 9.0]), granularity="window", window=2)
    assert out.group_losses.tolist() == [1.0, 5.0, 4.0]
    assert out.kept.tolist() == [0, 1, 0]


def test_nothing_above_the_threshold_gives_zero_with_zero_gradients() -> None:
    losses = torch.tensor([1.0, math.inf], requires_grad=True)
    out = loss_gate(losses, math.inf)
    out.loss.backward()
    assert out.loss.item() == 0.0
    assert losses.grad is not None
    assert losses.grad.tolist() == [0.0, 0.0]


def test_nan_is_never_masked_silently() -> None:
    losses = torch.tensor([1.0, math.nan, 3.0])
    out = loss_gate(losses, 2.0)
    assert out.kept.tolist() == [0, 1, 1]
    assert math.isnan(out.loss.item())
    assert loss_gate(losses[[0, 2]], 2.0).loss.item() == 3.0


@pytest.mark.parametrize("reduction", ["kept", "sum"])
def test_a_threshold_that_is_nan_makes_loss_and_gradients_nan(reduction: Any) -> None:
    losses = torch.tensor([1.0, 2.0], requires_grad=True)
    out = loss_gate(losses, torch.tensor(math.nan), reduction=reduction)
    out.loss.backward()
    assert math.isnan(out.loss.item())
    assert losses.grad is not None
    assert losses.grad.isnan().all()


def test_a_factor_of_zero_silences_what_the_row_holds() -> None:
    rows = torch.tensor([[math.inf, math.nan], [1.0, 2.0]])
    assert scale_rows(rows, torch.tensor([0.0, 0.5]), torch.float16).tolist() == [[0.0, 0.0], [0.5, 1.0]]


def test_no_rows() -> None:
    out = loss_gate(torch.empty(0), 0.5, granularity="window", window=3)
    assert out.loss.item() == 0.0
    assert out.kept.shape == out.group_losses.shape == (0,)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ({"granularity": "element"}, "granularity: expected one of window, token"),
        ({"reduction": "mean"}, "reduction: expected kept or sum, found 'mean'"),
        ({"window": 3}, "window: expected none for granularity token"),
        ({"granularity": "window"}, "window: expected a whole number of rows"),
        ({"granularity": "window", "window": 0}, "found 0"),
        ({"granularity": "window", "window": 2.0}, "found 2.0"),
        ({"threshold": math.nan}, "threshold: expected a number that is not NaN"),
        ({"threshold": "quantile"}, "threshold"),
        ({"threshold": torch.zeros(2)}, r"one for each group, found \[2\]"),
        ({"threshold": torch.zeros((), dtype=torch.int64)}, "int64"),
        ({"losses": torch.arange(3)}, "losses: expected a floating-point tensor"),
    ],
)
def test_bad_words_are_named(words: dict[str, Any], match: str) -> None:
    with pytest.raises(InvalidInputError, match=match):
        loss_gate(**{"losses": torch.ones(3), "threshold": 0.0, **words})
