"""Wilson intervals against known values."""

from __future__ import annotations

import pytest

from expunge.demo.scoring import Share


@pytest.mark.parametrize(
    ("hits", "n", "low", "high"),
    # Newcombe 1998, table of Wilson score intervals.
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_interval(hits: int, n: int, low: float, high: float) -> None:
    interval = Share(hits, n).interval
    assert interval == pytest.approx((low, high), abs=1e-4)
