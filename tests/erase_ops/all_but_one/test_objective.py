"""The guidance swap against an independent float64 derivation; its variants; gradients checked."""

from functools import partial

import pytest
import torch
from derivations import gap, swap_case
from torch import Tensor
from torch.autograd import gradcheck

from expunge.erase_ops.all_but_one.objective import Base, guidance_swap_loss
from expunge.erase_ops.concept_ablation.objective import model_loss

C, U, A, V = torch.randn(
    4, 3, 2, 4, 4, dtype=torch.float64
)  # student: concept, unconditional; teacher: alternative, ...


def losses(c: Tensor, u: Tensor, base: Base = "student", weight: float = 0.7) -> dict[str, Tensor]:
    student, teacher = {"target": c, "unconditional": u}, {"neutral": A, "unconditional": V}
    return guidance_swap_loss(student, teacher, {}, unconditional_weight=weight, base=base)


@pytest.mark.parametrize("base", ["student", "student_detached", "teacher"])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_gradients(base: Base, seed: int) -> None:
    assert gap(partial(guidance_swap_loss, unconditional_weight=0.7, base=base), swap_case(seed, base)) < 1e-12


@pytest.mark.parametrize("base", ["student", "teacher"])
def test_gradients(base: Base) -> None:
    assert gradcheck(lambda c, u: losses(c, u, base)["loss"], (C.clone().requires_grad_(), U.clone().requires_grad_()))


def test_the_detached_base_gets_no_gradient_from_the_swap() -> None:
    u = U.clone().requires_grad_()
    losses(C, u, "student_detached", weight=0.0)["loss"].backward()
    assert u.grad is None or not bool(u.grad.any())
    losses(C, u, "student", weight=0.0)["loss"].backward()
    assert u.grad is not None and bool(u.grad.any())


def test_an_unmoved_unconditional_prediction_makes_it_concept_ablation() -> None:
    found = losses(C, V)
    expected = model_loss({"target": C}, {"neutral": A}, {})
    torch.testing.assert_close(found["loss"], expected["loss"], atol=1e-12, rtol=0)
    assert float(found["unconditional"]) == 0.0
