"""Losses of negative guidance, SPM's and ESD's, against an independent float64 derivation, values and gradients."""

from derivations import gap, guidance_case
from hypothesis import given
from hypothesis import strategies as st

from expunge.erase_ops.training.objectives import guidance_loss


@given(
    rows=st.integers(1, 4),
    anchors=st.integers(1, 5),
    seed=st.integers(0, 2**16),
    eta=st.floats(0, 4),
    weight=st.floats(0, 2000),
)
def test_losses_and_gradients(rows: int, anchors: int, seed: int, eta: float, weight: float) -> None:
    assert gap(guidance_loss, guidance_case(seed, rows, anchors, eta, weight)) < 1e-12


def test_a_wrong_objective_is_told() -> None:
    """The comparison itself: another eta gives another loss, and a missing gradient is seen."""
    case = guidance_case(0)
    assert gap(lambda s, t, n: guidance_loss(s, t, n | {"guidance_scale": n["guidance_scale"] + 1e-6}), case) > 1e-8
    cut = gap(lambda s, t, n: guidance_loss({**s, "target": s["target"].detach()}, t, n), case)
    assert cut > 1e-3
