"""The demo on the bundled autoregressive model: base pictures, EAR, erased pictures at the same seeds, files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from expunge import demo_ar, erase, restore
from expunge.demo_ar.builder.world import fill
from expunge.demo_ar.recipe import training_fields
from expunge.demo_run.plan import Shot
from expunge.demo_run.result import BATCH, DemoResult
from expunge.demo_run.run import phase, write
from expunge.demo_run.scores import Words, scores
from expunge.erase_ops.ear.config import EARConfig
from expunge.erase_ops.ear.training import train_ear
from expunge.pipelines.janus import JanusPipeline

TARGET_SEEDS, OTHER_SEEDS = 2, 1
WORDS = Words(
    "shape",
    "colour",
    "EAR with aligned prefixes (arXiv 2506.20151)",
    "https://arxiv.org/abs/2506.20151",
    told="A small model that draws token by token was taught to forget one concept here and now, on this machine.",
    gated=False,
)


def run_ar_demo(
    output_dir: str | Path,
    *,
    concept: str = "star",
    seed: int = 0,
    passes: int | None = None,
    console: Console | None = None,
) -> DemoResult:
    """Makes the bundled autoregressive model forget a shape or colour, and shows the difference.

    Writes to `output_dir`: the delta's artefact folder, `erased.png`, `untouched.png`, `results.json` and `index.html`,
    a page that stands alone.

    Args:
        output_dir: the folder; created if it is missing.
        concept: a shape or colour of the model.
        seed: of the training and of the first picture.
        passes: passes over the pairs; the preset's if None.
        console: shows progress; None for silence.

    Raises:
        InvalidInputError: if the model does not know the concept.
        OSError: if a file cannot be written.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    fields = training_fields(concept, seed=seed) | {"seed": seed}
    if passes is not None:
        fields["passes"] = passes
    config = EARConfig.preset("demo", **fields)
    seconds: dict[str, float] = {}
    with phase("Loading the bundled autoregressive model", seconds, "load", console):
        pipe, judge = JanusPipeline(*demo_ar.load()), demo_ar.classifier()
    shots = plan(concept, demo_ar.captions(), seed)
    with phase(f"Drawing {len(shots)} pictures with the base model", seconds, "before", console):
        before, _ = draw(pipe, shots)
    with phase(f'Training a delta that erases "{concept}"', seconds, "train", console):
        delta = train_ear(pipe, config, output_dir=folder / f"{concept}-ear", progress=console is not None)
    erase(pipe, [delta])
    try:
        with phase(f"Drawing them again with {concept} erased", seconds, "after", console):
            after, gates = draw(pipe, shots)
    finally:
        restore(pipe)
    with phase("Reading the pictures and writing the page", seconds, "score", console):
        seen, left = judge.classify(before), judge.classify(after)
        readings = [((seen.objects[i], seen.styles[i]), (left.objects[i], left.styles[i])) for i in range(len(shots))]
        rows = scores(shots, seen, left, WORDS)
        sampling = {"guidance_scale": demo_ar.GUIDANCE, "temperature": demo_ar.TEMPERATURE, "batch_size": BATCH}
        result = DemoResult(
            concept,
            [],
            shots,
            before,
            after,
            gates,
            readings,
            rows,
            delta.settings,
            dict(seconds),
            folder,
            words=WORDS,
            sampling=sampling,
        )
        write(result)
    return result


def plan(concept: str, tables: dict[str, Any], seed: int = 0) -> list[Shot]:
    """Every shape in every colour, on the first background, by a template that nothing was trained on; the erased
    concept more often."""
    template, ground = tables["held_out_templates"][0], tables["backgrounds"]
    shots: list[Shot] = []
    for shape in tables["shapes"]:
        for colour in tables["colours"]:
            erased = concept if concept in (shape, colour) else None
            for i in range(TARGET_SEEDS if erased else OTHER_SEEDS):
                number = seed + len(shots)
                text = fill(template, shape, colour, ground[i % len(ground)])
                shots.append(Shot(text, number, shape, colour, "trained" if erased else "untouched", erased))
    return sorted(shots, key=lambda shot: shot.erased is None)


def draw(pipe: Any, shots: Sequence[Shot]) -> tuple[Tensor, list[dict[str, float]]]:
    """The pictures [B, 3, H, W], and the gates of each if the pipeline is erased (else empty)."""
    pictures, gates = [], []
    for start in range(0, len(shots), BATCH):
        part = shots[start : start + BATCH]
        output = pipe(
            [shot.prompt for shot in part],
            guidance_scale=demo_ar.GUIDANCE,
            temperature=demo_ar.TEMPERATURE,
            generator=[torch.Generator().manual_seed(shot.seed) for shot in part],
            output_type="pt",
        )
        pictures.append(output.images)
        report = output.erasures
        gates += [{} if report is None else report.gates_of(row) for row in range(len(part))]
    return torch.cat(pictures), gates
