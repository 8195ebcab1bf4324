"""Which program touched which byte of which tensor during one launch of a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch

Array = npt.NDArray[np.generic]
NOBODY, SEVERAL = -1, -2


class Storage:
    """One tensor storage: for each address the size of what was read and written there, and by which program."""

    def __init__(self, start: int, size: int) -> None:
        self.start, self.end = start, start + size
        self.sizes = {kind: np.zeros(size, np.uint8) for kind in ("read", "write")}
        self.users = {kind: np.full(size, NOBODY, np.int32) for kind in ("read", "write", "atomic")}

    def touch(self, offsets: Array, size: int, kind: str, program: int) -> int:
        """Notes an access at these offsets; returns at how many of them it clashes with another program's."""
        for role in ("read", "write") if kind == "atomic" else (kind,):
            self.sizes[role][offsets] = size
        rivals = {"read": ("write", "atomic"), "write": ("read", "write", "atomic"), "atomic": ("read", "write")}
        clash = np.zeros(offsets.shape, bool)
        for rival in rivals[kind]:
            user = self.users[rival][offsets]
            clash |= (user != NOBODY) & (user != program)
        user = self.users[kind][offsets]
        self.users[kind][offsets] = np.where((user == NOBODY) | (user == program), program, SEVERAL)
        return int(np.unique(offsets[clash]).size)


class Launch:
    """The memory side of one launch.

    Args:
        tensors: the launch's arguments; an access outside the storage of all of them is stray.
    """

    def __init__(self, tensors: Sequence[torch.Tensor]) -> None:
        spans = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        self.storages = [Storage(start, size) for start, size in spans.items() if size]
        self.asked = {"read": 0, "write": 0}
        self.stray = self.clashes = 0
        self._programs: set[int] = set()

    @property
    def programs(self) -> int:
        """How many programs touched memory."""
        return len(self._programs)

    def touch(self, addresses: Array, mask: npt.NDArray[np.bool_], size: int, kind: str, program: int) -> Array:
        """Counts an access of `size` bytes at each address under the mask; returns the mask without stray ones."""
        self._programs.add(program)
        allowed = np.zeros(mask.shape, bool)
        where = addresses.astype(np.int64)
        for storage in self.storages:
            inside = mask & (where >= storage.start) & (where + size <= storage.end)
            if inside.any():
                self.clashes += storage.touch(where[inside] - storage.start, size, kind, program)
                allowed |= inside
        for role in ("read", "write") if kind == "atomic" else (kind,):
            self.asked[role] += int(mask.sum()) * size
        self.stray += int((mask & ~allowed).sum()) * size
        return allowed

    def unique(self) -> tuple[int, int]:
        """Bytes at different addresses that were read, and written."""
        read, written = (
            sum(int(s.sizes[kind].sum(dtype=np.int64)) for s in self.storages) for kind in ("read", "write")
        )
        return read, written
