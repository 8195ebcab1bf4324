"""Runs launch functions on fake CUDA tensors and compiles, for GPUs that are not here, exactly what they launch.

Three things stand in for a GPU: a driver that only names the target, PyTorch's FakeTensorMode, under which CUDA tensors
have shapes and strides but no memory, and a `kernel[grid]` that compiles instead of launching.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.runtime.jit import KernelInterface

from report.case import Case

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


@dataclass(frozen=True)
class Launch:
    """One kernel launch: the compiled kernel and its grid."""

    kernel: CompiledKernel
    grid: tuple[int, ...]

    @property
    def programs(self) -> int:
        total = 1
        for extent in self.grid:
            total *= extent
        return total


class NamedTarget:
    """Triton's driver as far as compiling asks for it."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> str:
        return f"{self.target.backend}:{self.target.arch}"  # kernels are cached by device: one for each target

    def get_current_stream(self, device: object) -> int:
        return 0


class Pointer:
    """A tensor as a kernel's argument: its dtype, its alignment and its extent; there is no memory behind it."""

    def __init__(self, tensor: Tensor) -> None:
        self.dtype = tensor.dtype
        self.offset = tensor.storage_offset() * tensor.element_size()
        self.extent = tensor.untyped_storage().nbytes()

    def data_ptr(self) -> int:
        return (1 << 20) + self.offset  # PyTorch's allocator aligns storages to 512 bytes

    def ptr_range(self) -> int:
        return self.extent  # AMD's backend uses 32-bit buffer instructions below 2 GiB


class Slicing(TorchFunctionMode):
    """Lets fake CUDA tensors be sliced by a PyTorch without CUDA, whose subscript asks for a device guard first."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not Tensor.__getitem__:
            return function(*args, **(kwargs or {}))
        tensor, index = args
        if any(isinstance(one, Tensor | list) for one in (index if isinstance(index, tuple) else (index,))):
            raise NotImplementedError("indexing by tensors or lists in a launch: use index_select or gather")
        like = torch.empty(0, device="meta").as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())[index]
        return tensor.as_strided(like.shape, like.stride(), like.storage_offset())


def as_argument(value: Any) -> Any:
    if isinstance(value, Tensor):
        if value.device.type != "cuda":
            raise TypeError(f"a kernel was given a tensor on {value.device}, shape {list(value.shape)}")
        return Pointer(value)
    if isinstance(value, tuple):
        return tuple(as_argument(item) for item in value)
    return value


@contextmanager
def compiling(target: GPUTarget) -> Iterator[list[Launch]]:
    """Within it every `kernel[grid](...)` compiles for the target and is noted in the list."""
    launches: list[Launch] = []

    def subscript(kernel: Any, grid: Any) -> Any:
        def launch(*arguments: Any, **options: Any) -> CompiledKernel:
            given = {name: as_argument(value) for name, value in options.items()}
            compiled = kernel.run(*map(as_argument, arguments), grid=grid, warmup=True, **given)
            extents = grid(options) if callable(grid) else grid
            launches.append(Launch(compiled, tuple(int(extent) for extent in extents)))
            return compiled

        return launch

    original = KernelInterface.__getitem__
    KernelInterface.__getitem__ = subscript
    driver.set_active(NamedTarget(target))
    try:
        yield launches
    finally:
        KernelInterface.__getitem__ = original


def launches_of(case: Case, target: GPUTarget) -> list[Launch]:
    """What a case launches, compiled."""
    with compiling(target) as launches, FakeTensorMode(), Slicing(), torch.no_grad():
        case.launch(torch.device("cuda", 0))
    if not launches:
        raise SystemExit(f"{case.op}, {case.name}: launched nothing")
    return launches
