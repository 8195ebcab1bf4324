"""A linear head and its gated loss in chunks of rows and words: the CPU path of `fused_linear_loss`.

Formula, for a chunk of rows with states s [c, D], head W [V, D] and b [V], in float32 (float64 for float64 states):

    z = s Wᵀ + b        lse = log Σ_v exp z_v
    cross entropy:  l = w (lse - z_y)              dz = softmax(z) - onehot(y)
    KL:             l = w Σ_v q_v (log q_v - log softmax(z)_v),  q = softmax(s* Wᵀ + b)        dz = softmax(z) - q
    ds = dz W        dW += dzᵀ (f s)        db += dzᵀ f        f_r = w_r m_g(r)

s* are the composed states of the frozen model: a head is linear and the coefficients of its bias add up to 1, so that
z_t - eta (z_p - z_n) is the head of t - eta (p - n): one product with the head stands for three.

The gradient ds is made before it is known how many groups are kept and is scaled row by row in backward. Where the head
trains, its gradient sums over rows, so that a row's gate is needed at once: chunks then hold whole windows; windows
that are longer than a chunk are gone through twice, first for their losses, then, if they are kept, for the gradients.

Nothing of R x V elements is allocated: one buffer [chunk_rows, chunk_words], two for KL, and slices of it. If the words
do not fit one tile, the logits are made a second time once the sum over all words is known.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.kernels.loss_gate import GatedLoss, group_sums, normaliser, open_groups, scale_rows, spread

CHUNK_ROWS = 128  # measured on CPUs: below 64 the products slow down, above 256 they gain nothing
SLICE = 1 << 18  # elements of a slice that passes through the element-wise steps: stays in a core's cache
CAST_WORDS = 4096  # rows of a half-precision head that are widened at a time


@dataclass(frozen=True)
class Problem:
    """What is to be computed; every tensor is detached, on one device.

    states [R, D], weight [V, D] and bias [V] in any floating dtype; teacher [R, D], the composed states, or None for
    cross entropy; labels [R] int64 within range, and valid [R] bool, or None; row_weights [R], or None; threshold [] or
    [G]. teacher, row_weights and threshold are in the dtype that everything is computed in.
    """

    states: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor | None
    valid: Tensor | None
    teacher: Tensor | None
    row_weights: Tensor | None
    threshold: Tensor
    window: int
    mean: bool


@dataclass(frozen=True)
class Wanted:
    """Which gradients are wanted."""

    states: bool
    weight: bool
    bias: bool

    @property
    def head(self) -> bool:
        return self.weight or self.bias


@dataclass(frozen=True)
class Result:
    """The loss, `factor` [R] = f / norm for the gradient of the states, and the gradients that were wanted, or None.

    `states` is ds in the states' dtype, not yet multiplied by `factor`; `weight` and `bias` are finished, in the
    dtype that everything is computed in.
    """

    gated: GatedLoss
    factor: Tensor
    states: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


def chunk_sizes(rows: int, words: int, chunk_rows: int | None, chunk_words: int | None, window: int) -> tuple[int, int]:
    """Rows and words of a chunk: never all rows with all words at once, and whole windows where they fit."""
    size = min(chunk_rows or CHUNK_ROWS, max(1, rows))
    if window <= size:
        size -= size % window
    tile = min(chunk_words or words, words)
    if size >= rows and tile >= words:
        if rows > 1 and (window == 1 or rows > window):
            size = max(window, rows // 2 - rows // 2 % window)
        else:
            tile = -(-words // 2)
    return size, tile


class Running:
    """Logarithm of the sum of exponentials of each row, over tiles of words that come one after another."""

    def __init__(self, like: Tensor) -> None:
        self.top, self.total = torch.full_like(like, -math.inf), torch.zeros_like(like)

    def add(self, z: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
        """Takes in z [r, t]; returns exp(z - top) and what sums over earlier tiles are to be multiplied by."""
        top = torch.maximum(self.top[rows], z.amax(1))
        shift = torch.where(top == -math.inf, 0, top)  # words with a bias of -inf only: their sum is 0, not NaN
        old = (self.top[rows] - shift).exp()
        weights = (z - shift[:, None]).exp_()
        self.top[rows], self.total[rows] = top, self.total[rows] * old + weights.sum(1)
        return weights, old

    def log(self) -> Tensor:
        return self.top + self.total.log()


def cuts(start: int, stop: int, size: int) -> list[tuple[int, int]]:
    """The range in pieces of `size`; the last may be smaller."""
    return [(first, min(first + size, stop)) for first in range(start, stop, size)]


class Chunks:
    """One pass over a `Problem`, or two, with buffers that are allocated once."""

    def __init__(self, problem: Problem, wanted: Wanted, chunk_rows: int | None, chunk_words: int | None) -> None:
        self.problem, self.wanted = problem, wanted
        (self.rows, width), self.words = problem.states.shape, problem.weight.shape[0]
        self.chunk, self.tile = chunk_sizes(self.rows, self.words, chunk_rows, chunk_words, problem.window)
        new, groups = problem.threshold.new_empty, -(-self.rows // problem.window)
        buffers = 0 if not self.rows else 1 if problem.teacher is None else 2
        self.buffers = [new(self.chunk * self.tile) for _ in range(buffers)]
        self.losses, self.factor, self.lse, self.teacher_lse = (new(self.rows) for _ in range(4))
        self.sums, self.kept = new(groups), new(groups, dtype=torch.bool)
        self.part = new(self.chunk, width)  # ds of a chunk, before it is rounded
        shape = (self.rows if wanted.states else 0, width)
        self.grad_states = new(shape, dtype=problem.states.dtype)
        self.grad_weight = new(problem.weight.shape).zero_() if wanted.weight else None
        self.grad_bias = new(self.words).zero_() if wanted.bias else None

    def run(self) -> Result:
        """The losses, the gates and the gradients."""
        long = self.problem.window > self.chunk  # the gate of a chunk's rows lies beyond the chunk
        first = long and self.wanted.head
        if first:
            for start, stop in self.row_chunks():
                self.take_losses(start, stop)
            self.take_gates(0, self.rows)
        for start, stop in self.row_chunks():
            if not first:
                self.take_losses(start, stop)
            if not long:
                self.take_gates(start, stop)
            if (not long or first) and not bool(self.factor[start:stop].any()):
                self.grad_states[start:stop] = 0
            elif self.wanted.states or self.wanted.head:
                self.take_gradients(start, stop, made=not first)
        if long and not first:
            self.take_gates(0, self.rows)
        return self.result()

    def row_chunks(self) -> list[tuple[int, int]]:
        return cuts(0, self.rows, self.chunk)

    def take_losses(self, start: int, stop: int) -> None:
        """Losses of a chunk's rows, and the logarithms of their sums, over one tile of words after another."""
        p, rows = self.problem, slice(start, stop)
        student, teacher = Running(self.lse[rows]), Running(self.teacher_lse[rows])
        score = torch.zeros_like(self.losses[rows])  # z_y, or Σ_v q_v (z_v* - z_v) before the division by Σ_v
        for first, last in cuts(0, self.words, self.tile):
            z, q = self.logits(start, stop, first, last)
            for part in cuts(0, stop - start, max(1, SLICE // (last - first))):
                cut = slice(*part)
                student.add(z[cut], cut)
                if q is not None:
                    weights, old = teacher.add(q[cut], cut)
                    gap = (q[cut] - z[cut]).mul_(weights).masked_fill_(weights == 0, 0)  # 0 log 0 = 0
                    score[cut] = score[cut] * old + gap.sum(1)
            if p.labels is not None:
                here = p.labels[rows] - first
                inside = (here >= 0) & (here < last - first)
                score += torch.where(inside, z.gather(1, here.clamp(0, last - first - 1)[:, None])[:, 0], 0)
        self.lse[rows], self.teacher_lse[rows] = student.log(), teacher.log()
        if p.labels is not None:
            losses = self.lse[rows] - score
        else:
            losses = score / teacher.total - self.teacher_lse[rows] + self.lse[rows]
        losses = losses if p.row_weights is None else losses * p.row_weights[rows]
        self.losses[rows] = losses if p.valid is None else torch.where(p.valid[rows], losses, 0)

    def take_gates(self, start: int, stop: int) -> None:
        """Sums and gates of the groups of whole windows, and the factor of each row before the division by norm."""
        p, rows = self.problem, slice(start, stop)
        groups = slice(start // p.window, -(-stop // p.window))
        threshold = p.threshold[groups] if p.threshold.ndim else p.threshold
        counts = None if p.valid is None else group_sums(p.valid[rows].int(), p.window)
        self.sums[groups] = group_sums(self.losses[rows], p.window)
        self.kept[groups] = open_groups(self.sums[groups], threshold, counts)
        kept = spread(self.kept[groups], p.window, stop - start)
        kept = kept if p.valid is None else kept & p.valid[rows]
        self.factor[rows] = kept if p.row_weights is None else torch.where(kept, p.row_weights[rows], 0)

    def take_gradients(self, start: int, stop: int, *, made: bool) -> None:
        """ds of a chunk, and what its rows add to dW and db; `made`: the logits of a single tile are still there."""
        p, rows = self.problem, slice(start, stop)
        part, states = self.part[: stop - start], p.states[rows].to(p.threshold.dtype)
        part.zero_()
        for first, last in cuts(0, self.words, self.tile):
            z, q = self.logits(start, stop, first, last, made=made and self.tile == self.words)
            self.softmax_gap(z, q, start, first)
            if self.wanted.states:
                for one, two, head in self.head(first, last):
                    part.addmm_(z[:, one - first : two - first], head)
            if not self.wanted.head:
                continue
            factor = self.factor[rows]
            z[factor == 0] = 0  # not by the product: 0 times what a row that takes no part may hold is no 0
            if self.grad_weight is not None:  # the c x D states take the factor, not the c x V logits
                self.grad_weight[first:last].addmm_(z.mT, scale_rows(states, factor, states.dtype))
            if self.grad_bias is not None:
                self.grad_bias[first:last].addmv_(z.mT, factor)
        if self.wanted.states:
            self.grad_states[rows] = part

    def logits(self, start: int, stop: int, first: int, last: int, made: bool = False) -> tuple[Tensor, Tensor | None]:
        """z and q of some rows and words, in the buffers; `made`: they are there already."""
        p, shape = self.problem, (stop - start, last - first)
        z, *rest = (buffer[: shape[0] * shape[1]].view(shape) for buffer in self.buffers)
        q = rest[0] if rest else None
        if made:
            return z, q
        states = p.states[start:stop].to(p.threshold.dtype)
        for one, two, head in self.head(first, last):
            words = slice(one - first, two - first)
            for out, rows in ((z, states), (q, None if p.teacher is None else p.teacher[start:stop])):
                if out is None or rows is None:
                    continue
                if p.bias is None:
                    torch.mm(rows, head.mT, out=out[:, words])
                else:
                    torch.addmm(p.bias[one:two].to(rows.dtype), rows, head.mT, out=out[:, words])
        return z, q

    def head(self, first: int, last: int) -> Iterator[tuple[int, int, Tensor]]:
        """The head's rows for some words in the dtype of computation; copies are made in small pieces."""
        weight, dtype = self.problem.weight, self.problem.threshold.dtype
        for one, two in cuts(first, last, last - first if weight.dtype == dtype else CAST_WORDS):
            yield one, two, weight[one:two].to(dtype)

    def softmax_gap(self, z: Tensor, q: Tensor | None, start: int, first: int) -> None:
        """z <- dz: softmax(z) - onehot(y), or softmax(z) - softmax(q), which overwrites q as well."""
        lse, teacher_lse = self.lse[start:], self.teacher_lse[start:]
        for one, two in cuts(0, z.shape[0], max(1, SLICE // z.shape[1])):
            part = z[one:two].sub_(lse[one:two, None]).exp_()
            if q is not None:
                part.sub_(q[one:two].sub_(teacher_lse[one:two, None]).exp_())
        if self.problem.labels is not None:
            here = self.problem.labels[start : start + z.shape[0]] - first
            inside = (here >= 0) & (here < z.shape[1])
            z.scatter_add_(1, here.clamp(0, z.shape[1] - 1)[:, None], -inside.to(z.dtype)[:, None])

    def result(self) -> Result:
        """What is left to do once all gates are known."""
        p = self.problem
        norm = normaliser(self.kept.sum(), p.threshold, p.mean)
        loss = torch.where(self.kept, self.sums, 0).sum() / norm
        for gradient in (self.grad_weight, self.grad_bias):
            if gradient is not None:
                gradient.div_(norm)
        gated = GatedLoss(loss, self.sums, self.kept.int())
        states = self.grad_states if self.wanted.states else None
        return Result(gated, self.factor / norm, states, self.grad_weight, self.grad_bias)
