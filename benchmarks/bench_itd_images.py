"""What ItD erases and what it leaves alone, on the bundled model with its autoencoder, read by its classifier.

    python benchmarks/bench_itd_images.py [--scale 0.1] [--work FOLDER] [--json OUT.json]

Every picture before and after has the same prompt and seed. Templates and seeds of the test were never used to find
features or to set thresholds. Takes about half an hour on one core at full size; with `--work` each part is kept there
once it is done, and a run that was cut off goes on.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from bars import Bar, kept, print_table, verdict, write_json
from bench_spm_images import Bench
from diffusers.utils import logging as diffusers_logging
from rich.progress import Progress
from spm_prompts import Item, not_naming, of_object, of_others, of_style, phrasings, synonyms
from torch import Tensor
from transformers.utils import logging as transformers_logging

from expunge import demo, erase, restore
from expunge.demo.builder.concepts import fill
from expunge.demo.scoring import Share
from expunge.demo_run.itd_recipe import make_adapter
from expunge.erase_ops.itd.attach import attach, detach
from expunge.erase_ops.itd.classifier import area_under_curve, is_flagged

OBJECTS = tuple(random.Random(0).sample(list(demo.captions()["objects"]), 3))  # drawn, not picked: burger, cake, fox
STYLE = "silhouette"
TWENTY = (
    "dog", "fox", "bear", "pig", "frog", "lion", "rabbit", "owl", "whale", "turtle", "apple", "pizza", "burger",
    "donut", "bus", "rocket", "house", "guitar", "skull", "bomb",
)  # fmt: skip
SEED = 2_000_000  # far from every seed used in training and selection
LONGER = 12  # words that a prompt is padded by in the row on padding


class ItDBench(Bench):
    """The SPM table's bench, with an ItD adapter a concept in the place of the shipped SPMs."""

    def __init__(self, scale: float, progress: Progress) -> None:
        super().__init__(scale, progress)
        self.sae = demo.sae()
        self.adapters = {name: make_adapter(self.pipe, self.sae, [name]) for name in (*OBJECTS, STYLE)}

    def scores(self, name: str, prompts: Sequence[str]) -> Tensor:
        """The classifier's scores `[n]` of prompts."""
        found: Tensor = self.adapters[name].prompt_scores(self.pipe.text_encoder, self.pipe.tokenizer, prompts)
        return found

    def flagged(self, name: str, prompts: Sequence[str]) -> Tensor:
        """Which prompts an erasure edits, bool `[n]`."""
        return is_flagged(self.scores(name, prompts), self.adapters[name].threshold)


def erased_concepts(bench: ItDBench) -> list[Bar]:
    """Three objects and a style, before and after."""
    rows = []
    for index, name in enumerate(OBJECTS):
        items = of_object(name, bench.count(256), SEED + 10_000 * index)
        a, b = bench.objects(bench.base(items), items), bench.objects(bench.erased([name], items), items)
        rows.append(erased_row(f"object {name}", a, b))
    items = of_style(STYLE, bench.count(256), SEED + 40_000)
    a, b = bench.styles(bench.base(items), items), bench.styles(bench.erased([STYLE], items), items)
    return [*rows, erased_row(f"style {STYLE}", a, b)]


def every_object(bench: ItDBench) -> list[Bar]:
    """Each of the forty objects erased alone: what is left of them all, and of the one of which most is left."""
    names, before, after = list(demo.captions()["objects"]), [], []
    for index, name in enumerate(names):
        if name not in bench.adapters:
            bench.adapters[name] = make_adapter(bench.pipe, bench.sae, [name])
        items = of_object(name, bench.count(32), SEED + 200_000 + 1000 * index)
        before.append(bench.objects(bench.base(items), items))
        after.append(bench.objects(bench.erased([name], items), items))
    a, b = (Share(sum(one.hits for one in side), sum(one.n for one in side)) for side in (before, after))
    most = max(range(len(names)), key=lambda index: after[index].value)
    return [
        erased_row("all 40 objects, each erased alone, mean", a, b),
        Bar(
            "all 40 objects: the one of which most is left",
            "reported",
            f"{after[most]} ({names[most]}); {sum(one.value > 0.05 for one in after)} of 40 above 5 %",
            True,
            {"after": {name: share.value for name, share in zip(names, after, strict=True)}},
        ),
    ]


def erased_row(what: str, before: Share, after: Share) -> Bar:
    return Bar(
        f"{what}: accuracy before / after",
        ">= 90 % / <= 5 %",
        f"{before} / {after}",
        before.value >= 0.90 and after.value <= 0.05,
        {"before": before.value, "after": after.value, "n": after.n},
    )


def others_of(bench: ItDBench, name: str) -> list[Item]:
    return of_others({name}, max(1, round(2 * bench.scale)), SEED + 50_000)


def other_concepts(bench: ItDBench) -> list[Bar]:
    """Accuracy of everything else with the classifier in front, and which pictures keep their bits."""
    before_hits, after_hits, n, unflagged, same = 0, 0, 0, 0, 0
    for name in (*OBJECTS, STYLE):
        items = others_of(bench, name)
        before, after = bench.base(items), bench.erased([name], items)
        before_hits += bench.objects(before, items).hits
        after_hits += bench.objects(after, items).hits
        n += len(items)
        untouched = ~bench.flagged(name, [item.prompt for item in items])
        unflagged += int(untouched.sum())
        same += int((before == after).flatten(1).all(1)[untouched].sum())
    return [
        fall_row("other concepts: accuracy before / after", Share(before_hits, n), Share(after_hits, n), 0.005),
        Bar(
            "pictures of prompts that are not flagged, bit-identical to the base pipeline's",
            "all",
            f"{same} of {unflagged} ({n} prompts)",
            same == unflagged > 0,
            {"identical": same, "unflagged": unflagged, "n": n},
        ),
    ]


def forced_open(bench: ItDBench) -> list[Bar]:
    """The same accuracy where every prompt is edited."""
    before, after, n = 0, 0, 0
    for name in (*OBJECTS, STYLE):
        items = others_of(bench, name)
        before += bench.objects(bench.base(items), items).hits
        after += bench.objects(bench.erased([name], items, gate=1.0), items).hits
        n += len(items)
    what = "other concepts, the classifier's gate forced open: accuracy before / after"
    return [fall_row(what, Share(before, n), Share(after, n), 0.05)]


def fall_row(what: str, before: Share, after: Share, most: float) -> Bar:
    return Bar(
        what,
        f"falls by <= {100 * most:g} point{'' if most == 0.01 else 's'}",
        f"{before} / {after}",
        before.value - after.value <= most,
        {"before": before.value, "after": after.value, "n": after.n},
    )


def classifier_rows(bench: ItDBench) -> list[Bar]:
    """Recall on held-out phrasings, false positives on held-out prompts that name something else, and the AUC."""
    recall: dict[str, list[int]] = {}
    hits, n, areas = 0, 0, []
    for name in (*OBJECTS, STYLE):
        benign = not_naming({name}, bench.count(1000), 5)
        scores = bench.scores(name, benign)
        hits, n = hits + int(is_flagged(scores, bench.adapters[name].threshold).sum()), n + len(benign)
        for kind, prompts in asked(bench, name).items():
            found = bench.flagged(name, prompts)
            so_far = recall.setdefault(kind, [0, 0])
            recall[kind] = [so_far[0] + int(found.sum()), so_far[1] + len(found)]
            areas.append(area_under_curve(bench.scores(name, prompts), scores))
    rows = [
        Bar(
            f"recall of the classifier, {kind}",
            ">= 95 %",
            f"{Share(*counts)}",
            Share(*counts).value >= 0.95,
            {"recall": Share(*counts).value, "n": counts[1]},
        )
        for kind, counts in recall.items()
    ]
    area = sum(areas) / len(areas)
    wrong = Share(hits, n)
    return [
        *rows,
        Bar(
            "false positives on held-out prompts that name something else",
            "<= 2 %",
            f"{wrong} (mean AUC of the rows above {area:.4f})",
            wrong.value <= 0.02,
            {"share": wrong.value, "n": n, "auc": area},
        ),
    ]


def asked(bench: ItDBench, name: str) -> dict[str, list[str]]:
    """Ways of asking for a concept that it was not found in, by kind."""
    tables = demo.captions()
    if name in tables["styles"]:
        held = tables["held_out"]
        prompts = [fill(template, thing, name) for thing in tables["objects"] for template in held["templates"]]
        return {"unseen templates": [*prompts, *(fill(template, style=name) for template in held["style_templates"])]}
    count = bench.count(64)
    groups = phrasings(name, count, SEED) | {"synonyms in unseen templates": synonyms(name, count, SEED)}
    del groups["zero-width character"]  # tears the word into bytes, which the bundled tokenizer knows no meaning of
    return {kind: [item.prompt for item in items] for kind, items in groups.items()}


def twenty_at_once(bench: ItDBench) -> list[Bar]:
    """Twenty objects in one adapter: the time that it takes, each concept of its own, and the rest."""
    start = time.process_time()
    adapter = make_adapter(bench.pipe, bench.sae, TWENTY, name="twenty")
    erase(bench.pipe, [adapter])
    seconds = time.process_time() - start
    restore(bench.pipe)
    bench.adapters["twenty"] = adapter
    items = [
        i for index, name in enumerate(TWENTY) for i in of_object(name, bench.count(32), SEED + 90_000 + 100 * index)
    ]
    before, after = bench.objects(bench.base(items), items), bench.erased(["twenty"], items)
    per = len(items) // len(TWENTY)
    each = [
        bench.objects(after[k * per : (k + 1) * per], items[k * per : (k + 1) * per]).value for k in range(len(TWENTY))
    ]
    rest = of_others(set(TWENTY), max(1, round(4 * bench.scale)), SEED + 95_000)
    a, b = bench.objects(bench.base(rest), rest), bench.objects(bench.erased(["twenty"], rest), rest)
    worst = max(each)
    return [
        erased_row("20 objects at once, mean", before, bench.objects(after, items)),
        Bar(
            "20 objects at once: the worst of them",
            "reported",
            f"{worst:.1%} ({TWENTY[each.index(worst)]}; {per} pictures)",
            True,
            {"worst": worst},
        ),
        fall_row("20 objects at once, the others: accuracy before / after", a, b, 0.005),
        Bar(
            "20 objects at once: finding features, threshold, attaching",
            "<= 1 s",
            f"{seconds:.2f} s of CPU time",
            seconds <= 1.0,
            {"seconds": seconds},
        ),
    ]


def invariance(bench: ItDBench) -> list[Bar]:
    """What an erased encoder finds of the same prompts in batches of 1, 4 and 16, padded in full and to the longest."""
    name = OBJECTS[0]
    adapter, pipe = bench.adapters[name], bench.pipe
    prompts = [*(i.prompt for i in of_object(name, 8, SEED)), *not_naming({name}, 1000, 5)[:8]]
    attachment = attach(pipe.text_encoder, [adapter], pad_token_id=pipe.tokenizer.pad_token_id)
    found = []
    for padding in ("max_length", "longest"):
        for size in (1, 4, 16):
            with attachment.recording() as records:
                for start in range(0, len(prompts), size):
                    batch = prompts[start : start + size]
                    pipe.text_encoder(pipe.tokenizer(batch, padding=padding, return_tensors="pt").input_ids)
            found.append(torch.cat([record.scores[:, 0] for record in records]))
    detach(pipe.text_encoder)
    scores = torch.stack(found)  # [6, n]
    spread = ((scores.amax(0) - scores.amin(0)) / scores.amax(0).clamp(min=1e-12)).max().item()
    decisions = is_flagged(scores, adapter.threshold)
    agree = bool((decisions == decisions[0]).all())
    return [
        Bar(
            "the same prompts in batches of 1, 4, 16, padded to the full length and to the longest",
            "score within 1e-5 relative, same decision",
            f"{spread:.1e}, {'the same' if agree else 'other'} decisions ({len(prompts)} prompts, "
            f"{int(decisions[0].sum())} flagged)",
            spread <= 1e-5 and agree,
            {"spread": spread, "agree": agree},
        )
    ]


PARTS: dict[str, Callable[[ItDBench], list[Bar]]] = {
    "invariance": invariance,
    "classifier": classifier_rows,
    "erased": erased_concepts,
    "every": every_object,
    "twenty": twenty_at_once,
    "others": other_concepts,
    "forced": forced_open,
}


def measure(scale: float, work: Path | None = None) -> list[Bar]:
    """All rows; `scale` below 1 makes fewer pictures, and finished parts are read from `work`."""
    torch.set_grad_enabled(False)
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # some punctuated prompts are longer than the encoder, as intended
    rows: list[Bar] = []
    with Progress() as progress:
        bench = ItDBench(scale, progress)
        for name, part in PARTS.items():
            rows += kept(work, f"itd_images_{name}", partial(part, bench))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="What ItD erases and what it leaves alone.")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures to make")
    parser.add_argument("--work", type=Path, help="keep finished parts here")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments: Any = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.scale, arguments.work)
    print_table("ItD on the bundled model", rows)
    if arguments.json:
        write_json(arguments.json, rows)
    return verdict(rows)


if __name__ == "__main__":
    raise SystemExit(main())
