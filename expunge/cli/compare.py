"""`expunge compare`: every method on the same concepts of the bundled model, in one table, one grid and one page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from rich.table import Table
from rich.text import Text

from expunge.cli import options as o
from expunge.cli.shared import command, emit, err, note, out

Concepts = Annotated[
    list[str] | None, o.option("--concept", "Object or style of the bundled model; repeatable. [default: cat, neon]")
]
Methods = Annotated[
    list[str] | None, o.option("--method", "A method, or a variant of one; repeatable. [default: all of them]")
]
Targets = Annotated[int, o.option("--targets", "Pictures of each erased concept.", min=1)]
Others = Annotated[int, o.option("--others", "Pictures of other concepts, for each erased one.", min=1)]


@command
def compare(
    concept: Concepts = None,
    method: Methods = None,
    output_dir: o.OutputDir = Path("compare-output"),
    targets: Targets = 24,
    others: Others = 48,
    seed: o.Seed = 0,
    json_output: o.Json = False,
    debug: o.Debug = False,
) -> None:
    """Train every method on the same concepts and seeds, and score them all: results.json, grid.png and a page.

    A run that was cut off goes on where it stopped when it is started again with the same folder.
    """
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    diffusers_logging.disable_progress_bar()
    transformers_logging.disable_progress_bar()
    from expunge.compare.run import Runner
    from expunge.compare.trials import row_names

    runner = Runner(output_dir, targets=targets, others=others, seed=seed, console=err)
    comparison = runner.run(method or row_names(), concept or ["cat", "neon"])
    if json_output:
        emit(comparison.to_dict())
    else:
        out.print(result_table(comparison))
    note(f"Grid: {output_dir / 'grid.png'}")
    note(f"Open this page: {(output_dir / 'index.html').resolve()}")


def result_table(comparison: object) -> Table:
    """One line for each method and concept."""
    from expunge.compare.result import Comparison

    assert isinstance(comparison, Comparison)
    columns = ("concept", "method", "target", "other objects", "other styles", "fall", "KiB", "CPU s", "MiB")
    table = Table(*columns, title="Methods compared", title_justify="left")
    for row in comparison.rows:
        shares = [f"{100 * a.value:.1f} → {100 * b.value:.1f} %" for a, b in (row.target, row.objects, row.styles)]
        figures = [f"{row.fall:.2f}", f"{row.bytes / 1024:.0f}", f"{row.cpu_seconds:.1f}", f"{row.peak_memory_mib:.0f}"]
        table.add_row(*map(Text, (row.concept, row.row, *shares, *figures)))
    return table
