"""Counts what torch code does: operations, bytes of their operands, the largest tensor, and peak memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Recorder(TorchDispatchMode):
    """Counts the operations that run inside the `with` block, backward passes included; views are free.

    Attributes:
        ops: names of the operations that computed something, in order.
        bytes: of all operands and results of these operations; what they move if each reads and writes memory once.
        largest: elements of the largest tensor that was allocated.
    """

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []
        self.bytes = 0
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if getattr(func, "is_view", False) or func is torch.ops.aten.detach.default:
            return result
        known = {tensor.untyped_storage()._cdata for tensor in given}
        self.ops.append(str(func))
        self.bytes += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        fresh = [tensor.numel() for tensor in made if tensor.untyped_storage()._cdata not in known]
        self.largest = max(self.largest, *fresh, 0)
        return result


def peak_bytes(run: Callable[[], object]) -> int:
    """Most bytes that `run()` held at a time beyond what was allocated before it; its result counts.

    On the CPU by torch's profiler, which sees every allocation of torch's allocator; on CUDA devices by the caching
    allocator's own statistics.
    """
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = run()
        torch.cuda.synchronize()
        del result
        return int(torch.cuda.max_memory_allocated() - before)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = run()
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    del result
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
