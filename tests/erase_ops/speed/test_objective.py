"""SPEED's closed form against the published one and against the constrained problem's own equations, in float64."""

import hypothesis
import hypothesis.strategies as st
import torch
from derivations import rows_of as rows
from derivations import speed_gap

from expunge.erase_ops.speed.objective import influenced, null_space, speed_edit


@hypothesis.given(st.integers(1, 9), st.integers(1, 20), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
def test_equals_the_lagrange_equations(n, m, rank, fixed, seed):
    """min |E C - (G - C)|^2 + ridge |E|^2 with E K = 0 for K = [P F]: stationarity and constraints in one system."""
    d, ridge = 9, 0.3
    erase, guide = rows(n, d, seed), rows(n, d, seed + 1)
    kept, still = rows(m, d, seed + 2, rank), rows(fixed, d, seed + 3)
    edit = speed_edit(erase, guide, null_space(kept, still, 1e-10), ridge=ridge)
    constraints = torch.cat([kept, still]).T  # [d, m + fixed]
    count = constraints.shape[1]
    zeros = torch.zeros(count, count, dtype=torch.float64)
    system = torch.cat(
        [
            torch.cat([erase.T @ erase + ridge * torch.eye(d, dtype=torch.float64), constraints], 1),
            torch.cat([constraints.T, zeros], 1),
        ]
    )
    right = torch.cat([erase.T @ (guide - erase), torch.zeros(count, d, dtype=torch.float64)])
    wanted = torch.linalg.lstsq(system, right, driver="gelsd", rcond=1e-12).solution[:d].T
    assert (edit - wanted).abs().max() <= 1e-8  # the reference itself is singular where constraints repeat
    assert (edit @ constraints).abs().max() <= 1e-8


@hypothesis.given(st.integers(0, 99))
def test_equals_the_published_form_and_holds_its_constraints(seed):
    assert speed_gap(seed=seed) <= 1e-12


def test_the_basis_is_orthonormal_and_free_of_what_is_kept_and_fixed():
    kept, fixed = rows(50, 32, 1, rank=10), rows(4, 32, 2)
    basis = null_space(kept, fixed, 1e-10)
    assert basis.shape == (32, 32 - 10 - 4)
    assert (basis.T @ basis - torch.eye(18, dtype=torch.float64)).abs().max() <= 1e-12
    assert max((kept @ basis).abs().max(), (fixed @ basis).abs().max()) <= 1e-6
    nothing = torch.zeros(0, 32, dtype=torch.float64)
    assert null_space(nothing, nothing, 0.1).shape == (32, 32)
    assert null_space(rows(99, 32), fixed, 1e-10).shape == (32, 0)
    repeated = torch.cat([fixed, fixed])  # the same direction twice takes one away
    assert null_space(nothing, repeated, 0.1).shape == (32, 28)


def test_the_filter_keeps_what_the_edit_would_change_most():
    kept = torch.diag(torch.tensor([1.0, 2.0, 3.0, 10.0], dtype=torch.float64))
    edit, gram = torch.eye(4, dtype=torch.float64), torch.eye(4, dtype=torch.float64)
    assert torch.equal(influenced(kept, edit, gram), kept[3:])
    assert influenced(kept[:0], edit, gram).shape == (0, 4)
