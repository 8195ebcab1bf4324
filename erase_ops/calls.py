"""The calls that are open around a denoiser: a pipeline's, with what its denoiser calls share, or forced gates.

They belong to a thread or task, not to the attachment, so that two pipelines may use one denoiser at once and an
attachment can be copied at any time.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from expunge.erase_ops.merge import Mode, Route
from expunge.erase_ops.permeability import CallInfo, ConceptBank, GateRecord, decide

if TYPE_CHECKING:
    from expunge.erase_ops.entry import Attachment

REMEMBERED = 4  # text states and routes kept in one pipeline call: separate guidance calls alternate between two


@dataclass(eq=False)
class Decision:
    """Gates `[B, N]` and the text states that they were decided for; kept alive, so that identity means equality."""

    states: Tensor
    version: int
    gates: Tensor
    record: GateRecord


@dataclass(eq=False)
class CallState:
    """One pipeline call: what its denoiser calls have in common.

    Attributes:
        info: what the pipeline knows.
        records: the gate records of the call, one for each change of the gates; the last is the latest.
        checked: the denoiser that the structural check of this call has passed on.
        decisions: the latest ones.
        routes: the latest ones, by what they depend on.
        latest: the latest decision, whether it may be merged, and its route: what nearly every step asks for again.
    """

    owner: Attachment
    info: CallInfo
    records: list[GateRecord] = field(default_factory=list)
    checked: nn.Module | None = None
    decisions: list[Decision] = field(default_factory=list)
    routes: dict[tuple[Any, ...], Route] = field(default_factory=dict)
    latest: tuple[Decision, bool, Route] | None = None

    def decide(self, bank: ConceptBank, states: Any) -> Decision:
        """The gates for text states: those decided before for this very tensor, unless it was written to since."""
        # Inference tensors do not tell whether they were written to, and are looked at every time.
        version = -1 if not isinstance(states, Tensor) or states.is_inference() else states._version
        for known in self.decisions:
            if known.states is states and known.version == version >= 0:
                return known
        gates, record = decide(bank, states, self.info)
        if not self.records or not _same(self.records[-1], record):
            self.records.append(record)
        decision = Decision(states, version, gates, record)
        if version >= 0:
            self.decisions = [*self.decisions[1 - REMEMBERED :], decision]
        return decision

    def keep(self, key: tuple[Any, ...], route: Route) -> None:
        """Remembers a route; of merged weights, only the latest."""
        others = [(k, r) for k, r in self.routes.items() if k != key and r.mode is not Mode.MERGED]
        self.routes = dict(others[1 - REMEMBERED :]) | {key: route}


@dataclass(eq=False)
class Force:
    """Gates given from outside, for training and tests.

    Args:
        owner: the attachment.
        gates: `[B, N]`, or `[1, N]` for all rows.
        active: the SPMs with any gate that is not zero; None if the gates require a gradient.
        merge: whether merged weights may be used.
        merged: those of this block, once they are there.
    """

    owner: Attachment
    gates: Tensor
    active: list[int] | None
    merge: bool = False
    merged: Route | None = None


# The innermost open call of this thread or task stands last.
_OPEN: ContextVar[tuple[CallState | Force, ...]] = ContextVar("expunge_open_calls", default=())


def innermost(owner: Attachment) -> CallState | Force | None:
    """The open call around an attachment's denoiser, or None for a bare call."""
    return next((state for state in reversed(_OPEN.get()) if state.owner is owner), None)


@contextmanager
def opened(state: CallState | Force) -> Iterator[None]:
    """Opens a call for the block; whatever ends it, nothing of it stays with the carriers."""
    token = _OPEN.set((*_OPEN.get(), state))
    try:
        yield
    finally:
        _OPEN.reset(token)
        state.owner.release()  # an interrupt skips the denoiser's forward hook


def _same(a: GateRecord, b: GateRecord) -> bool:
    return a.gates.shape == b.gates.shape and torch.equal(a.gates, b.gates) and a.sources == b.sources
