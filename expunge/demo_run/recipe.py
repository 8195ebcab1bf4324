"""How a concept of the bundled model is erased: prompt pairs, anchors and benign prompts out of its caption tables.

Held-out templates and synonym-in-template pairs are never used here; evaluation keeps them for itself.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

from expunge import demo
from expunge.demo.builder.concepts import fill
from expunge.errors import InvalidInputError

ANCHORS, BENIGN = 400, 1000  # prompts drawn from the tables for anchoring and for calibrating the threshold
STYLE_SUFFIX = " style"


def training_fields(concept: str, neutral: str | None = None, *, seed: int = 0) -> dict[str, Any]:
    """Fields of an `SPMTrainingConfig` that erase one object or style of the bundled model.

    An object is erased towards the same prompt without it ("a cat in noto style" towards "noto style"), or towards
    another object; a style is erased towards another style. What is not erased is thereby asked to stay.

    Args:
        concept: a name in the model's caption tables, such as `"cat"`, `"neon"` or `"neon style"`.
        neutral: what it is erased towards; for a style the first other one if None.
        seed: draws the anchors and the benign prompts.

    Raises:
        InvalidInputError: if the concept or the neutral is none that the bundled model knows.
    """
    tables = demo.captions()
    objects, styles = list(tables["objects"]), tables["styles"]
    name = concept.removesuffix(STYLE_SUFFIX)
    if name in styles:
        other = (neutral or next(style for style in styles if style != name)).removesuffix(STYLE_SUFFIX)
        _known("--neutral", other, styles)
        pairs = style_pairs(tables, name, other)
        neutral = other + STYLE_SUFFIX
    else:
        _known("--erase", concept, [*objects, *styles])
        if neutral is not None:
            _known("--neutral", neutral, objects)
        pairs = object_pairs(tables, concept, neutral)
    rng = random.Random(f"{seed}/{concept}")
    others = other_prompts(tables, name)
    spoken = [prompt for prompt in others if prompt]
    return {
        "prompts": [{"target": target, "neutral": kept} for target, kept in pairs],
        "concepts": [concept],
        "neutral": neutral or "",
        "phrasings": phrasings(tables, concept),
        "anchor_prompts": rng.sample(others, min(ANCHORS, len(others))),
        "benign_prompts": rng.sample(spoken, min(BENIGN, len(spoken))),
        "calibration_targets": [target for target, _ in pairs],
    }


def _known(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise InvalidInputError(
            option,
            expected=f"a concept of the bundled model: {', '.join(choices)}",
            found=repr(value),
            fix="Name one of them, or train on your own base with another preset.",
        )


def object_pairs(tables: dict[str, Any], name: str, neutral: str | None) -> list[tuple[str, str]]:
    """(prompt with the object, the same prompt without it or with `neutral`), over all templates and styles."""
    pairs = []
    for style in tables["styles"]:
        for template in tables["templates"]:
            kept = fill(template, neutral, style) if neutral else style + STYLE_SUFFIX
            pairs.append((fill(template, name, style), kept))
    for template in tables["object_templates"]:
        pairs.append((fill(template, name), fill(template, neutral) if neutral else ""))
    return list(dict.fromkeys(pairs))


def style_pairs(tables: dict[str, Any], name: str, neutral: str) -> list[tuple[str, str]]:
    """(prompt in the style, the same prompt in the style `neutral`), over all templates and objects."""
    pairs = [
        (fill(template, thing, name), fill(template, thing, neutral))
        for thing in tables["objects"]
        for template in tables["templates"]
    ]
    pairs += [(fill(template, style=name), fill(template, style=neutral)) for template in tables["style_templates"]]
    return list(dict.fromkeys(pairs))


def phrasings(tables: dict[str, Any], concept: str) -> list[str]:
    """Templates with {} whose text states the gate compares with: the concept alone, and with what it comes with.

    The model's text encoder places a prompt by its object and its style together, so that "cat" alone is only half
    way to "a cat in noto style": an object is phrased in every style, and a style with every object.
    """
    name = concept.removesuffix(STYLE_SUFFIX)
    if name in tables["styles"]:
        texts = [fill(tables["templates"][0], thing, name) for thing in tables["objects"]]
    else:
        texts = [fill(template, name, style) for template in tables["templates"][:2] for style in tables["styles"]]
    return ["{}", *(re.sub(rf"\b{re.escape(concept)}\b", "{}", text) for text in texts)]


def other_prompts(tables: dict[str, Any], name: str) -> list[str]:
    """Every prompt of the tables that names neither the concept nor one of its synonyms, each once."""
    held_out = {tuple(pair) for pair in tables["held_out"]["synonym_in_template"]}
    things = [word for thing, synonyms in tables["objects"].items() if thing != name for word in (thing, *synonyms)]
    styles = [style for style in tables["styles"] if style != name]
    prompts = [
        fill(template, thing, style)
        for thing in things
        for template in tables["templates"]
        if (thing, template) not in held_out
        for style in styles
    ]
    prompts += [fill(template, thing) for thing in things for template in tables["object_templates"]]
    prompts += [fill(template, style=style) for style in styles for template in tables["style_templates"]]
    return list(dict.fromkeys([*prompts, *tables["plain_prompts"]]))
