"""Every eraser against its bars, on the bundled model. Exit status 0 when every row holds.

    python benchmarks/eraser_bars.py [--others 900] [--reported 240] [--targets 96] [--rows uce,speed] [--work FOLDER]
        [--results FOLDER]

Trains every method on one object and one style, scores it on pictures of other concepts, of which there are `others`
for each of the two (1,800 in all by default) where a bar says by how far they may fall, and `reported` where not;
times the closed forms on twenty concepts; and measures what the trainer promises (`trainer_bars.py`). The work folder
keeps what is done: a run that is cut off goes on, and one with more pictures draws only those. At full size it takes an
hour on one core.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path

import torch
import trainer_bars
from bars import Bar, kept, print_table, verdict, write_json
from rich.console import Console

from expunge import demo, erase, restore
from expunge.compare.result import Comparison, Row
from expunge.compare.run import Runner
from expunge.compare.trials import row_names
from expunge.demo.scoring import Share
from expunge.demo_run.recipe import erasing_fields
from expunge.erase_ops.delta.adapter import DeltaAdapter
from expunge.erase_ops.methods import METHODS

CONCEPTS = ("cat", "neon")
# Points by which the other concepts may fall; the rest is reported.
FALL = {"spm": 1.0, "itd": 1.0, "uce": 3.0, "speed": 3.0, "all_but_one": 5.0}
PRESERVING = ("esd", "esd without preserve")


def target_row(row: Row) -> Bar:
    before, after = row.target
    return Bar(
        f"{row.row}, {row.concept}: accuracy before / after",
        ">= 90 % / <= 10 %",
        f"{before} / {after}",
        before.value >= 0.9 and after.value <= 0.1,
        {"before": before.value, "after": after.value, "n": after.n},
    )


def others_row(name: str, rows: list[Row]) -> Bar:
    """The other concepts, over all erased ones; object and style of a picture count as one reading each."""
    before, after = (
        Share(sum(row.others[side].hits for row in rows), sum(row.others[side].n for row in rows)) for side in (0, 1)
    )
    fall, allowed = 100 * (before.value - after.value), FALL.get(name)
    pictures = sum(row.objects[1].n for row in rows)
    return Bar(
        f"{name}: other concepts, before / after ({pictures} pictures)",
        "reported" if allowed is None else f"falls by <= {allowed:g} points",
        f"{before} / {after}: {fall:.2f} points",
        allowed is None or fall <= allowed,
        {"before": before.value, "after": after.value, "pictures": pictures, "fall": fall},
    )


def cost_row(name: str, rows: list[Row]) -> Bar:
    """What a method costs and how far it moves predictions; processor time is bounded for few-shot unlearning alone."""
    seconds, cpu = max(row.seconds for row in rows), max(row.cpu_seconds for row in rows)
    bar = "<= 10 s of processor time, 4 images" if name == "few_shot" else "reported"
    size, memory = rows[0].bytes / 1024, max(row.peak_memory_mib for row in rows)
    drift = max(row.drift["unconditional"] for row in rows), max(row.drift["unrelated"] for row in rows)
    return Bar(
        f"{name}: processor time, wall time, file, peak memory, drift without a prompt / of unrelated ones",
        bar,
        f"{cpu:.1f} s, {seconds:.1f} s, {size:.0f} KiB, {memory:.0f} MiB, {drift[0]:.1e} / {drift[1]:.1e}",
        name != "few_shot" or cpu <= 10,
        {"seconds": seconds, "cpu_seconds": cpu, "bytes": rows[0].bytes, "drift": drift},
    )


def rows_of(comparison: Comparison) -> list[Bar]:
    bars = []
    for name in dict.fromkeys(row.row for row in comparison.rows):
        rows = [row for row in comparison.rows if row.row == name]
        bars += [*map(target_row, rows), others_row(name, rows), cost_row(name, rows)]
    return bars


def preservation(rows: list[Bar]) -> Iterable[Bar]:
    """Whether ESD's neighbours are hurt less with prompts to preserve than without."""
    falls = {name: bar.figures["fall"] for name in PRESERVING for bar in rows if bar.what.startswith(f"{name}: other")}
    if len(falls) == len(PRESERVING):
        with_them, without = (falls[name] for name in PRESERVING)
        yield Bar(
            "esd: fall of the other concepts with prompts to preserve / without",
            "less with them",
            f"{with_them:.2f} / {without:.2f} points",
            with_them < without,
            {"with": with_them, "without": without},
        )


def twenty_concepts() -> Iterable[Bar]:
    """Twenty objects in one solve: prompts encoded, system solved, weights rounded."""
    pipe = demo.load()
    concepts = list(demo.captions()["objects"])[:20]
    for name in ("uce", "speed"):
        fields = erasing_fields(name, concepts)
        # One template a concept: twenty concepts in three templates and six styles would be 360 prompts.
        pairs = [{"target": f"a {concept}", "neutral": ""} for concept in concepts]
        config = METHODS[name].load_config()(**(fields | {"prompts": pairs}))
        train = METHODS[name].load_train()
        times = []
        for _ in range(5):
            start = time.process_time()
            train(pipe, config, progress=False)
            times.append(time.process_time() - start)
        found = sorted(times)[2]
        text = f"{found:.2f} s of processor time, median of 5 ({len(config.preserve)} prompts preserved)"
        yield Bar(f"{name}: 20 concepts", "<= 1 s", text, found <= 1.0, {"cpu_seconds": times})


def round_trip(folder: Path, names: Iterable[str]) -> Iterable[Bar]:
    """Saved and read again, a delta gives the very outputs; in float16, outputs within its rounding."""
    pipe = demo.load()
    latents = torch.randn(2, 8, 8, 8, generator=torch.Generator().manual_seed(0))

    @torch.no_grad()
    def outputs(adapter: DeltaAdapter) -> torch.Tensor:
        erase(pipe, adapter)
        states = pipe.encode_prompt(["a cat in noto style", "a dog"], "cpu", 1, False)[0]  # by an erased encoder, too
        out: torch.Tensor = pipe.unet(latents, 500, encoder_hidden_states=states).sample
        restore(pipe)
        return out

    for name in names:
        if METHODS.get(name) is None or METHODS[name].writes != "delta":
            continue
        first = DeltaAdapter.from_pretrained(folder / f"{name}--{CONCEPTS[0]}")
        with tempfile.TemporaryDirectory() as scratch:
            whole = DeltaAdapter.from_pretrained(first.save_pretrained(Path(scratch) / "a"))
            half = DeltaAdapter.from_pretrained(first.save_pretrained(Path(scratch) / "b", dtype="float16"))
            one, two, three = outputs(first), outputs(whole), outputs(half)
        away = ((three - one).norm() / one.norm()).item()
        yield Bar(
            f"{name}: saved, loaded and erased again",
            "bit-identical; float16 within rounding",
            f"{'identical' if torch.equal(one, two) else 'different'}; float16 {away:.1e} relative",
            torch.equal(one, two) and away < 2e-3,
        )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--others", type=int, default=900, help="pictures of other concepts, for each erased one")
    parser.add_argument("--reported", type=int, default=240, help="the same for methods whose fall has no bar")
    parser.add_argument("--targets", type=int, default=96, help="pictures of each erased concept")
    parser.add_argument("--rows", default=",".join(row_names()), help="methods and variants, by commas")
    parser.add_argument("--work", type=Path, default=Path("eraser-bars"), help="keeps what is done")
    parser.add_argument("--results", type=Path, help="also write erasers.json into this folder")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    names, work = arguments.rows.split(","), arguments.work
    rows = []
    for others, chosen in (
        (arguments.others, [name for name in names if name in FALL]),
        (min(arguments.others, arguments.reported), [name for name in names if name not in FALL]),
    ):
        if chosen:
            runner = Runner(work, targets=arguments.targets, others=others, console=Console(stderr=True))
            rows += rows_of(runner.run(chosen, CONCEPTS))
    rows += preservation(rows)
    rows += [*twenty_concepts(), *round_trip(work, names), *kept(work, "trainer", trainer_bars.rows)]
    if arguments.results:
        write_json(arguments.results / "erasers.json", rows)
    print_table("Erasers", rows)
    return verdict(rows)


if __name__ == "__main__":
    raise SystemExit(main())
