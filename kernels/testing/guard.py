"""A guard around Triton's interpreter: counts what kernels move and multiply, and refuses what only a GPU would punish.

    with guard() as counts:
        launch_gated_lowrank_forward(...)
    assert counts.read_unique == ...

Counted exactly: bytes read and written, asked for by all programs and unique within a launch; dot flops; launches.
Refused with a `GuardError`, at the end of the launch:

- stray accesses: addresses outside the storage of every tensor that the launch was given (they are not carried out);
- clashes: an address that one program writes and another one reads or writes, unless all of them do so by atomics.

Refused at once: arithmetic on bfloat16, which the interpreter does on the bits as if they were integers; loads, stores
and casts are right, and dots are mended here. `torch.empty` is filled with NaN, so that unwritten outputs show.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter

from expunge.kernels.testing.memory import Launch

Builder = interpreter.InterpreterBuilder


class GuardError(AssertionError):
    """A kernel touched memory that is not its own, or that another program of the same launch writes."""


@dataclass
class Counts:
    """What ran under the guard, summed over launches; bytes, and floating-point operations of dots."""

    read_asked: int = 0
    read_unique: int = 0
    written_asked: int = 0
    written_unique: int = 0
    flops: int = 0
    programs: int = 0
    launches: list[str] = field(default_factory=list)

    @property
    def asked(self) -> int:
        """Bytes asked for, read and written."""
        return self.read_asked + self.written_asked

    @property
    def unique(self) -> int:
        """Bytes at different addresses, read and written, summed over launches."""
        return self.read_unique + self.written_unique


class _Watch:
    """The patched methods of the interpreter's builder, and the launch that is running."""

    def __init__(self) -> None:
        self.counts = Counts()
        self.launch: Launch | None = None

    def touch(self, builder: Any, pointers: Any, mask: Any, kind: str) -> Any:
        """Counts one access and returns its mask without the stray addresses."""
        if self.launch is None:
            raise GuardError("memory was accessed outside a launch")
        size = pointers.get_element_ty().primitive_bitwidth // 8
        x, y, z = builder.grid_idx
        _, ny, nz = builder.grid_dim
        wanted = np.broadcast_to(mask.data, pointers.data.shape).astype(bool)
        allowed = self.launch.touch(pointers.data, wanted, max(size, 1), kind, (x * ny + y) * nz + z)
        return interpreter.TensorHandle(allowed, tl.int1)

    def close(self, name: str) -> None:
        """Adds the launch's counts, then refuses what it did wrong."""
        launch, self.launch = self.launch, None
        assert launch is not None
        counts = self.counts
        counts.read_asked += launch.asked["read"]
        counts.written_asked += launch.asked["write"]
        read, written = launch.unique()
        counts.read_unique += read
        counts.written_unique += written
        counts.programs += launch.programs
        if launch.stray or launch.clashes:
            raise GuardError(
                f"{name}: {launch.stray} stray bytes outside every tensor, {launch.clashes} clashes between programs"
            )


@contextmanager
def guard() -> Iterator[Counts]:
    """Watches all kernels that the interpreter runs inside the block.

    Yields:
        the counts, growing with every launch.

    Raises:
        GuardError: after a launch with stray accesses or clashes.
    """
    watch = _Watch()
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    poison: Any = torch.utils.deterministic  # a module with a property, which its stub does not know
    fill = poison.fill_uninitialized_memory
    with ExitStack() as stack:
        for owner, name, method in _patches(watch):
            stack.enter_context(mock.patch.object(owner, name, method))
        stack.callback(torch.use_deterministic_algorithms, deterministic, warn_only=warn_only)
        torch.use_deterministic_algorithms(True, warn_only=warn_only)  # fills torch.empty with NaN
        stack.callback(setattr, poison, "fill_uninitialized_memory", fill)
        poison.fill_uninitialized_memory = True
        yield watch.counts


def _patches(watch: _Watch) -> list[tuple[Any, str, Any]]:
    """(class, name of the method, what takes its place) for everything that the guard watches."""
    methods = (
        _memory_methods(watch)
        | _arithmetic_methods(watch)
        | {"create_atomic_rmw": _atomic(watch, Builder.create_atomic_rmw, mask_at=2)}
        | {"create_atomic_cas": _atomic(watch, Builder.create_atomic_cas, mask_at=None)}
    )
    patches: list[tuple[Any, str, Any]] = [(Builder, name, method) for name, method in methods.items()]
    patches.append((interpreter.ReduceScanOpInterface, "check_tensor", _checked_reduction()))
    patches += [(interpreter.GridExecutor, name, method) for name, method in _launch_methods(watch).items()]
    return patches


def _launch_methods(watch: _Watch) -> dict[str, Any]:
    run, prepare = interpreter.GridExecutor.__call__, interpreter.GridExecutor._init_args_hst

    def start(self: Any, args: Any, kwargs: Any) -> Any:
        hosted = prepare(self, args, kwargs)
        watch.launch = Launch([arg for arg in (*hosted[0], *hosted[1].values()) if isinstance(arg, torch.Tensor)])
        return hosted

    def call(self: Any, *args: Any, **kwargs: Any) -> None:
        watch.counts.launches.append(self.fn.__name__)
        try:
            run(self, *args, **kwargs)
        except BaseException:
            watch.launch = None
            raise
        watch.close(self.fn.__name__)

    return {"_init_args_hst": start, "__call__": call}


def _memory_methods(watch: _Watch) -> dict[str, Any]:
    load, store = Builder.create_masked_load, Builder.create_masked_store

    def masked_load(self: Any, pointers: Any, mask: Any, other: Any, *rest: Any) -> Any:
        return load(self, pointers, watch.touch(self, pointers, mask, "read"), other, *rest)

    def masked_store(self: Any, pointers: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return store(self, pointers, value, watch.touch(self, pointers, mask, "write"), *rest)

    return {"create_masked_load": masked_load, "create_masked_store": masked_store}


def _atomic(watch: _Watch, original: Any, mask_at: int | None) -> Any:
    def atomic(self: Any, *arguments: Any) -> Any:
        # (op, pointer, value, mask, ...) for read-modify-write, (pointer, compare, value, ...) for compare-and-swap
        pointers, *rest = arguments[1:] if mask_at is not None else arguments
        everywhere = interpreter.TensorHandle(np.ones_like(pointers.data, dtype=bool), tl.int1)
        mask = everywhere if mask_at is None else rest[mask_at - 1]
        allowed = watch.touch(self, pointers, mask, "atomic")
        if mask_at is None:
            return original(self, *arguments)
        rest[mask_at - 1] = allowed
        return original(self, arguments[0], pointers, *rest)

    return atomic


def _arithmetic_methods(watch: _Watch) -> dict[str, Any]:
    binary, unary, dot = Builder.binary_op, Builder.unary_op, Builder.create_dot

    def checked_binary(self: Any, left: Any, right: Any, op: Any) -> Any:
        _refuse_bfloat16(left, right)
        return binary(self, left, right, op)

    def checked_unary(self: Any, argument: Any, op: Any) -> Any:
        _refuse_bfloat16(argument)
        return unary(self, argument, op)

    def counted_dot(self: Any, a: Any, b: Any, d: Any, *rest: Any) -> Any:
        *batch, m, k = a.data.shape
        watch.counts.flops += 2 * int(np.prod(batch, dtype=np.int64)) * m * k * b.data.shape[-1]
        return dot(self, _widened(a), _widened(b), d, *rest)

    return {"binary_op": checked_binary, "unary_op": checked_unary, "create_dot": counted_dot}


def _checked_reduction() -> Any:
    original = interpreter.ReduceScanOpInterface.check_tensor

    def check_tensor(self: Any, inputs: Any) -> Any:
        _refuse_bfloat16(*(tensor.handle for tensor in inputs))
        return original(self, inputs)

    return check_tensor


def _refuse_bfloat16(*handles: Any) -> None:
    if any(handle.dtype.scalar == tl.bfloat16 for handle in handles):
        raise TypeError("arithmetic on bfloat16: cast to float32 right after the load, and back at the store")


def _widened(handle: Any) -> Any:
    """bfloat16 as float32: the same numbers, for numpy's matrix product."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return interpreter.TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
