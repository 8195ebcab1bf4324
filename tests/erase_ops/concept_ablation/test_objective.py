"""Concept Ablation's losses against an independent float64 derivation; gradients checked."""

import pytest
import torch
from derivations import ablation_case, gap
from torch.autograd import gradcheck

from expunge.erase_ops.concept_ablation.objective import model_loss, noise_loss

S, T = torch.randn(2, 3, 2, 4, 4, dtype=torch.float64)


@pytest.mark.parametrize("seed", range(3))
def test_the_target_is_the_alternative_or_the_truth(seed: int) -> None:
    assert gap(model_loss, ablation_case(seed)) < 1e-12
    assert gap(noise_loss, ablation_case(seed, "noise")) < 1e-12


def test_gradients() -> None:
    target = S.clone().requires_grad_()
    assert gradcheck(lambda s: model_loss({"target": s}, {"neutral": T}, {})["loss"], (target,))
    assert gradcheck(lambda s: noise_loss({"target": s}, {}, {"truth": T})["loss"], (target,))
