"""The demo's page: one HTML file with every picture in it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import expunge
from expunge.demo_run.pictures import data_uri, to_images

if TYPE_CHECKING:
    from expunge.demo_run.result import DemoResult

TEMPLATE = "page.html.j2"
SHOWN = 12  # untouched objects on the page; results.json has all


@dataclass(frozen=True)
class Pair:
    """One picture before and after, with what the classifier read in each."""

    prompt: str
    seed: int
    before: str
    after: str
    read_before: str
    read_after: str
    seen_before: str
    seen_after: str
    gate: float
    gate_of: str
    same: bool
    present: bool
    gone: bool


@dataclass(frozen=True)
class Strip:
    """The pairs of one concept."""

    title: str
    pairs: list[Pair]


def render(result: DemoResult) -> str:
    """The page as HTML text; texts are escaped, pictures are inlined."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters["duration"] = duration
    environment.filters["percent"] = lambda share: f"{round(100 * share.value, 1):g}"
    untouched = result.untouched()
    by_object: dict[str, list[int]] = {}
    for index in untouched:
        by_object.setdefault(result.shots[index].object, []).append(index)
    return environment.get_template(TEMPLATE).render(
        result=result,
        version=expunge.__version__,
        headline=headline(result),
        trained=strips(result, "trained"),
        shipped=strips(result, "shipped"),
        untouched=[strip(result, name, chosen) for name, chosen in list(by_object.items())[:SHOWN]],
        untouched_total=len(by_object),
        identical=sum(result.same[index] for index in untouched),
        untouched_n=len(untouched),
        rows=result.rows,
    )


def duration(seconds: float) -> str:
    """A time as a person reads it."""
    return f"{seconds / 60:.1f} min" if seconds >= 90 else f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.1f} s"


def headline(result: DemoResult) -> dict[str, Any]:
    """The figures at the top of the page."""
    erased = next(row for row in result.rows if row.group == "trained")
    kept = [row for row in result.rows if row.group == "untouched"]
    return {"erased": erased, "kept": kept[0], "second": kept[-1], "seconds": sum(result.seconds.values())}


def strips(result: DemoResult, group: str) -> list[Strip]:
    """One strip for each erased concept of a group."""
    words = dict.fromkeys(shot.erased for shot in result.shots if shot.group == group)
    return [
        strip(result, str(word), [index for index, shot in enumerate(result.shots) if shot.erased == word])
        for word in words
    ]


def strip(result: DemoResult, title: str, chosen: Sequence[int]) -> Strip:
    before, after = to_images(result.before[list(chosen)]), to_images(result.after[list(chosen)])
    return Strip(title, [pair(result, index, a, b) for index, a, b in zip(chosen, before, after, strict=True)])


def pair(result: DemoResult, index: int, before: Any, after: Any) -> Pair:
    shot, (read_before, read_after) = result.shots[index], result.readings[index]
    place = 1 if shot.wants == "style" else 0
    asked = getattr(shot, shot.wants)
    gates = result.gates[index]
    gate_of = max(gates, key=lambda concept: gates[concept]) if gates else ""
    return Pair(
        prompt=shot.prompt,
        seed=shot.seed,
        before=data_uri(before),
        after=data_uri(after),
        read_before=", ".join(read_before),
        read_after=", ".join(read_after),
        seen_before=read_before[place],
        seen_after=read_after[place],
        gate=gates.get(gate_of, 0.0),
        gate_of=gate_of,
        same=result.same[index],
        present=read_before[place] == asked,
        gone=read_after[place] != asked,
    )
