"""Registers, spills, shared memory and occupancy of a compiled kernel.

Sources of the limits: CUDA C programming guide, table of technical specifications per compute capability; AMD CDNA 3
instruction set guide (512 vector registers a lane and SIMD, 64 KiB of local memory, 8 waves a SIMD).
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path

from triton.backends.nvidia.compiler import get_ptxas, sm_arch_from_capability
from triton.compiler import CompiledKernel

REGISTERS, WARPS, BLOCKS = 65536, 64, 32  # of one multiprocessor, sm_80, sm_90 and sm_100 alike
SHARED = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}  # bytes of one multiprocessor; 1 KiB a block is reserved
AMD_SHARED, AMD_WAVES, AMD_SIMDS = 64 * 1024, 8, 4


@dataclass(frozen=True)
class Resources:
    """What one compiled kernel takes; `spill` is bytes a thread, stores and loads together, or scratch on AMD."""

    registers: int
    spill: int
    shared: int
    occupancy: float


def ptxas_report(ptx: str, capability: int, fuse: bool) -> tuple[int, int]:
    """Registers a thread and spilled bytes, from `ptxas -v` with the options that Triton compiles with."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "kernel.ptx")
        source.write_text(ptx, encoding="utf-8")
        options = ["-v", "-lineinfo", "--regAllocOptLevel=2", *([] if fuse else ["--fmad=false"])]
        command = [get_ptxas(capability).path, *options, f"--gpu-name={sm_arch_from_capability(capability)}"]
        done = subprocess.run(
            [*command, str(source), "-o", str(Path(folder, "kernel.cubin"))], capture_output=True, text=True, check=True
        )
    registers = [int(number) for number in re.findall(r"Used (\d+) registers", done.stderr)]
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    if len(registers) != 1 or not spills:
        raise ValueError(f"ptxas says something else than expected: {done.stderr}")
    return registers[0], sum(int(stores) + int(loads) for stores, loads in spills)


def occupancy(capability: int, registers: int, warps: int, shared: int) -> float:
    """Resident warps over the most that a multiprocessor holds.

    Registers are dealt out in units of 256 a warp, shared memory in units of 128 bytes.
    """
    per_warp = -(-registers * 32 // 256) * 256
    by_registers = REGISTERS // per_warp // warps
    by_shared = SHARED[capability] // (-(-shared // 128) * 128 + 1024)
    return min(by_registers, by_shared, WARPS // warps, BLOCKS) * warps / WARPS


def amd_occupancy(waves: int, warps: int, shared: int) -> float:
    """Resident waves over the most: `waves` a SIMD by registers, as the compiler says, and the local memory's limit."""
    groups = AMD_SHARED // shared if shared else AMD_WAVES * AMD_SIMDS
    return min(waves, groups * warps // AMD_SIMDS if warps >= AMD_SIMDS else groups, AMD_WAVES) / AMD_WAVES


def amd_number(text: str, name: str) -> int:
    """A number from the compiler's closing comments, such as `; ScratchSize: 0`."""
    found = re.search(rf"^; {name}: (\d+)", text, re.M)
    if found is None:
        raise ValueError(f"the assembly does not say its {name}")
    return int(found[1])


def resources_of(kernel: CompiledKernel) -> Resources:
    """Registers, spills, shared memory and occupancy of a kernel."""
    meta = kernel.metadata
    if meta.target.backend == "cuda":
        capability = meta.target.arch
        registers, spill = ptxas_report(kernel.asm["ptx"], capability, meta.enable_fp_fusion)
        share = occupancy(capability, registers, meta.num_warps, meta.shared)
        return Resources(registers, spill, meta.shared, share)
    text = kernel.asm["amdgcn"]
    waves = amd_occupancy(amd_number(text, "Occupancy"), meta.num_warps, meta.shared)
    spill = amd_number(text, "ScratchSize")
    return Resources(amd_number(text, "TotalNumVgprs"), spill, meta.shared, waves)
