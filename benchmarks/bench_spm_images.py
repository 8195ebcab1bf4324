"""What the shipped SPMs erase and what they leave alone, on the bundled model, read by its classifier.

    python benchmarks/bench_spm_images.py [--scale 0.1] [--json OUT.json]

Every picture before and after has the same prompt and seed. Takes about twenty minutes on one core at full size.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from bars import Bar, print_table, verdict, write_json
from diffusers.utils import logging as diffusers_logging
from rich.progress import Progress
from spm_prompts import Item, not_naming, of_object, of_others, of_style, phrasings, synonyms
from torch import Tensor
from transformers.utils import logging as transformers_logging

from expunge import SPMAdapter, demo, erase, restore
from expunge.demo.scoring import Share, generate

OBJECTS = {"cat": 0.85, "panda": 0.90, "car": 0.90}  # lowest accuracy before
STYLE = "neon"
BATCH = 16
SEED = 1_000_000  # far from every seed used in training and selection


class Bench:
    """The pipeline, the classifier, the shipped adapters, and a store of pictures already made."""

    def __init__(self, scale: float, progress: Progress) -> None:
        self.pipe = demo.load()
        self.classifier = demo.classifier()
        self.adapters = {name: SPMAdapter.from_pretrained(folder) for name, folder in demo.adapters().items()}
        self.scale = scale
        self.progress = progress
        self.before: dict[Item, Tensor] = {}

    def count(self, full: int) -> int:
        return max(8, round(full * self.scale))

    def images(self, items: Sequence[Item], title: str) -> Tensor:
        # Full batches only: matrix products round by the batch's size, and pictures are compared bit by bit.
        padded = [*items, *[items[-1]] * (-len(items) % BATCH)]
        task = self.progress.add_task(title, total=len(padded))
        images = generate(
            self.pipe,
            [i.prompt for i in padded],
            [i.seed for i in padded],
            batch_size=BATCH,
            on_batch=lambda n: self.progress.advance(task, n),
        )
        self.progress.remove_task(task)
        return images[: len(items)]

    def base(self, items: Sequence[Item]) -> Tensor:
        """Pictures of the pipeline without erasures; each is made once."""
        missing = [i for i in dict.fromkeys(items) if i not in self.before]
        if missing:
            self.before |= dict(zip(missing, self.images(missing, "before"), strict=True))
        return torch.stack([self.before[i] for i in items])

    def erased(self, names: Sequence[str], items: Sequence[Item], **settings: Any) -> Tensor:
        """Pictures with the named SPMs attached."""
        erase(self.pipe, [self.adapters[name] for name in names], **settings)
        try:
            return self.images(items, f"after, {len(names)} SPM" + (f" {names[0]}" if len(names) == 1 else "s"))
        finally:
            restore(self.pipe)

    def objects(self, images: Tensor, items: Sequence[Item]) -> Share:
        seen = self.classifier.classify(images).objects
        return Share(sum(s == i.object for s, i in zip(seen, items, strict=True)), len(items))

    def styles(self, images: Tensor, items: Sequence[Item]) -> Share:
        seen = self.classifier.classify(images).styles
        return Share(sum(s == i.style for s, i in zip(seen, items, strict=True)), len(items))


def erased_concepts(bench: Bench) -> list[Bar]:
    """Three objects and a style, before and after, and the style of the erased objects' pictures."""
    rows = []
    for index, (name, lowest) in enumerate(OBJECTS.items()):
        items = of_object(name, bench.count(256), SEED + 10_000 * index)
        before, after = bench.base(items), bench.erased([name], items)
        a, b = bench.objects(before, items), bench.objects(after, items)
        rows.append(
            Bar(
                f"object {name}: accuracy before / after",
                f">= {lowest:.0%} / <= 5 %",
                f"{a} / {b}",
                a.value >= lowest and b.value <= 0.05,
                {"before": a.value, "after": b.value, "n": b.n},
            )
        )
        c, d = bench.styles(before, items), bench.styles(after, items)
        rows.append(
            Bar(
                f"style of the pictures of {name}, before / after",
                "within 5 points",
                f"{c} / {d}",
                abs(c.value - d.value) <= 0.05,
                {"before": c.value, "after": d.value, "n": d.n},
            )
        )
    items = of_style(STYLE, bench.count(256), SEED + 40_000)
    a, b = bench.styles(bench.base(items), items), bench.styles(bench.erased([STYLE], items), items)
    rows.append(
        Bar(
            f"style {STYLE} erased towards {bench.adapters[STYLE].neutral!r}: before / after",
            ">= 90 % / <= 5 %",
            f"{a} / {b}",
            a.value >= 0.90 and b.value <= 0.05,
            {"before": a.value, "after": b.value, "n": b.n},
        )
    )
    return rows


def other_concepts(bench: Bench) -> list[Bar]:
    """Accuracy of everything else, with the gates as they are and with every gate forced open."""
    per_pair = max(1, round(2 * bench.scale))
    rows = []
    for forced, bar in ((False, 0.01), (True, 0.05)):
        hits_before, hits_after, n, same, untouched = 0, 0, 0, 0, 0
        for name in (*OBJECTS, STYLE):
            items = of_others({name}, per_pair, SEED + 50_000)
            before = bench.base(items)
            after = bench.erased([name], items, **({"gate": 1.0} if forced else {}))
            hits_before += bench.objects(before, items).hits
            hits_after += bench.objects(after, items).hits
            n += len(items)
            same += int((before == after).flatten(1).all(1).sum())
            untouched += len(items)
        a, b = Share(hits_before, n), Share(hits_after, n)
        rows.append(
            Bar(
                "other concepts, " + ("every gate forced to 1" if forced else "gates as they are") + ": before / after",
                f"falls by <= {bar:.0%}",
                f"{a} / {b}",
                a.value - b.value <= bar,
                {"before": a.value, "after": b.value, "n": n, "bit_identical": same},
            )
        )
        if not forced:
            rows.append(zero_gates(bench, per_pair, same, untouched))
    return rows


def zero_gates(bench: Bench, per_pair: int, same: int, total: int) -> Bar:
    """Of the prompts whose gate is zero, how many pictures are bit-identical to the base pipeline's."""
    zero = 0
    for name in (*OBJECTS, STYLE):
        items = of_others({name}, per_pair, SEED + 50_000)
        zero += int((gates(bench, [name], [i.prompt for i in items]) == 0).all(1).sum())
    return Bar(
        "pictures whose gates are all below the threshold, bit-identical",
        "all",
        f"{same} identical, {zero} with zero gates, of {total}",
        same >= zero > 0,
        {"identical": same, "zero_gates": zero, "n": total},
    )


def gates(bench: Bench, names: Sequence[str], prompts: Sequence[str], embeds_only: bool = False) -> Tensor:
    """Gates [prompts, SPMs] that a call reports; one denoising step at guidance 1 is enough to read them."""
    erase(bench.pipe, [bench.adapters[name] for name in names])
    bench.pipe.set_progress_bar_config(disable=True)
    found = []
    try:
        for start in range(0, len(prompts), 50):
            chunk = list(prompts[start : start + 50])
            how: dict[str, Any] = {"prompt": chunk}
            if embeds_only:
                how = {"prompt_embeds": embeddings(bench, chunk)}
            bench.pipe(**how, num_inference_steps=1, guidance_scale=1.0, output_type="latent")
            found.append(torch.tensor([image.gates for image in bench.pipe.erasures.images]))
    finally:
        restore(bench.pipe)
    return torch.cat(found)


def embeddings(bench: Bench, prompts: Sequence[str]) -> Tensor:
    """Text states [n, L, D] of the prompts."""
    states: Tensor = bench.pipe.encode_prompt(list(prompts), "cpu", 1, False)[0]
    return states


def held_out_phrasings(bench: Bench) -> list[Bar]:
    """Other ways of asking for the erased object."""
    kinds: dict[str, tuple[int, int, int]] = {}
    for index, name in enumerate(OBJECTS):
        groups = phrasings(name, bench.count(64), SEED + 70_000 + 1000 * index)
        for kind, items in [*groups.items(), ("synonyms", synonyms(name, bench.count(64), SEED + 80_000))]:
            before, after = bench.base(items), bench.erased([name], items)
            add(kinds, kind, bench.objects(before, items), bench.objects(after, items))
        items = groups["unseen templates"]
        add(kinds, "prompt_embeds only", bench.objects(bench.base(items), items), embeds_after(bench, name, items))
    rows = []
    for kind, (before, after, n) in kinds.items():
        reported = kind == "synonyms"
        a, b = Share(before, n), Share(after, n)
        rows.append(
            Bar(
                f"held-out phrasings, {kind}: before / after",
                "reported" if reported else "<= 5 %",
                f"{a} / {b}",
                reported or b.value <= 0.05,
                {"before": a.value, "after": b.value, "n": n},
            )
        )
    return rows


def add(kinds: dict[str, tuple[int, int, int]], kind: str, before: Share, after: Share) -> None:
    b, a, n = kinds.get(kind, (0, 0, 0))
    kinds[kind] = (b + before.hits, a + after.hits, n + after.n)


def embeds_after(bench: Bench, name: str, items: Sequence[Item]) -> Share:
    """Accuracy when the pipeline gets text states and no words."""
    erase(bench.pipe, [bench.adapters[name]])
    try:
        images = []
        for start in range(0, len(items), 16):
            chunk = items[start : start + 16]
            result = bench.pipe(
                prompt_embeds=embeddings(bench, [i.prompt for i in chunk]),
                negative_prompt_embeds=embeddings(bench, [""] * len(chunk)),
                num_inference_steps=20,
                guidance_scale=3.0,
                generator=[torch.Generator().manual_seed(i.seed) for i in chunk],
                output_type="pt",
            )
            images.append(result.images)
    finally:
        restore(bench.pipe)
    return bench.objects(torch.cat(images), items)


def false_positives(bench: Bench) -> list[Bar]:
    """Gates above the threshold on prompts that do not name the concept, by words and by embeddings alone."""
    names = [*OBJECTS, STYLE]
    prompts = {name: not_naming({name}, bench.count(1000), 5) for name in names}
    rows = []
    for embeds_only in (False, True):
        hits = sum(int((gates(bench, [n], prompts[n], embeds_only) > 0).sum()) for n in names)
        share = Share(hits, sum(map(len, prompts.values())))
        rows.append(
            Bar(
                f"gates open on prompts that do not name the concept{', embeddings only' if embeds_only else ''}",
                "<= 2 %",
                str(share),
                share.value <= 0.02,
                {"share": share.value, "n": share.n},
            )
        )
    return rows


def ten_at_once(bench: Bench) -> list[Bar]:
    """All shipped SPMs together: each concept of its own, and the rest."""
    names = list(bench.adapters)
    styles = set(demo.captions()["styles"])
    worst, worst_name, n = 0.0, "", 0
    for index, name in enumerate(names):
        kept = [s for s in styles if s not in names]
        if name in styles:
            items = [i for i in of_style(name, bench.count(80), SEED + 90_000) if i.object not in names]
            share = bench.styles(bench.erased(names, items), items)
        else:
            items = [i for i in of_object(name, bench.count(96), SEED + 91_000 + 100 * index) if i.style in kept]
            share = bench.objects(bench.erased(names, items), items)
        n += share.n
        if share.value >= worst:
            worst, worst_name = share.value, name
    items = of_others(set(names), max(1, round(4 * bench.scale)), SEED + 95_000)
    a, b = bench.objects(bench.base(items), items), bench.objects(bench.erased(names, items), items)
    return [
        Bar(
            f"the {len(names)} shipped SPMs at once: worst of the erased concepts",
            "<= 10 %",
            f"{worst:.1%} ({worst_name}; {n} pictures in all)",
            worst <= 0.10,
            {"worst": worst, "n": n},
        ),
        Bar(
            "the rest, before / after",
            "falls by <= 2 points",
            f"{a} / {b}",
            a.value - b.value <= 0.02,
            {"before": a.value, "after": b.value, "n": b.n},
        ),
    ]


def mixed_batch(bench: Bench) -> Bar:
    """A batch of eight prompts, some erased and some not, against eight single runs."""
    prompts = [i.prompt for name in (*OBJECTS, "dog") for i in of_object(name, 2, 0)]
    seeds = list(range(SEED, SEED + len(prompts)))
    names = list(bench.adapters)
    erase(bench.pipe, [bench.adapters[name] for name in names])
    try:
        together = generate(bench.pipe, prompts, seeds, batch_size=8)
        alone = generate(bench.pipe, prompts, seeds, batch_size=1)
    finally:
        restore(bench.pipe)
    difference = (together - alone).abs().max().item()
    return Bar(
        "a batch of 8 mixed prompts against single runs, largest difference",
        "<= 1e-4",
        f"{difference:.1e}",
        difference <= 1e-4,
        {"difference": difference},
    )


def measure(scale: float) -> list[Bar]:
    """All rows; `scale` below 1 makes fewer pictures, for a quick look."""
    torch.set_grad_enabled(False)
    diffusers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()  # some punctuated prompts are longer than the encoder, as intended
    with Progress() as progress:
        bench = Bench(scale, progress)
        rows = erased_concepts(bench)
        rows += other_concepts(bench)
        rows += held_out_phrasings(bench)
        rows += false_positives(bench)
        rows += ten_at_once(bench)
        rows.append(mixed_batch(bench))
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description="What the shipped SPMs erase and what they leave alone.")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the pictures to make")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = measure(arguments.scale)
    print_table("SPM on the bundled model", rows)
    if arguments.json:
        write_json(arguments.json, rows)
    return verdict(rows)


if __name__ == "__main__":
    raise SystemExit(main())
