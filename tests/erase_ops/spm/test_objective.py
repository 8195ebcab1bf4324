"""SPM's losses against an independent float64 derivation, values and gradients."""

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from expunge.erase_ops.spm.objective import anchoring_loss, erasing_loss, erasing_target, row_errors, spm_loss

Array = NDArray[np.float64]


def derive(
    s: Array, n: Array, p: Array, a: Array, b: Array, eta: Array, lam: Array, w: Array
) -> tuple[float, float, float, Array, Array]:
    """Losses and their gradients by hand, element by element in float64.

    y = (1 + eta) n - eta p;  dL/ds = 2 (s - y) / (rows * values);
    dL/da = mean(lam) * 2 w (a - b) / (sum(w) * values).
    """
    rows, values = s.shape
    y = (1 + eta)[:, None] * n - eta[:, None] * p
    erase = sum((s[i, j] - y[i, j]) ** 2 for i in range(rows) for j in range(values)) / (rows * values)
    gap = a - b
    anchor = sum(w[i] * gap[i, j] ** 2 for i in range(len(a)) for j in range(values)) / (w.sum() * values)
    total = erase + lam.mean() * anchor
    return total, erase, anchor, 2 * (s - y) / (rows * values), lam.mean() * 2 * w[:, None] * gap / (w.sum() * values)


@given(
    rows=st.integers(1, 4),
    anchors=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    eta=st.floats(0, 4),
    lam=st.floats(0, 2000),
)
def test_losses_and_gradients(rows: int, anchors: int, seed: int, eta: float, lam: float) -> None:
    rng = np.random.default_rng(seed)
    s, n, p = rng.normal(size=(3, rows, 6))
    a, b = rng.normal(size=(2, anchors, 6))
    etas, lams = eta * rng.uniform(size=rows), lam * rng.uniform(size=rows)
    weights = rng.integers(1, 4, anchors).astype(float)
    total, erase, anchor, grad_s, grad_a = derive(s, n, p, a, b, etas, lams, weights)

    def tensor(array: Array, grad: bool = False) -> torch.Tensor:
        shaped = array.reshape(-1, 2, 3) if array.ndim == 2 else array
        return torch.tensor(shaped, dtype=torch.float32, requires_grad=grad)

    student, moved = tensor(s, True), tensor(a, True)
    target = erasing_target(tensor(n), tensor(p), tensor(etas))
    loss = spm_loss(student, target, moved, tensor(b), tensor(weights), tensor(lams))
    loss.total.backward()
    assert student.grad is not None and moved.grad is not None
    scale = max(1.0, abs(total))
    assert abs(loss.total.item() - total) < 1e-4 * scale
    assert abs(float(loss.erase) - erase) < 1e-4 * scale and abs(float(loss.anchor) - anchor) < 1e-4 * scale
    np.testing.assert_allclose(student.grad.reshape(rows, -1), grad_s, atol=1e-5 * scale, rtol=1e-4)
    np.testing.assert_allclose(moved.grad.reshape(anchors, -1), grad_a, atol=1e-5 * scale, rtol=1e-4)


def test_the_default_target_mirrors_the_concept_at_the_neutral_prompt() -> None:
    neutral, positive = torch.randn(2, 4, 3, 3), torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(erasing_target(neutral, positive, 1.0), 2 * neutral - positive)
    assert torch.equal(erasing_target(neutral, positive, 0.0), neutral)


def test_the_target_means_the_same_in_noise_and_velocity() -> None:
    """v = sqrt(abar) eps - sqrt(1 - abar) x0 is affine in eps at fixed x: both forms of the target agree."""
    abar, eta = 0.37, 1.7
    x, neutral, positive = torch.randn(3, 2, 4, 3, 3, dtype=torch.float64)

    def velocity(epsilon: torch.Tensor) -> torch.Tensor:
        clean = (x - (1 - abar) ** 0.5 * epsilon) / abar**0.5
        return abar**0.5 * epsilon - (1 - abar) ** 0.5 * clean

    through_noise = velocity(erasing_target(neutral, positive, eta).double())
    through_velocity = erasing_target(velocity(neutral), velocity(positive), eta)
    torch.testing.assert_close(through_velocity.double(), through_noise, atol=1e-5, rtol=1e-5)


def test_no_gradient_flows_into_the_teacher() -> None:
    student, teacher = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    (erasing_loss(student, teacher) + anchoring_loss(student, teacher, torch.ones(2))).backward()
    assert teacher.grad is None and student.grad is not None


def test_half_precision_is_squared_in_float32() -> None:
    student, target = torch.full((1, 4), 300.0, dtype=torch.float16), torch.zeros(1, 4, dtype=torch.float16)
    assert row_errors(student, target).tolist() == [90000.0]  # beyond float16's largest number


def test_without_anchors_only_erasing_counts() -> None:
    student, target, none = torch.randn(2, 3), torch.randn(2, 3), torch.zeros(0, 3)
    loss = spm_loss(student, target, none, none, torch.zeros(0), 1000.0)
    assert torch.equal(loss.total, erasing_loss(student, target)) and float(loss.anchor) == 0
