"""What all Triton modules share."""

from __future__ import annotations

import os
from typing import Final

# float32 operands are multiplied as float32: tf32 would round them to 10 bits without a word.
DOT_PRECISION: Final = "ieee"
# Triton's interpreter takes about a millisecond a program and a tile op, whatever the tile: tests keep tiles small.
INTERPRETED: Final = os.environ.get("TRITON_INTERPRET") == "1"


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n; 1 for n < 1."""
    return 1 << max(n - 1, 0).bit_length()
