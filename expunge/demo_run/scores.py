"""What the classifier reads before and after, as shares with confidence intervals."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from expunge.demo.scoring import Share
from expunge.demo_run.plan import Group, Shot


@dataclass(frozen=True)
class Words:
    """What a demo calls the two things that its classifier reads, and whose method it shows.

    Args:
        object: the first reading, in words.
        style: the second.
        method: the method's name.
        paper: its address.
        told: how the concept was erased, in a sentence or two.
        step: the phase that does so, a name in the result's seconds.
        gated: whether prompts pass through as much of the erasure as they call for, or all through all of it.
    """

    object: str = "object"
    style: str = "style"
    method: str = "concept-semipermeable membranes (arXiv 2312.16145)"
    paper: str = "https://arxiv.org/abs/2312.16145"
    told: str = "A small text-to-image model was taught to forget one concept here and now, on this machine."
    step: str = "train"
    gated: bool = True


DIFFUSION = Words()


@dataclass(frozen=True)
class Score:
    """One line of the demo's table: a group of pictures, and one of the classifier's two readings of it.

    Args:
        label: what is measured, in words.
        group: the group of pictures.
        erased: the erased concept; None for what must not change.
        before: share of the base model's pictures that show what the prompt asks for.
        after: the same share with the erasures in place.
    """

    label: str
    group: Group
    erased: str | None
    before: Share
    after: Share

    def to_dict(self) -> dict[str, Any]:
        return {
            "label": self.label,
            "group": self.group,
            "erased": self.erased,
            "before": share_dict(self.before),
            "after": share_dict(self.after),
        }


def share_dict(share: Share) -> dict[str, Any]:
    return {"hits": share.hits, "n": share.n, "value": share.value, "interval_95": list(share.interval)}


def scores(shots: Sequence[Shot], before: Any, after: Any, words: Words = DIFFUSION) -> list[Score]:
    """The table: for each erased concept whether it is seen, and what else the prompt names; then all untouched ones.

    Args:
        shots: the pictures.
        before: the classifier's `Reading` of the base model's pictures.
        after: its reading of the erased model's.
        words: what the readings are called.
    """
    rows: list[Score] = []
    for word in dict.fromkeys(shot.erased for shot in shots if shot.erased is not None):
        chosen = [index for index, shot in enumerate(shots) if shot.erased == word]
        group, wants = shots[chosen[0]].group, shots[chosen[0]].wants
        other = "style" if wants == "object" else "object"
        rows.append(row(f"{word}: is it there?", group, word, shots, chosen, wants, before, after))
        rows.append(
            row(f"{word}: is the {getattr(words, other)} as asked?", group, word, shots, chosen, other, before, after)
        )
    chosen = [index for index, shot in enumerate(shots) if shot.erased is None]
    for what in ("object", "style"):
        label = f"everything else: {getattr(words, what)} as asked?"
        rows.append(row(label, "untouched", None, shots, chosen, what, before, after))
    return rows


def row(
    label: str,
    group: Group,
    erased: str | None,
    shots: Sequence[Shot],
    chosen: Sequence[int],
    what: str,
    before: Any,
    after: Any,
) -> Score:
    def share(reading: Any) -> Share:
        read = reading.objects if what == "object" else reading.styles
        return Share(sum(read[index] == getattr(shots[index], what) for index in chosen), len(chosen))

    return Score(label, group, erased, share(before), share(after))


def identical(before: Tensor, after: Tensor) -> list[bool]:
    """For each picture of [B, 3, H, W] whether it is the same, bit for bit."""
    return [torch.equal(a, b) for a, b in zip(before, after, strict=True)]
