"""Draws captions with their labels, for training the text encoder, the UNet and later the erasures' tests."""

from __future__ import annotations

import random
from dataclasses import dataclass

from expunge.demo.builder import concepts

NONE = -1  # label of a caption that names no object (or no style)
PUNCTUATION = (".", "!", "?", "...", ",", " !")


@dataclass(frozen=True)
class Caption:
    """A caption and what it names: indices into OBJECTS and STYLES, or NONE."""

    text: str
    object: int
    style: int


def all_templates() -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
    """Templates with both, with the object alone and with the style alone, held-out ones included."""
    return (
        concepts.TEMPLATES + concepts.HELD_OUT_TEMPLATES,
        concepts.OBJECT_TEMPLATES + concepts.HELD_OUT_OBJECT_TEMPLATES,
        concepts.STYLE_TEMPLATES + concepts.HELD_OUT_STYLE_TEMPLATES,
    )


def draw(rng: random.Random, object_index: int, style_index: int, plain: float = 0.1) -> Caption:
    """A random caption for a picture of that object in that style.

    With probability `plain` it says nothing (classifier-free guidance needs that), else it names both (75 %), the
    object alone (14 %) or the style alone (11 %). Synonyms are used four times in ten.
    """
    both, object_only, style_only = all_templates()
    if rng.random() < plain:
        text = "" if rng.random() < 0.8 else rng.choice(concepts.PLAIN_PROMPTS)
        return Caption(text, NONE, NONE)
    name = list(concepts.OBJECTS)[object_index]
    if rng.random() < 0.4:
        name = rng.choice(concepts.OBJECTS[name].synonyms)
    style = concepts.STYLES[style_index]
    kind = rng.random()
    if kind < 0.75:
        caption = Caption(concepts.fill(rng.choice(both), name, style), object_index, style_index)
    elif kind < 0.89:
        caption = Caption(concepts.fill(rng.choice(object_only), name), object_index, NONE)
    else:
        caption = Caption(concepts.fill(rng.choice(style_only), style=style), NONE, style_index)
    if rng.random() < 0.12:
        caption = Caption(caption.text + rng.choice(PUNCTUATION), caption.object, caption.style)
    return caption


def vocabulary() -> list[str]:
    """Every word of every caption, lower case, sorted."""
    both, object_only, style_only = all_templates()
    texts = [*both, *object_only, *style_only, *concepts.PLAIN_PROMPTS, *concepts.STYLES, "an"]
    for name, concept in concepts.OBJECTS.items():
        texts += [name, *concept.synonyms]
    words = set()
    for text in texts:
        words |= {w.strip(",.!?") for w in text.replace("{o}", " ").replace("{s}", " ").split()}
    return sorted(w for w in words if w)
