"""What the command line knows of each method; `expunge methods` prints it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from rich.console import Group
from rich.table import Table
from rich.text import Text

from expunge.cli import options as o
from expunge.cli.shared import command, emit, note, out
from expunge.erase_ops.methods import METHODS as ERASERS
from expunge.erase_ops.methods import MethodInfo
from expunge.errors import InvalidInputError

# Of --erase, --alternative, the preset and the other options: fields of the method's config.
Fields = Callable[[list[str], list[str], str | None, dict[str, Any]], dict[str, Any]]


@dataclass(frozen=True)
class Method:
    """One way of training an erasure, or what erasures are made of: where its config and training function live.

    Args:
        config: module and class.
        train: module and function `(pipe, config, *, output_dir, progress)` that gives what was trained.
        summary: one line.
        told: of what was trained, its facts and a line.
        fields: what --erase and its companions stand for; None for a method that has no --erase.
        alternatives: whether it has --alternative.
    """

    config: tuple[str, str]
    train: tuple[str, str]
    summary: str
    told: Callable[[Any], tuple[dict[str, Any], str]]
    fields: Fields | None = None
    alternatives: bool = False


def spm_fields(erase: list[str], alternatives: list[str], preset: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Prompt pairs of the concepts to erase; on the bundled model also its anchors and benign prompts.

    Raises:
        InvalidInputError: if the preset is "demo" and a concept is none of the bundled model's.
    """
    if preset != "demo":
        return {"prompts": [{"target": text, "neutral": asked.get("neutral", "")} for text in erase]}
    from expunge.demo_run.recipe import training_fields

    if len(erase) != 1:
        raise _one_at_a_time(erase)
    # The recipe says in full what a style's neutral is: "noto style", of which the option names the style alone.
    return training_fields(erase[0], asked.pop("neutral", None), seed=asked.get("seed", 0))


def _one_at_a_time(erase: list[str]) -> InvalidInputError:
    return InvalidInputError(
        "--erase", expected="one concept", found=", ".join(erase), fix="The preset demo trains one at a time."
    )


def eraser_fields(method: str) -> Fields:
    """The fields of any other method: pairs of prompts, or concepts for those that make pairs by their templates."""

    def fields(erase: list[str], alternatives: list[str], preset: str | None, asked: dict[str, Any]) -> dict[str, Any]:
        if len(alternatives) not in (0, 1, len(erase)):
            raise InvalidInputError(
                "--alternative",
                expected=f"none, one, or one for each of {len(erase)} concepts",
                found=str(len(alternatives)),
                fix="Repeat --alternative as often as --erase.",
            )
        towards = alternatives * len(erase) if len(alternatives) == 1 else alternatives
        if preset == "demo":
            from expunge.demo_run.recipe import erasing_fields

            return erasing_fields(method, erase, towards, seed=asked.get("seed", 0))
        made: dict[str, Any] = {"concepts": erase, "alternatives": towards}
        if "templates" not in ERASERS[method].load_config().__dataclass_fields__:
            pairs = zip(erase, towards or [""] * len(erase), strict=True)
            made["prompts"] = [{"target": target, "neutral": neutral} for target, neutral in pairs]
        return made

    return fields


def told_of_adapter(adapter: Any) -> tuple[dict[str, Any], str]:
    known = {"concepts": adapter.concepts, "settings": adapter.settings}
    if adapter.kind == "spm":
        known["threshold"] = adapter.threshold
    return known, f"Erased: {', '.join(adapter.concepts)}. Adapter, card and settings are in"


def told_of_sae(sae: Any) -> tuple[dict[str, Any], str]:
    return sae.config.to_dict(), f"An autoencoder of {sae.config.width} features is in"


def ear_fields(erase: list[str], alternatives: list[str], preset: str | None, asked: dict[str, Any]) -> dict[str, Any]:
    """Names of what is erased, whose pairs stand in a file; on the bundled model also its pairs and retain prompts.

    Raises:
        InvalidInputError: if the preset is "demo" and a concept is none of the bundled model's.
    """
    if preset != "demo":
        return {"concepts": erase}
    from expunge.demo_ar.recipe import training_fields

    if len(erase) != 1:
        raise _one_at_a_time(erase)
    return training_fields(erase[0], seed=asked.get("seed", 0))


# Methods whose --erase means something of their own; they have no --alternative.
_OWN_FIELDS: Mapping[str, Fields] = MappingProxyType({"spm": spm_fields, "ear": ear_fields})


def _eraser(name: str, info: MethodInfo) -> Method:
    own = _OWN_FIELDS.get(name)
    summary = f"{info.title}: {info.trains}."
    return Method(info.config, info.train, summary, told_of_adapter, own or eraser_fields(name), own is None)


METHODS: Mapping[str, Method] = MappingProxyType(
    {name: _eraser(name, info) for name, info in ERASERS.items()}
    | {
        "sae": Method(
            config=("expunge.erase_ops.sae.config", "SAETrainingConfig"),
            train=("expunge.cli.sae_training", "train"),
            summary="Sparse autoencoder of a text encoder's hidden states, out of which `expunge itd find` picks "
            "concepts.",
            told=told_of_sae,
        ),
    }
)

_COLUMNS = ("title", "trains", "needs", "costs", "writes")


@command
def methods(json_output: o.Json = False, debug: o.Debug = False) -> None:
    """List the methods of erasing: what each trains, needs, costs and writes."""
    rows = {name: {column: getattr(info, column) for column in _COLUMNS} for name, info in ERASERS.items()}
    if json_output:
        emit(rows)
        return
    out.print(table_of(rows))
    note("Without training: expunge itd find picks a concept out of a sparse autoencoder (docs/itd.md).")


def table_of(rows: Mapping[str, Mapping[str, str]]) -> Table:
    """One block a method, its facts below each other: columns of their own would be too narrow for words."""
    table = Table("method", "what", show_lines=True)
    for name, row in rows.items():
        facts = Table.grid("", "", padding=(0, 2, 0, 0))
        for column in _COLUMNS[1:]:
            facts.add_row(Text(column, style="dim"), Text(row[column]))
        table.add_row(Text(name, style="bold"), Group(Text(row["title"]), facts))
    return table
