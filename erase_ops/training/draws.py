"""Random numbers of a training: every process's own stream, or one generator for each sample of a step.

A sample's generator depends on (seed, step, number of the sample in the step) alone, counted over all batches of all
processes. So it does not matter how a step's samples are spread over processes and accumulated batches: two processes
train what one would, and a run that goes on from a checkpoint needs no generator's state.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy
import torch
from torch import Tensor


def seeded_generator(seed: int, *key: int) -> torch.Generator:
    """A generator of the CPU for one of several independent streams of a seed.

    Keys in use: `(0,)` initial weights, `(0, 1)` windows that are skipped at random, `(1 + rank,)` a process's own
    stream, `(1, step, 0)` what the samples of a step share, `(1, step, 1 + sample)` a sample.
    """
    return torch.Generator().manual_seed(int(numpy.random.SeedSequence([seed, *key]).generate_state(1)[0]))


class RowDraws(Protocol):
    """Random numbers for the rows of one batch; all of them on the CPU."""

    @property
    def shared(self) -> torch.Generator:
        """For what all rows have in common."""
        ...

    def integers(self, high: int, rows: int) -> Tensor:
        """`[rows]` int64, uniform in 0..high-1."""
        ...

    def normal(self, rows: int, shape: Sequence[int]) -> Tensor:
        """`[rows, *shape]` float32, standard normal."""
        ...

    def permutations(self, length: int, rows: int) -> Tensor:
        """`[rows, length]` int64, a permutation of 0..length-1 in each row."""
        ...


@dataclass(frozen=True, eq=False)
class StreamDraws:
    """All rows from one generator, one after another."""

    shared: torch.Generator

    def integers(self, high: int, rows: int) -> Tensor:
        return torch.randint(high, (rows,), generator=self.shared)

    def normal(self, rows: int, shape: Sequence[int]) -> Tensor:
        return torch.randn((rows, *shape), generator=self.shared)

    def permutations(self, length: int, rows: int) -> Tensor:
        return torch.stack([torch.randperm(length, generator=self.shared) for _ in range(rows)])


@dataclass(frozen=True, eq=False)
class SampleDraws:
    """Each row from its own generator.

    Args:
        shared: what all samples of the step, of every process, draw in common.
        samples: one for each row.
    """

    shared: torch.Generator
    samples: Sequence[torch.Generator]

    def integers(self, high: int, rows: int) -> Tensor:
        return torch.cat([torch.randint(high, (1,), generator=sample) for sample in self._of(rows)])

    def normal(self, rows: int, shape: Sequence[int]) -> Tensor:
        return torch.stack([torch.randn(tuple(shape), generator=sample) for sample in self._of(rows)])

    def permutations(self, length: int, rows: int) -> Tensor:
        return torch.stack([torch.randperm(length, generator=sample) for sample in self._of(rows)])

    def _of(self, rows: int) -> Sequence[torch.Generator]:
        assert rows == len(self.samples), f"{len(self.samples)} samples, asked for {rows}"
        return self.samples


@dataclass(frozen=True, eq=False)
class Draws:
    """What the loop gives a method for one batch.

    Args:
        stream: the process's own generator, whose state checkpoints keep.
        seed: the training's.
        step: the optimiser step, from 1.
        batch: number of the batch among the step's, over all processes: 0 up to processes * accumulation - 1.
    """

    stream: torch.Generator
    seed: int = 0
    step: int = 1
    batch: int = 0

    def samples(self, rows: int) -> SampleDraws:
        """One generator for each of the batch's `rows` samples; every batch of the step must have as many."""
        first = 1 + self.batch * rows
        return SampleDraws(
            seeded_generator(self.seed, 1, self.step, 0),
            [seeded_generator(self.seed, 1, self.step, first + row) for row in range(rows)],
        )
