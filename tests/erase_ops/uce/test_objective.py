"""UCE's closed form against independent solutions of the same least-squares problem, in float64."""

import hypothesis
import hypothesis.strategies as st
import torch
from derivations import rows_of as rows
from derivations import uce_gap

from expunge.erase_ops.uce.objective import uce_edit

NUMBERS = {"erase_scale": 1.3, "preserve_scale": 0.7, "ridge": 0.5}


@hypothesis.given(st.integers(1, 12), st.integers(0, 12), st.integers(1, 9), st.integers(0, 99))
def test_equals_the_stacked_least_squares_problem(n, m, d, seed):
    assert uce_gap(n, m, d, seed, tuple(NUMBERS.values())) <= 1e-12


def test_equals_the_published_form_for_every_weight():
    """W' = (lambda W + s_e sum v c^T + s_p sum (W p) p^T) (lambda I + s_e sum c c^T + s_p sum p p^T)^-1, v = W g."""
    erase, guide, preserve = rows(20, 16), rows(20, 16, 1), rows(30, 16, 2)
    edit = uce_edit(erase, guide, preserve, **NUMBERS)
    for out in (3, 16, 40):
        weight = rows(out, 16, out)
        left = 0.5 * weight + 0.7 * weight @ preserve.T @ preserve
        right = 0.5 * torch.eye(16, dtype=torch.float64) + 0.7 * preserve.T @ preserve
        for c, g in zip(erase, guide, strict=True):
            left = left + 1.3 * torch.outer(weight @ g, c)
            right = right + 1.3 * torch.outer(c, c)
        assert (weight + weight @ edit - torch.linalg.solve(right, left, left=False)).abs().max() <= 1e-12


def test_it_is_the_minimum():
    erase, guide, preserve = rows(6, 5), rows(6, 5, 1), rows(4, 5, 2)
    edit = uce_edit(erase, guide, preserve, **NUMBERS).requires_grad_()
    loss = 1.3 * (erase @ edit.T - (guide - erase)).square().sum() + 0.7 * (preserve @ edit.T).square().sum()
    (gradient,) = torch.autograd.grad(loss + 0.5 * edit.square().sum(), edit)
    assert gradient.abs().max() <= 1e-12


def test_a_hundred_concepts_at_once_and_what_is_preserved_stays():
    erase, guide, preserve = rows(100, 256), rows(100, 256, 1), rows(100, 256, 2)
    edit = uce_edit(erase, guide, preserve, erase_scale=1.0, preserve_scale=1.0, ridge=1e-9)
    assert (erase @ edit.T - (guide - erase)).abs().max() <= 1e-6
    assert (preserve @ edit.T).abs().max() <= 1e-6
