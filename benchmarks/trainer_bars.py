"""What the one trainer promises, on the bundled model: exact objectives, a teacher that costs nothing, exact resume.

    python benchmarks/trainer_bars.py

`eraser_bars.py` prints these rows with the others.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from bars import Bar, print_table, verdict
from derivations import GAPS
from torch import Tensor
from trainer_checks import differing, spread_gaps, teacher_bytes, train_apart

from expunge import demo
from expunge.demo_run.recipe import erasing_fields
from expunge.erase_ops.methods import METHODS
from expunge.erase_ops.training.loop import Callback

ROOT = Path(__file__).resolve().parents[1]
TRAINED = ("esd", "concept_ablation", "all_but_one", "few_shot", "co_erasing")
SIZED = ("spm", *TRAINED, "uce", "speed")  # `ear` has a model, a trainer and a table of its own
SEEDS = range(20)


def objectives() -> Iterable[Bar]:
    """Losses and gradients, or edits, against `derivations.py`."""
    for name, away in GAPS.items():
        worst = max(away(seed) for seed in SEEDS)
        what = f"objective, {name}: largest difference from an independent float64 derivation"
        yield Bar(what, "<= 1e-12", f"{worst:.1e} ({len(SEEDS)} draws)", worst <= 1e-12, {"gap": worst})


def teacher() -> Bar:
    """The frozen model's memory, of every selection that the methods' presets use, and of all weights."""
    pipe = demo.load()
    latents, states = torch.randn(2, *_latent_shape(pipe)), pipe.encode_prompt(["a cat", "a dog"], "cpu", 1, False)[0]
    found = {}
    for selection in ("esd-x", "esd-x-strict", "esd-u", "noxattn", "full"):
        found[selection] = teacher_bytes(
            pipe.unet, selection, lambda: pipe.unet(latents, 500, encoder_hidden_states=states).sample
        )
    ids = pipe.tokenizer(["a cat"], return_tensors="pt").input_ids
    found["text-mlp-final-attn"] = teacher_bytes(
        pipe.text_encoder, "text-mlp-final-attn", lambda: pipe.text_encoder(ids)[0]
    )
    worst = max(found, key=lambda name: found[name][0] / found[name][1])
    extra, trained = found[worst]
    return Bar(
        "teacher beside the student: extra memory",
        "<= bytes of the trained parameters",
        f"{extra / trained:.3f} of them at most ({worst}: {extra} of {trained} bytes; {len(found)} selections)",
        all(0 < extra <= trained for extra, trained in found.values()),
        {"bytes": {name: list(pair) for name, pair in found.items()}},
    )


def _latent_shape(pipe: Any) -> tuple[int, int, int]:
    side = pipe.unet.config.sample_size
    return pipe.unet.config.in_channels, side, side


def processes(folder: Path) -> Iterable[Bar]:
    """Noise keyed by the sample's number; plain gradient descent."""
    for method in ("esd", "few_shot"):
        spreads = [(2, 1), (2, 2)] if method == "esd" else [(2, 1)]
        gaps = spread_gaps(demo.path(), method, spreads, folder / method)
        named = ", ".join(
            f"{gradients:.1e} and {weights:.1e} ({count} processes x {batches} batches)"
            for (gradients, weights), (count, batches) in zip(gaps, spreads, strict=True)
        )
        what = f"{method}, two processes against one, three steps of SGD: gradients (worst step) and weights, relative"
        yield Bar(what, "<= 1e-5", named, max(map(max, gaps)) <= 1e-5, {"gaps": gaps})


def resuming(folder: Path) -> Iterable[Bar]:
    """Every method, cut off after every step; and a process that the system ends without notice."""
    pipe, broken, runs = demo.load(), {}, 0
    for method in TRAINED:
        fields = erasing_fields(method, ["cat"]) | {"max_train_steps": 3, "batch_size": 2}
        fields |= {"drawn_images": 4, "preserve": fields.get("preserve", ())[:8]}
        if method == "co_erasing":
            fields["text_steps"] = 2  # of the five steps two are the text stage's

        def run(place: Path | None, callback: Callback | None, method: str = method, fields: Any = fields) -> Any:
            kept = {} if place is None else {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
            config = METHODS[method].load_config().preset("demo", **(fields | kept))
            train = METHODS[method].load_train()
            values: dict[str, Tensor] = train(pipe, config, output_dir=place, progress=False, callback=callback).values
            return values

        stops = (1, 2, 3, 4) if method == "co_erasing" else (1, 2)
        broken[method] = differing(run, stops, folder / "cut" / method)
        runs += len(stops)
    yield Bar(
        "cut off after any step and resumed: final weights",
        "bit-identical",
        f"{runs - sum(map(len, broken.values()))} of {runs} runs of {len(TRAINED)} methods identical",
        not any(broken.values()),
        {"different": broken},
    )
    whole = train_apart(demo.path(), "esd", folder / "whole")
    train_apart(demo.path(), "esd", folder / "killed", kill=1)
    resumed = train_apart(demo.path(), "esd", folder / "killed")
    assert whole is not None and resumed is not None
    same = all(torch.equal(resumed[name], value) for name, value in whole.items() if not name.startswith("gradient"))
    text = "identical" if same else "different"
    yield Bar("esd, process killed (SIGKILL) and started again: final weights", "bit-identical", text, same)


def code_sizes() -> Bar:
    """Lines of each method's objective and settings, comments and blank lines included."""
    sizes = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8").count("\n")
        for method in SIZED
        for path in sorted((ROOT / "erase_ops" / method).glob("*.py"))
        if path.stem in ("objective", "presets") or path.stem.endswith("config")
    }
    worst = max(sizes, key=lambda name: sizes[name])
    return Bar(
        f"a method's own code, objective and settings each ({len(SIZED)} methods)",
        "<= 80 lines",
        f"at most {sizes[worst]} ({worst})",
        sizes[worst] <= 80,
        {"lines": sizes},
    )


def rows() -> list[Bar]:
    """All of them."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        return [*objectives(), teacher(), *processes(folder), *resuming(folder), code_sizes()]


def main() -> int:
    torch.set_num_threads(1)
    found = rows()
    print_table("The trainer", found)
    return verdict(found)


if __name__ == "__main__":
    raise SystemExit(main())
