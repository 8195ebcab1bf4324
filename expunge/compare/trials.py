"""What is compared: methods and variants of them, each on one concept, and the pictures that all are measured on."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from expunge import demo
from expunge.demo_run.itd_recipe import make_adapter
from expunge.demo_run.plan import Shot, shot
from expunge.demo_run.recipe import erasing_fields, training_fields
from expunge.erase_ops.methods import METHODS
from expunge.errors import InvalidInputError

# Rows of the comparison beside one for each method: a method and what is set otherwise than by its preset.
VARIANTS: Mapping[str, tuple[str, dict[str, Any]]] = MappingProxyType(
    {"esd without preserve": ("esd", {"preserve": []}), "few_shot bounded": ("few_shot", {"bound": 4.0})}
)
# A method that is not trained on the model: its features are picked out of the bundled autoencoder.
ITD = "itd"
ELSEWHERE = ("ear",)  # methods of other models than the bundled one
TARGETS = 96  # pictures of an erased concept


def row_names() -> list[str]:
    """What may be compared: every method of the bundled model, each with its variants."""
    names = [name for name in METHODS if name not in ELSEWHERE]
    return [row for name in names for row in (name, *(v for v, (of, _) in VARIANTS.items() if of == name))] + [ITD]


def told(row: str) -> dict[str, str]:
    """What the page says of a row: its title, what it trains and what it needs."""
    if row == ITD:
        return {
            "title": "ItD, by a sparse autoencoder of the text encoder",
            "trains": "nothing: features of the bundled autoencoder are picked, and taken out of the text states",
            "needs": "a trained autoencoder; prompts of the concept, and benign ones",
        }
    info = METHODS[VARIANTS[row][0] if row in VARIANTS else row]
    return {"title": info.title, "trains": info.trains, "needs": info.needs}


@dataclass(frozen=True)
class Trial:
    """One method on one concept.

    Args:
        row: a method or variant.
        concept: an object or style of the bundled model.
        seed: of the training.
        changes: further fields of the method's config.
    """

    row: str
    concept: str
    seed: int = 0
    changes: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.row not in row_names():
            raise InvalidInputError(
                "methods", expected=f"some of {', '.join(row_names())}", found=repr(self.row), fix="Name one of these."
            )

    @property
    def method(self) -> str:
        """The method's name in `METHODS`."""
        return VARIANTS[self.row][0] if self.row in VARIANTS else self.row

    @property
    def folder(self) -> str:
        """A name for its files."""
        return f"{self.row.replace(' ', '-')}--{self.concept.replace(' ', '-')}"

    def train(self, pipe: Any, folder: Path, *, progress: bool) -> None:
        """Makes the erasure on a plain pipeline and saves it in a folder."""
        if self.row == ITD:
            make_adapter(pipe, demo.sae(), [self.concept], **self.changes).save_pretrained(folder)
        else:
            METHODS[self.method].load_train()(pipe, self.config(), output_dir=folder, progress=progress)

    def settings(self) -> dict[str, Any] | None:
        """All that its erasure depends on; None for ItD, which is made anew in a second."""
        if self.row == ITD:
            return None
        settings: dict[str, Any] = self.config().to_dict()
        return {name: Path(value).name if Path(str(value)).is_absolute() else value for name, value in settings.items()}

    def config(self) -> Any:
        """The method's preset for the bundled model, with the recipe's prompts."""
        config_class = METHODS[self.method].load_config()
        if self.method == "spm":
            fields = training_fields(self.concept, seed=self.seed) | {"validation_steps": None}
        else:
            fields = erasing_fields(self.method, [self.concept], seed=self.seed)
        if "seed" in config_class.__dataclass_fields__:
            fields["seed"] = self.seed
        varied = VARIANTS[self.row][1] if self.row in VARIANTS else {}
        return config_class.preset("demo", **(fields | varied | dict(self.changes)))


def shots_of(concept: str, tables: dict[str, Any], *, targets: int, others: int, seed: int = 0) -> list[Shot]:
    """The pictures that every method is measured on: of the concept, then of others, in an order that is drawn once.

    Their prompts are in held-out templates, in which no method erases or preserves anything.

    Args:
        concept: an object or style.
        tables: the caption tables.
        targets: pictures that ask for the concept, over all styles (objects).
        others: pictures that name another object and another style.
        seed: the first picture's; the others' seeds are different from the targets'.
    """
    is_style = concept in tables["styles"]
    objects = [name for name in tables["objects"] if name != concept]
    styles = [name for name in tables["styles"] if name != concept]
    asked = [(thing, concept) for thing in objects] if is_style else [(concept, style) for style in styles]
    kept, templates = list(itertools.product(objects, styles)), tables["held_out"]["templates"]
    shots = [
        shot(thing, style, seed + number, "trained", concept, templates[number % len(templates)])
        for number, (thing, style) in enumerate(_cycle(asked, targets, seed))
    ]
    shots += [
        shot(thing, style, seed + targets + number, "untouched", None, templates[number % len(templates)])
        for number, (thing, style) in enumerate(_cycle(kept, others, seed))
    ]
    return shots


def _cycle(pairs: Sequence[tuple[str, str]], count: int, seed: int) -> Iterator[tuple[str, str]]:
    """`count` pairs: all of them in a drawn order before any comes again."""
    order = random.Random(seed).sample(list(pairs), len(pairs))
    return itertools.islice(itertools.cycle(order), count)
