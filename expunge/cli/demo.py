"""`expunge demo`: the main job on the bundled model, ending in pictures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from expunge.cli import options as o
from expunge.cli.shared import command, emit, err, note, out
from expunge.errors import InvalidInputError


@command
def demo(
    concept: o.DemoConcept = None,
    family: o.DemoFamily = "sd",
    method: o.DemoMethod = None,
    output_dir: o.OutputDir = Path("demo-output"),
    seed: o.Seed = 0,
    max_train_steps: o.DemoSteps = None,
    json_output: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Erase a concept from the bundled model and show before and after: PNGs, results.json and a page."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # The bundled model loads in a second; its loading bars would only push the demo's own lines away.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    if family == "ar":
        from expunge.demo_run.autoregressive import run_ar_demo

        given = {"--max_train_steps": max_train_steps, "--method": method}
        for name, value in given.items():
            if value is not None:
                raise InvalidInputError(name, expected="none with --family ar", found=str(value), fix="Leave it out.")
        result = run_ar_demo(output_dir, concept=concept or "star", seed=seed, console=err)
    else:
        from expunge.demo_run.run import run_demo

        result = run_demo(
            output_dir, method=method or "spm", concept=concept or "cat",
            seed=seed, max_train_steps=max_train_steps, console=err,
        )  # fmt: skip
    if json_output:
        emit(result.to_dict())
    else:
        out.print(score_table(result))
    if result.words.gated:
        untouched = result.untouched()
        note(f"{sum(result.same[i] for i in untouched)} of {len(untouched)} untouched pictures are bit-identical.")
    note(f"Pictures: {output_dir / 'erased.png'}, {output_dir / 'untouched.png'}")
    note(f"Open this page: {(output_dir / 'index.html').resolve()}")


def score_table(result: Any) -> Table:
    """One line a question: what the classifier sees before and after."""
    table = Table("question", "before", "after", "pictures", title=f'"{result.concept}" erased', title_justify="left")
    for row in result.rows:
        table.add_row(Text(row.label), shown(row.before), shown(row.after), str(row.after.n))
    return table


def shown(share: Any) -> str:
    """A share with its 95 % interval."""
    low, high = share.interval
    return f"{100 * share.value:.1f} % ({100 * low:.0f}–{100 * high:.0f})"
