"""Bounds that no run can beat: bytes over bandwidth or flops over peak, whichever is longer.

Bandwidths and dense peaks are the makers' data-sheet figures, not measurements: NVIDIA A100 80GB SXM, H100 SXM and B200
data sheets, AMD Instinct MI300X data sheet. A kernel of a few microseconds is also bound by launch latency, which
these figures leave out: they compare kernels, they do not predict times.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Device:
    """Data-sheet figures: bytes a second, and flops a second of dense products with 16- and 32-bit operands."""

    name: str
    bandwidth: float
    half: float
    single: float


DEVICES = {
    "sm_80": Device("A100", 2039e9, 312e12, 19.5e12),
    "sm_90": Device("H100", 3350e9, 989e12, 67e12),
    "sm_100": Device("B200", 8000e9, 2250e12, 75e12),
    "gfx942": Device("MI300X", 5300e9, 1307e12, 163.4e12),
}


def bound_us(device: Device, nbytes: int, flops: int, dot_bits: int) -> tuple[float, str]:
    """Microseconds, and what binds: "memory" or "compute"."""
    memory = nbytes / device.bandwidth * 1e6
    compute = flops / (device.half if dot_bits == 16 else device.single) * 1e6
    return (memory, "memory") if memory >= compute else (compute, "compute")
