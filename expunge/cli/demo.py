"""`expunge demo`: the main job on the bundled model, ending in pictures and a page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from expunge.cli.shared import Debug, Json, command, emit, err, note, out


@command
def demo(
    concept: Annotated[
        str, typer.Option("--concept", help="Object or style of the bundled model to erase, such as cat or neon.")
    ] = "cat",
    output_dir: Annotated[Path, typer.Option("--output_dir", help="Folder of the pictures and the page.")] = Path(
        "demo-output"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Of the training and of the first picture.", min=0)] = 0,
    max_train_steps: Annotated[
        int | None, typer.Option("--max_train_steps", help="Training steps; the preset's if left out.", min=1)
    ] = None,
    json_output: Json = False,
    debug: Debug = False,
) -> None:
    """Erase a concept from the bundled model and show before and after: PNGs, results.json and a page."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    # The bundled model loads in a second; its loading bars would only push the demo's own lines away.
    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    from expunge.demo_run.run import run_demo

    result = run_demo(output_dir, concept=concept, seed=seed, max_train_steps=max_train_steps, console=err)
    if json_output:
        emit(result.to_dict())
    else:
        out.print(score_table(result))
    untouched = result.untouched()
    note(f"{sum(result.same[i] for i in untouched)} of {len(untouched)} untouched pictures are bit-identical.")
    note(f"Pictures: {output_dir / 'erased.png'}, {output_dir / 'untouched.png'}")
    note(f"Open this page: {(output_dir / 'index.html').resolve()}")


def score_table(result: Any) -> Table:
    """One line a question: what the classifier sees before and after."""
    table = Table("question", "before", "after", title=f'"{result.concept}" erased', title_justify="left")
    for row in result.rows:
        table.add_row(Text(row.label), str(row.before), str(row.after))
    return table
