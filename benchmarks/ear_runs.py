"""Erasures of the bundled autoregressive model and what its pictures show then: the measurements of `ear_bars.py`.

A measurement is one erasure at one seed; it is written into a folder as soon as it exists, and read from there when the
table is printed again, so that a run that was cut off goes on.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from expunge import demo_ar, erase, restore
from expunge.demo_ar.builder.world import fill
from expunge.demo_ar.recipe import training_fields
from expunge.demo_ar.scoring import Kind, Readings, read_pictures
from expunge.erase_ops.delta.adapter import DeltaAdapter
from expunge.erase_ops.ear.config import EARConfig
from expunge.erase_ops.ear.training import train_ear
from expunge.pipelines.janus import JanusPipeline

BATCH = 64
# Pictures of the bars, and those that a control's strength is chosen by; nothing else was ever drawn at these seeds.
FIRST_SEED, CHOOSING_SEED = 40_000_000, 50_000_000
Make = Callable[[int], "Made"]


@dataclass(frozen=True)
class Made:
    """An erasure, the log of its training, and how long it took on one thread."""

    delta: DeltaAdapter
    log: list[dict[str, float]] = field(default_factory=list)
    processor_seconds: float = 0.0
    seconds: float = 0.0


@dataclass(frozen=True)
class Measured:
    """What was read of the pictures, and what is to be known of the erasure."""

    readings: Readings
    notes: dict[str, float]


class Bench:
    """The model and its judge.

    Args:
        concept: the shape that is erased.
        seeds: of the erasures; each has pictures of its own.
        pictures: of each shape, for each seed; a multiple of 16 has every colour and background as often.
        work: where measurements are kept.
    """

    def __init__(self, concept: str, seeds: Sequence[int], pictures: int, work: Path) -> None:
        self.pipe, self.judge = JanusPipeline(*demo_ar.load()), demo_ar.classifier()
        self.concept, self.seeds, self.pictures, self.work = concept, seeds, pictures, work
        self.tables, self.key = demo_ar.captions(), state_of_the_package()
        work.mkdir(parents=True, exist_ok=True)

    def draw(self, first: int, pictures: int) -> Readings:
        """So many pictures of each shape, in all colours and backgrounds in turn, by templates that nothing was
        fitted on, read by the classifier."""
        tables, wanted, prompts = self.tables, [], []
        for shape in tables["shapes"]:
            for i in range(pictures):
                kind = Kind(shape, tables["colours"][i % 8], tables["backgrounds"][i // 8 % 2])
                wanted.append(kind)
                template = tables["held_out_templates"][i // 16 % 2]
                prompts.append(fill(template, kind.shape, kind.colour, kind.background))
        drawn = []
        for start in range(0, len(prompts), BATCH):
            part = prompts[start : start + BATCH]
            output = self.pipe(
                part,
                guidance_scale=demo_ar.GUIDANCE,
                temperature=demo_ar.TEMPERATURE,
                generator=[torch.Generator().manual_seed(first + start + i) for i in range(len(part))],
                output_type="pt",
            )
            drawn.append(output.images)
        return read_pictures(self.judge, torch.cat(drawn), wanted)

    def measure(self, name: str, make: Make | None, pictures: int | None = None) -> list[Measured]:
        """The readings of every seed, with an erasure of its own; without any if `make` is None."""
        return [self._measured(name, seed, make, pictures or self.pictures) for seed in self.seeds]

    def _measured(self, name: str, seed: int, make: Make | None, pictures: int) -> Measured:
        file = self.work / f"{self.key}-{name}-{self.concept}-{seed}-{pictures}.json"
        if not file.is_file():
            made = None if make is None else make(seed)
            if made is not None:
                erase(self.pipe, [made.delta])
            readings = self.draw(FIRST_SEED + 100_000 * seed, pictures)
            restore(self.pipe)
            record = {"notes": {} if made is None else notes(made)} | {
                side: [list(asdict(kind).values()) for kind in getattr(readings, side)] for side in ("wanted", "read")
            }
            file.write_text(json.dumps(record), encoding="utf-8")
        record = json.loads(file.read_text(encoding="utf-8"))
        wanted, read = ([Kind(*kind) for kind in record[side]] for side in ("wanted", "read"))
        return Measured(Readings(wanted, read), record["notes"])

    # -------------------------------------------------------------------------------------------------------- erasures

    def trained(self, **fields: Any) -> Make:
        """EAR with the demo's preset, but for `fields`; a callable among them is given the seed."""

        def make(seed: int) -> Made:
            given = {name: value(seed) if callable(value) else value for name, value in fields.items()}
            config = EARConfig.preset("demo", **training_fields(self.concept, seed=seed) | {"seed": seed} | given)
            log: list[dict[str, float]] = []
            start = time.process_time(), time.perf_counter()
            delta = train_ear(self.pipe, config, progress=False, callback=lambda step, metrics: log.append(metrics))
            return Made(delta, log, time.process_time() - start[0], time.perf_counter() - start[1])

        return make

    def plain(self, seed: int) -> Made:
        """The shipped setting; its delta stays in the folder, because controls are measured by it."""
        folder = self.work / f"{self.key}-delta-{self.concept}-{seed}"
        record = folder.with_suffix(".json")
        if record.is_file():
            return Made(DeltaAdapter.from_pretrained(folder), **json.loads(record.read_text(encoding="utf-8")))
        made = self.trained()(seed)
        made.delta.save_pretrained(folder)
        kept = {name: getattr(made, name) for name in ("log", "processor_seconds", "seconds")}
        record.write_text(json.dumps(kept), encoding="utf-8")
        return made

    def random(self, times: float) -> Make:
        """A change in a random direction, of so many times the norm that the plain erasure has in every weight."""

        def make(seed: int) -> Made:
            generator, values = torch.Generator().manual_seed(seed), {}
            for name, value in self.plain(seed).delta.values.items():
                base = self.pipe.language_model.get_parameter(name).detach()
                noise = torch.randn(base.shape, generator=generator)
                values[name] = base + noise * (times * (value - base).norm() / noise.norm())
            return Made(DeltaAdapter("random", [self.concept], values, component="language_model", family="janus"))

        return make

    def random_that_erases(self, seed: int) -> Made:
        """The smallest doubling of such a change after which the concept is drawn no more often than a guess among the
        shapes would. (Wrecked pictures are read as something, so that no random change takes a share to zero.)"""
        chance = 1 / len(self.tables["shapes"])
        for times in (2.0**power for power in range(12)):
            made = self.random(times)(seed)
            erase(self.pipe, [made.delta])
            share = self.draw(CHOOSING_SEED + 100_000 * seed, 64).share("shape", shape=self.concept)
            restore(self.pipe)
            if share.value <= chance:
                return Made(made.delta, [{"times": times}])
        raise RuntimeError(f"no random change of up to {times:g} times the norm takes {self.concept} to {chance:.0%}")


def state_of_the_package() -> str:
    """Of weights and preset: measurements of others are not taken for these."""
    digests = (demo_ar.path().parent / "checksums.json").read_text(encoding="utf-8")
    return hashlib.sha256(f"{digests}{sorted(EARConfig.PRESETS['demo'].items())}".encode()).hexdigest()[:8]


def notes(made: Made) -> dict[str, float]:
    """What of an erasure's making is told in the table."""
    log, found = made.log, {"processor_seconds": made.processor_seconds, "seconds": made.seconds}
    if log and "skipped" in log[0]:
        found |= {"windows": float(len(log)), "skipped": sum(step["skipped"] for step in log)}
    return found | {name: log[0][name] for name in ("times",) if log and name in log[0]}


def pooled(measured: Sequence[Measured]) -> Readings:
    """All seeds' pictures together."""
    readings = [one.readings for one in measured]
    return Readings([kind for one in readings for kind in one.wanted], [kind for one in readings for kind in one.read])
