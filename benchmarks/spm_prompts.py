"""The prompts of the SPM table: captions of the bundled model, and held-out phrasings that no erasure has seen."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

from expunge import demo
from expunge.demo.builder.concepts import fill


@dataclass(frozen=True)
class Item:
    """A prompt, the seed of its picture, and the object and style that it names."""

    prompt: str
    seed: int
    object: str
    style: str


def of_object(name: str, count: int, first_seed: int, *, word: str | None = None, held_out: bool = False) -> list[Item]:
    """`count` prompts that name the object (by `word`) in every style, templates in turn."""
    table: dict[str, Any] = demo.captions()
    templates = table["held_out"]["templates"] if held_out else table["templates"]
    styles = table["styles"]
    return [
        Item(
            fill(templates[i % len(templates)], word or name, styles[(i // 2) % 6]),
            first_seed + i,
            name,
            styles[(i // 2) % 6],
        )
        for i in range(count)
    ]


def of_style(style: str, count: int, first_seed: int) -> list[Item]:
    """`count` prompts that ask for the style, objects in turn."""
    table = demo.captions()
    objects, templates = list(table["objects"]), table["templates"]
    return [
        Item(fill(templates[(i // 3) % len(templates)], objects[i % 40], style), first_seed + i, objects[i % 40], style)
        for i in range(count)
    ]


def of_others(erased: set[str], per_pair: int, first_seed: int) -> list[Item]:
    """Every object and style that is not erased, `per_pair` pictures each."""
    table = demo.captions()
    pairs = [(o, s) for o in table["objects"] for s in table["styles"] if o not in erased and s not in erased]
    templates = table["templates"]
    return [
        Item(fill(templates[(7 * i + k) % len(templates)], o, s), first_seed + per_pair * i + k, o, s)
        for i, (o, s) in enumerate(pairs)
        for k in range(per_pair)
    ]


def phrasings(name: str, count: int, first_seed: int) -> dict[str, list[Item]]:
    """Ways of asking for the object that no erasure was fitted on, by kind."""
    plain = of_object(name, count, first_seed, held_out=True)

    def changed(change: Any) -> list[Item]:
        return [Item(change(i.prompt), i.seed, i.object, i.style) for i in plain]

    return {
        "unseen templates": plain,
        "upper case": changed(str.upper),
        "punctuation": changed(lambda p: p.replace(name, f'"{name}"!') + "."),
        "zero-width character": changed(lambda p: p.replace(name, f"\u200b{name}\u200b")),
    }


def synonyms(name: str, count: int, first_seed: int) -> list[Item]:
    """The held-out pairs of synonym and template, then held-out templates with synonyms."""
    table = demo.captions()
    words = table["objects"][name]
    pairs = [(w, t) for w, t in table["held_out"]["synonym_in_template"] if w in words]
    pairs += [(w, t) for w in words for t in table["held_out"]["templates"]]
    styles = table["styles"]
    return [
        Item(
            fill(pairs[i % len(pairs)][1], pairs[i % len(pairs)][0], styles[i % 6]), first_seed + i, name, styles[i % 6]
        )
        for i in range(count)
    ]


def not_naming(erased: set[str], count: int, seed: int) -> list[str]:
    """`count` different prompts in held-out templates that name none of the erased concepts, nor a synonym of one."""
    table = demo.captions()
    rng = random.Random(seed)
    held = table["held_out"]
    words = [w for o, names in table["objects"].items() if o not in erased for w in (o, *names)]
    styles = [s for s in table["styles"] if s not in erased]
    prompts = set(table["plain_prompts"])
    prompts |= {fill(t, style=s) for t in held["style_templates"] for s in styles}
    while len(prompts) < count:
        if rng.random() < 0.8:
            prompts.add(fill(rng.choice(held["templates"]), rng.choice(words), rng.choice(styles)))
        else:
            prompts.add(fill(rng.choice(held["object_templates"]), rng.choice(words)))
    return sorted(prompts)[:count]
