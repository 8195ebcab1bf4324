"""`python -m expunge.demo_ar.builder STAGE --output_dir OUT`; see the package's docstring."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from expunge.demo.builder.__main__ import remember
from expunge.demo_ar.builder import card, evaluate, model, shapes, train_classifier, train_tokenizer, train_transformer

STAGES = ("data", "processor", "tokenizer", "classifier", "transformer", "evaluate")


def run_stage(stage: str, output: Path, seed: int) -> None:
    """Runs one stage; it reads what the stages before it wrote into `output`."""
    if stage == "data":
        shapes.build(output, seed)
    elif stage == "processor":
        model.new_processor().save_pretrained(output / "model")
    elif stage == "tokenizer":
        remember(output, "tokenizer", train_tokenizer.train(output, seed))
    elif stage == "classifier":
        train_classifier.train(output, seed + 1)
        remember(output, "classifier", train_classifier.evaluate(output))
    elif stage == "transformer":
        train_transformer.train(output, seed)
    else:
        card.write(output, remember(output, "model", evaluate.evaluate(output)))


def main(
    stage: Annotated[str, typer.Argument(help=f"all, or one of {', '.join(STAGES)}")],
    output_dir: Annotated[Path, typer.Option("--output_dir", help="where everything is written")],
    seed: Annotated[int, typer.Option("--seed")] = 0,
) -> None:
    """Builds the bundled autoregressive demo model (about an hour on one core)."""
    if stage not in ("all", *STAGES):
        raise typer.BadParameter(f"expected all or one of {', '.join(STAGES)}, found {stage}")
    torch.set_num_threads(1)
    for name in STAGES if stage == "all" else (stage,):
        run_stage(name, output_dir, seed)


if __name__ == "__main__":
    typer.run(main)
