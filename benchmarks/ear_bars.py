"""The table of EAR on the bundled autoregressive model. Exit status 0 when every row with a bar holds.

    python benchmarks/ear_bars.py [--seeds 3] [--pictures 96] [--concept star] [--work FOLDER] [--json FILE]

Pictures are drawn at held-out seeds, by templates that no erasure was fitted on, with the model's own guidance and
temperature, and read by its classifier. Shares stand with 95 % Wilson intervals, pooled over the seeds, each of which
has an erasure and pictures of its own. With `--work`, what was measured is kept there, and a run that was cut off goes
on; measurements of other weights or presets are not taken.
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ear_invariants
import torch
from bars import Bar, kept, print_table, verdict, write_json
from ear_runs import Bench, Make, Measured, pooled

from expunge.demo_ar.scoring import Readings
from expunge.demo_run.autoregressive import run_ar_demo
from expunge.erase_ops.shares import Share


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pictures", type=int, default=96, help="of each shape, for each seed")
    parser.add_argument("--before", type=int, default=512, help="the same before erasing; 512: 32 of each class")
    parser.add_argument("--concept", default="star")
    parser.add_argument("--work", type=Path, help="keep measurements here, and take those that are there")
    parser.add_argument("--json", type=Path, help="also write the rows into this file")
    given = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(given.concept, range(given.seeds), given.pictures, given.work or Path(folder))
        plain = bench.measure("plain", bench.plain)
        rows = [
            *before_rows(bench, given.before),
            *after_rows(bench, plain),
            *control_rows(bench, pooled(plain)),
            *masking_rows(bench),
            *kept(bench.work, f"{bench.key}-invariants", ear_invariants.rows),
            *kept(bench.work, f"{bench.key}-demo-{given.concept}", lambda: demo_rows(given.concept)),
        ]
    if given.json:
        write_json(given.json, rows)
    print_table("EAR", rows)
    return verdict(rows)


def before_rows(bench: Bench, pictures: int) -> list[Bar]:
    """The model itself: each shape, each colour, and each of the classes (shape, colour, background)."""
    readings, tables = pooled(bench.measure("before", None, pictures)), bench.tables
    rows = []
    for what, names in (("shape", tables["shapes"]), ("colour", tables["colours"])):
        shares = {name: readings.share(what, **{what: name}) for name in names}
        lowest = min(shares, key=lambda name: shares[name].value)
        found, figures = f"{lowest} {shares[lowest]}", {name: share.value for name, share in shares.items()}
        holds = shares[lowest].value >= 0.95
        rows.append(Bar(f"bundled model before: lowest {what}", ">= 95 %", found, holds, figures))
    kinds = itertools.product(tables["shapes"], tables["colours"], tables["backgrounds"])
    classes = {" ".join(kind): class_share(readings, *kind) for kind in kinds}
    lowest = min(classes, key=lambda name: classes[name].value)
    high = sum(share.value >= 0.95 for share in classes.values())
    what = "bundled model before: single classes, shape and colour and background as asked"
    found = f"lowest: {lowest} {classes[lowest]}; {high} of {len(classes)} classes at 95 % or more; all: "
    found += str(readings.share("all"))
    rows.append(Bar(what, "reported", found, True, {name: share.value for name, share in classes.items()}))
    return rows


def class_share(readings: Readings, shape: str, colour: str, background: str) -> Share:
    return readings.share("all", shape=shape, colour=colour, background=background)


def after_rows(bench: Bench, measured: Sequence[Measured]) -> list[Bar]:
    """The shipped setting."""
    readings, concept, shapes = pooled(measured), bench.concept, bench.tables["shapes"]
    target, others = sides(readings, concept)
    each = {shape: readings.share("shape", shape=shape) for shape in shapes if shape != concept}
    worst, colour = min(each, key=lambda name: each[name].value), readings.share("colour")
    single = min(one.readings.share("shape", shape=name).value for one in measured for name in each)
    found = f"{worst} {each[worst]}; lowest of a single seed {single:.1%}"
    figures = {name: share.value for name, share in each.items()}
    seconds, wall = (max(one.notes[name] for one in measured) for name in ("processor_seconds", "seconds"))
    return [
        Bar(f"after erasing {concept}: {concept}", "<= 2 %", str(target), target.value <= 0.02),
        Bar(f"after erasing {concept}: mean of other shapes", ">= 97 %", str(others), others.value >= 0.97),
        Bar(f"after erasing {concept}: worst other shape", ">= 90 %", found, each[worst].value >= 0.90, figures),
        Bar(f"after erasing {concept}: colour, all shapes", ">= 97 %", str(colour), colour.value >= 0.97),
        Bar(
            "erasing time: longest of the seeds, one thread",
            "<= 90 s on two cores",
            f"{seconds:.0f} s of processor time, {wall:.0f} s on the clock",
            wall <= 90,
        ),
    ]


def sides(readings: Readings, concept: str) -> tuple[Share, Share]:
    """Shares of the erased shape and of all others."""
    return readings.share("shape", shape=concept), readings.others("shape", concept)


def demo_rows(concept: str) -> list[Bar]:
    """`expunge demo --family ar`, as a user runs it."""
    with tempfile.TemporaryDirectory() as folder:
        result = run_ar_demo(folder, concept=concept)
    seconds = sum(result.seconds.values())
    target, kept_shapes = (next(row for row in result.rows if row.group == group) for group in ("trained", "untouched"))
    found = f"{seconds:.0f} s; {concept} {target.before} / {target.after}; others {kept_shapes.before} / "
    what = f"expunge demo --family ar --concept {concept}: time on the clock; before / after"
    return [Bar(what, "< 120 s", found + str(kept_shapes.after), seconds < 120, dict(result.seconds))]


# ------------------------------------------------------------------------------------------------------------ controls


def control_rows(bench: Bench, plain: Readings) -> list[Bar]:
    """Each control must be worse than the shipped setting outside the intervals where its row says so, and must not be
    better on the other side: a random change of equal norm leaves the model as it was, so that it can be beaten on the
    target alone; one that is strong enough to erase is beaten on what it takes with it."""
    controls: tuple[tuple[str, str, Make, tuple[str, ...]], ...] = (
        ("random-1", "random change of equal norm", bench.random(1.0), ("target",)),
        (
            "random-erases",
            "random change, doubled until the target is at chance",
            bench.random_that_erases,
            ("others",),
        ),
        (
            "stateless",
            "stateless prefix, our retain term and settings",
            bench.trained(prefix_mode="stateless"),
            ("target",),
        ),
        (
            "stateless-bare",
            "stateless prefix, no retain term, as published",
            bench.trained(prefix_mode="stateless", retain=()),
            ("target", "others"),
        ),
    )
    return [control_row(name, bench.measure(key, make), bench, plain, on) for key, name, make, on in controls]


def control_row(name: str, measured: Sequence[Measured], bench: Bench, plain: Readings, on: tuple[str, ...]) -> Bar:
    """`on`: where the control must be beaten outside both intervals."""
    readings = pooled(measured)
    (target, others), (our_target, our_others) = (sides(one, bench.concept) for one in (readings, plain))
    apart = {
        "target": (target.interval[0] > our_target.interval[1], our_target.interval[0] > target.interval[1]),
        "others": (our_others.interval[0] > others.interval[1], others.interval[0] > our_others.interval[1]),
    }
    holds = all(apart[side][0] for side in on) and not any(better for _, better in apart.values())
    text = " and ".join(f"on {'the target' if side == 'target' else 'others'}" for side in on)
    free = "" if len(on) == 2 else f"; no better on {'others' if on == ('target',) else 'the target'}"
    found = shown(bench.concept, readings)
    if "times" in measured[0].notes:
        times = ", ".join(f"{one.notes['times']:g}" for one in measured)
        found += f"; norms {times} times ours"
    figures = {side: {"beaten": beaten, "better": better} for side, (beaten, better) in apart.items()}
    return Bar(f"control: {name}", f"beaten {text} outside the intervals{free}", found, holds, figures)


def shown(concept: str, readings: Readings) -> str:
    target, others = sides(readings, concept)
    return f"{concept} {target}; others {others}; colour {readings.share('colour')}"


# ------------------------------------------------------------------------------------------------------------- masking


def masking_rows(bench: Bench) -> list[Bar]:
    """Half of the windows masked by their loss, against exactly as many left out at random, with and without the retain
    term: printed, and said whether the intervals part."""
    rows = []
    for with_retain in (True, False):
        fields: dict[str, Any] = {} if with_retain else {"retain": ()}
        name, key = ("with", "retain") if with_retain else ("without", "bare")
        masked = bench.measure(f"quantile-{key}", bench.trained(threshold_quantile=0.5, **fields))
        shares = {
            seed: one.notes["skipped"] / one.notes["windows"] for seed, one in zip(bench.seeds, masked, strict=True)
        }
        control = bench.trained(threshold=0.0, random_skip=shares.__getitem__, **fields)
        random = bench.measure(f"skip-{key}", control)
        counts = [[int(one.notes["skipped"]) for one in each] for each in (masked, random)]
        (target, others), (target_r, others_r) = (sides(pooled(each), bench.concept) for each in (masked, random))
        said = f"target {compared(target_r, target)}, others {compared(others, others_r)}"
        title = f"{name} the retain term"
        found = f"{shown(bench.concept, pooled(masked))}; {counts[0]} of {int(masked[0].notes['windows'])} skipped"
        rows.append(Bar(f"masking: quantile threshold 0.5, {title}", f"printed: {said}", found, True))
        found = f"{shown(bench.concept, pooled(random))}; {counts[1]} skipped"
        rows.append(Bar(f"masking: as many windows skipped at random, {title}", "printed", found, True))
    bare = pooled(bench.measure("unmasked-bare", bench.trained(threshold=0.0, retain=())))
    rows.append(Bar("no masking, without the retain term", "printed", shown(bench.concept, bare), True))
    return rows


def compared(more: Share, less: Share) -> str:
    """Whether masking by loss is better, where `more` should be above `less`."""
    if more.interval[0] > less.interval[1]:
        return "better outside the intervals"
    return "worse outside the intervals" if less.interval[0] > more.interval[1] else "the same within the intervals"


if __name__ == "__main__":
    raise SystemExit(main())
