"""Ascent against an independent float64 derivation, bounded and not; gradients checked; templates."""

from functools import partial

import pytest
import torch
from derivations import ascent_case, gap
from torch.autograd import gradcheck

from expunge.erase_ops.few_shot.objective import ascent_loss
from expunge.erase_ops.few_shot.templates import TEMPLATES

S, Y = torch.randn(2, 5, 2, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("bound", [None, 2.0])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients(bound: float | None, seed: int) -> None:
    case = ascent_case(seed, bound)
    if bound is not None:
        away = abs(case.gradients["target"]).max(axis=(1, 2)) > 0
        assert away.any() and not away.all()  # rows on both sides of the bound
    assert gap(partial(ascent_loss, bound=bound), case) < 1e-12


@pytest.mark.parametrize("bound", [None, 2.0])
def test_gradients(bound: float | None) -> None:
    target = S.clone().requires_grad_()
    assert gradcheck(lambda s: ascent_loss({"target": s}, {}, {"truth": Y}, bound=bound)["loss"], (target,))


def test_rows_beyond_the_bound_are_left_alone() -> None:
    target = S.clone().requires_grad_()
    ascent_loss({"target": target}, {}, {"truth": Y}, bound=2.0)["loss"].backward()
    assert target.grad is not None
    beyond = (S - Y).square().flatten(1).mean(1) > 2.0
    assert torch.equal(target.grad.flatten(1).any(1), ~beyond)


def test_templates() -> None:
    assert {kind: len(texts) for kind, texts in TEMPLATES.items()} == {"object": 27, "style": 19}
    for texts in TEMPLATES.values():
        assert len(set(texts)) == len(texts) and all(text.count("{}") == 1 for text in texts)
