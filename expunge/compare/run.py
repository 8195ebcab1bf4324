"""Runs a comparison: trains, erases, draws, reads and records; what is done already is not done again.

<folder>/base--<concept>.json, <row>--<concept>.json    what the classifier read, by picture; costs and drift
<folder>/<row>--<concept>/                              the erasure
<folder>/*.npy                                          the first pictures of each, for the grid
<folder>/grid.png, results.json, index.html             the result
"""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
from rich.console import Console

from expunge import demo, erase, restore
from expunge.compare.measure import Probe, cost, digest_of, tensor_bytes_of
from expunge.compare.result import Comparison, Row, Strips, score
from expunge.compare.trials import TARGETS, Trial, shots_of
from expunge.demo.scoring import GUIDANCE, STEPS, generate
from expunge.demo_run.plan import Shot
from expunge.erase_ops.formats.folders import replace_file
from expunge.erase_ops.kinds import load_erasure

logger = logging.getLogger(__name__)
BATCH = 32  # pictures drawn between two checkpoints
SHOWN = 5  # pictures of each group that the grid shows


class Runner:
    """One comparison.

    Args:
        folder: where everything goes; a second run goes on from what is there.
        targets: pictures of an erased concept.
        others: pictures of other concepts.
        seed: of trainings and of the first picture.
        console: says what is being done; None for silence.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        targets: int = TARGETS,
        others: int = 240,
        seed: int = 0,
        console: Console | None = None,
    ) -> None:
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        self.targets, self.others, self.seed, self.console = targets, others, seed, console
        self.pipe, self.judge, self.tables = demo.load(), demo.classifier(), demo.captions()
        self.probe = Probe(self.pipe)

    def run(
        self, rows: Sequence[str], concepts: Sequence[str], changes: dict[str, dict[str, Any]] | None = None
    ) -> Comparison:
        """Compares methods on concepts and writes the table, the grid and the page.

        Args:
            rows: names of `trials.row_names`.
            concepts: objects and styles of the bundled model.
            changes: fields of a row's config that replace its preset's.

        Raises:
            InvalidInputError: if a row or concept is unknown.
            OSError: if a file cannot be written.
        """
        from expunge.compare import page  # jinja2 is needed at the end alone

        trials = [Trial(row, word, self.seed, (changes or {}).get(row, {})) for row in rows for word in concepts]
        found: list[Row] = []
        for word in concepts:
            base = self._read(f"base--{word}", self._shots(word))
            for trial in (trial for trial in trials if trial.concept == word):
                found.append(score(trial, self._shots(word), base, self._measure(trial)))
                self._say(f"{trial.row} on {word}: {found[-1].line()}")
        comparison = Comparison(found, self._sizes(), self.folder)
        page.write(comparison, {word: self._strips(rows, word) for word in concepts})
        return comparison

    def _shots(self, concept: str) -> list[Shot]:
        return shots_of(concept, self.tables, targets=self.targets, others=self.others, seed=self.seed)

    def _sizes(self) -> dict[str, Any]:
        sampling = {"num_inference_steps": STEPS, "guidance_scale": GUIDANCE}
        return {"targets": self.targets, "others": self.others, "seed": self.seed, "sampling": sampling}

    def _measure(self, trial: Trial) -> dict[str, Any]:
        """The record of one trial."""
        folder = self.folder / trial.folder
        costs, settings = self.folder / f"{trial.folder}.costs.json", trial.settings()
        known = json.loads(costs.read_text(encoding="utf-8")) if costs.is_file() else {}
        if settings is None or known.get("settings") != settings:
            self._say(f"{trial.row}: erasing {trial.concept}")
            with cost() as found:
                trial.train(self.pipe, folder, progress=self.console is not None)
            known = found | {"bytes": tensor_bytes_of(folder), "settings": settings}
            self._write(costs, known)
        adapter = load_erasure(folder)
        erase(self.pipe, adapter)
        try:
            drift = self.probe.drift(self.pipe)
            read = self._read(trial.folder, self._shots(trial.concept), digest_of(folder))
        finally:
            restore(self.pipe)
        return known | {"drift": drift, "read": read}

    def _read(self, name: str, shots: Sequence[Shot], erasure: str = "") -> list[list[str]]:
        """What the classifier reads in each picture, (object, style); goes on after what an earlier run has read.

        What was read of another erasure, which `erasure` tells, does not count.
        """
        path = self.folder / f"{name}.json"
        asked = [[shot.prompt, shot.seed] for shot in shots]
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"asked": [], "read": []}
        done = min(len(known["read"]), len(asked))
        same = known["asked"][:done] == asked[:done] and known.get("erasure", "") == erasure
        read = known["read"][:done] if same else []
        while len(read) < len(shots):
            chunk = shots[len(read) : len(read) + BATCH]
            pictures = generate(
                self.pipe, [shot.prompt for shot in chunk], [shot.seed for shot in chunk], batch_size=BATCH
            )
            self._keep(name, len(read), pictures)
            reading = self.judge.classify(pictures)
            read += [list(pair) for pair in zip(reading.objects, reading.styles, strict=True)]
            self._write(path, {"asked": asked[: len(read)], "read": read, "erasure": erasure})
        return read[: len(shots)]

    def _keep(self, name: str, first: int, pictures: Any) -> None:
        """Keeps the pictures that the grid shows: the first of the concept and the first of others."""
        wanted = [*range(SHOWN), *range(self.targets, self.targets + SHOWN)]
        array = (pictures.clamp(0, 1) * 255).round().byte().numpy()  # [B, 3, 32, 32]
        for index in wanted:
            if first <= index < first + len(array):
                numpy.save(self.folder / f"{name}.{index}.npy", array[index - first])

    def _strips(self, rows: Sequence[str], word: str) -> Strips:
        """For the grid: the kept pictures of the concept and of others, of the base model and of each row."""
        shown = min(SHOWN, self.targets)
        wanted = [*range(shown), *range(self.targets, self.targets + min(SHOWN, self.others))]
        shots = self._shots(word)
        return Strips(
            [f"{shots[index].object}, {shots[index].style}" for index in wanted],
            shown,
            {"base": self._kept(f"base--{word}", wanted)}
            | {row: self._kept(Trial(row, word, self.seed).folder, wanted) for row in rows},
        )

    def _kept(self, name: str, wanted: Sequence[int]) -> list[Any]:
        return [numpy.load(self.folder / f"{name}.{index}.npy") for index in wanted]

    def _write(self, path: Path, record: dict[str, Any]) -> None:
        replace_file(path, (json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())

    def _say(self, text: str) -> None:
        logger.info(text)
        if self.console is not None:
            self.console.print(text, markup=False)
