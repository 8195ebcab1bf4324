"""What a comparison found: one row for each method and concept."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from expunge.compare.trials import Trial
from expunge.demo.scoring import Share
from expunge.demo_run.plan import Shot


@dataclass(frozen=True)
class Row:
    """One method on one concept.

    Args:
        row: the method or variant.
        concept: what was erased.
        target: share of the concept's pictures in which it is seen, before and after.
        beside: share of them whose other half (the style of an object, the object of a style) is as asked.
        objects: share of the other pictures whose object is as asked.
        styles: the same of their style.
        others: share of both readings of the other pictures, as one.
        drift: squared relative change of the predictions for the empty prompt and for unrelated ones.
        seconds: wall time of the training.
        cpu_seconds: processor time of it.
        peak_memory_mib: resident memory above what the loaded model takes, at its peak.
        bytes: of the erasure's tensors on disk.
    """

    row: str
    concept: str
    target: tuple[Share, Share]
    beside: tuple[Share, Share]
    objects: tuple[Share, Share]
    styles: tuple[Share, Share]
    others: tuple[Share, Share]
    drift: dict[str, float]
    seconds: float
    cpu_seconds: float
    peak_memory_mib: float
    bytes: int

    @property
    def fall(self) -> float:
        """By how many points the accuracy of the other concepts falls."""
        return 100 * (self.others[0].value - self.others[1].value)

    def line(self) -> str:
        """The row in a few words."""
        before, after = self.target
        return f"{100 * before.value:.1f} % -> {100 * after.value:.1f} %, others fall by {self.fall:.2f} points"


@dataclass(frozen=True)
class Strips:
    """What the grid shows of one concept.

    Args:
        columns: what each column's prompt asks for, in a few words.
        split: the first column of other concepts.
        rows: uint8 `[3, H, W]` pictures by row of the comparison, the base model's first ("base").
    """

    columns: Sequence[str]
    split: int
    rows: Mapping[str, Sequence[Any]]


@dataclass
class Comparison:
    """All rows, what they were measured with, and where the files are."""

    rows: list[Row]
    sizes: dict[str, Any]
    folder: Path

    def to_dict(self) -> dict[str, Any]:
        """What `results.json` holds."""
        return self.sizes | {"rows": [asdict(row) | {"fall": row.fall} for row in self.rows]}


def score(trial: Trial, shots: Sequence[Shot], base: Sequence[Sequence[str]], record: dict[str, Any]) -> Row:
    """The row of a trial.

    Args:
        trial: the method and the concept.
        shots: the pictures.
        base: (object, style) read in each of the base model's.
        record: of the erased model: `read` like `base`, `drift`, and the costs of the training.
    """
    asked = [(shot.object, shot.style) for shot in shots]
    of_target = [index for index, shot in enumerate(shots) if shot.erased is not None]
    of_others = [index for index, shot in enumerate(shots) if shot.erased is None]
    place = 1 if shots[0].wants == "style" else 0

    def pair(chosen: Sequence[int], places: Sequence[int]) -> tuple[Share, Share]:
        def share(read: Sequence[Sequence[str]]) -> Share:
            hits = sum(read[index][which] == asked[index][which] for index in chosen for which in places)
            return Share(hits, len(chosen) * len(places))

        return share(base), share(record["read"])

    return Row(
        trial.row,
        trial.concept,
        target=pair(of_target, [place]),
        beside=pair(of_target, [1 - place]),
        objects=pair(of_others, [0]),
        styles=pair(of_others, [1]),
        others=pair(of_others, [0, 1]),
        drift=record["drift"],
        seconds=record["seconds"],
        cpu_seconds=record["cpu_seconds"],
        peak_memory_mib=record["peak_memory_mib"],
        bytes=record["bytes"],
    )
