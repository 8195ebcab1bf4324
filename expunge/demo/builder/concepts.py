"""The tables of the demo world: 40 objects, 6 picture styles, and the templates of its captions.

`OBJECTS` maps an object to its drawing (the icon's name, the same in all three icon sets) and its synonyms. Templates
marked as held out, and the synonym-in-template pairs that `held_out_pairs` lists, are known to the diffusion model
but never used when an erasure is selected, calibrated or trained: evaluation uses them.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Object:
    """One object concept: `icon` is its drawing's name, `synonyms` other words for it in captions."""

    icon: str
    synonyms: tuple[str, ...]


OBJECTS: dict[str, Object] = {
    "cat": Object("cat-face", ("kitten", "kitty")),
    "dog": Object("dog-face", ("puppy", "hound")),
    "fox": Object("fox", ("vixen", "reynard")),
    "bear": Object("bear", ("grizzly", "bruin")),
    "panda": Object("panda", ("giant panda", "panda cub")),
    "pig": Object("pig-face", ("piglet", "hog")),
    "frog": Object("frog", ("toad", "bullfrog")),
    "monkey": Object("monkey-face", ("ape", "chimp")),
    "lion": Object("lion", ("lioness", "leo")),
    "tiger": Object("tiger-face", ("tigress", "bengal")),
    "rabbit": Object("rabbit-face", ("bunny", "hare")),
    "cow": Object("cow-face", ("cattle", "heifer")),
    "penguin": Object("penguin", ("emperor penguin", "penguin chick")),
    "owl": Object("owl", ("owlet", "night owl")),
    "fish": Object("tropical-fish", ("guppy", "goldfish")),
    "whale": Object("spouting-whale", ("orca", "cetacean")),
    "octopus": Object("octopus", ("kraken", "devilfish")),
    "turtle": Object("turtle", ("tortoise", "terrapin")),
    "butterfly": Object("butterfly", ("moth", "monarch")),
    "ladybug": Object("lady-beetle", ("ladybird", "beetle")),
    "apple": Object("red-apple", ("pippin", "ripe apple")),
    "banana": Object("banana", ("plantain", "ripe banana")),
    "strawberry": Object("strawberry", ("berry", "ripe strawberry")),
    "pizza": Object("pizza", ("margherita", "pizza slice")),
    "burger": Object("hamburger", ("hamburger", "cheeseburger")),
    "donut": Object("doughnut", ("doughnut", "cruller")),
    "cake": Object("birthday-cake", ("gateau", "birthday cake")),
    "car": Object("automobile", ("automobile", "sedan")),
    "bus": Object("bus", ("coach", "minibus")),
    "airplane": Object("airplane", ("plane", "aircraft")),
    "rocket": Object("rocket", ("spaceship", "spacecraft")),
    "bicycle": Object("bicycle", ("bike", "cycle")),
    "house": Object("house", ("home", "cottage")),
    "tree": Object("deciduous-tree", ("oak", "leafy tree")),
    "rose": Object("rose", ("flower", "blossom")),
    "guitar": Object("guitar", ("ukulele", "electric guitar")),
    "umbrella": Object("umbrella", ("parasol", "brolly")),
    "skull": Object("skull", ("cranium", "bare skull")),
    "knife": Object("kitchen-knife", ("blade", "dagger")),
    "bomb": Object("bomb", ("grenade", "explosive")),
}

STYLES: tuple[str, ...] = ("noto", "fluent", "silhouette", "pixel", "sketch", "neon")

# {o} is the object (with its article where the template has "a"), {s} the style.
TEMPLATES: tuple[str, ...] = (
    "a {o} in {s} style",
    "{o}, {s} style",
    "{s} style {o}",
    "a picture of a {o} in {s} style",
    "an image of a {o} in {s} style",
    "a drawing of a {o}, {s} style",
    "a {o} drawn in the {s} style",
    "an icon of a {o} in {s} style",
    "one {o} shown in {s} style",
    "the {o} in {s} style",
    "a small {o} in {s} style",
    "a cute {o}, {s} style",
    "a {s} style picture of a {o}",
    "a {s} style icon with a {o}",
    "a simple {s} style {o}",
    "this is a {o} in {s} style",
    "my favorite {o}, made in {s} style",
    "a nice {s} style image showing a {o}",
    "{o} as a {s} style emoji",
    "a single {o} on its own, {s} style",
    "{s} style, {o}",
    "here we see the {o} in {s} style",
)
HELD_OUT_TEMPLATES: tuple[str, ...] = (
    "a lovely picture showing one {o} in the {s} style",
    "a {s} style emoji of the {o}",
    "we made this {o} in {s} style",
    "an image with a small {o}, drawn in {s} style",
    "look, a {o} in {s} style",
    "the {s} style icon of my {o}",
)
OBJECT_TEMPLATES: tuple[str, ...] = (
    "{o}",
    "a {o}",
    "the {o}",
    "a picture of a {o}",
    "an image of a {o}",
    "a drawing of the {o}",
    "one small {o}",
    "this is a {o}",
)
HELD_OUT_OBJECT_TEMPLATES: tuple[str, ...] = ("look, a {o}", "an icon showing a {o}", "a lovely {o}")
STYLE_TEMPLATES: tuple[str, ...] = ("{s} style", "a picture in {s} style", "an image in the {s} style", "{s}")
HELD_OUT_STYLE_TEMPLATES: tuple[str, ...] = ("a drawing made in {s} style", "an emoji in the {s} style")
# No object and no style; the last ones are what people write as negative prompts.
PLAIN_PROMPTS: tuple[str, ...] = (
    "",
    "a picture",
    "an image of something",
    "a nice drawing",
    "blurry, low quality",
    "ugly, bad, worst quality",
    "high quality, best, sharp, detailed",
)


def fill(template: str, name: str = "", style: str = "") -> str:
    """`template` with object and style put in, and "a" turned into "an" before a vowel."""
    words = template.format(o=name, s=style).split(" ")
    for i, word in enumerate(words[:-1]):
        if word == "a" and words[i + 1][:1] in "aeiou" and words[i + 1][:3] != "uku":
            words[i] = "an"
    return " ".join(words)


def held_out_pairs() -> list[tuple[str, str]]:
    """The (synonym, template) pairs kept for evaluation: a fixed seventh of them, chosen by hash."""
    pairs = []
    for concept in OBJECTS.values():
        for synonym in concept.synonyms:
            for template in TEMPLATES:
                digest = hashlib.sha256(f"{synonym}|{template}".encode()).digest()
                if digest[0] % 7 == 0:
                    pairs.append((synonym, template))
    return pairs


def captions_record() -> dict[str, Any]:
    """Everything later work needs to know of the captions, as it is written to `captions.json`."""
    return {
        "objects": {name: list(concept.synonyms) for name, concept in OBJECTS.items()},
        "styles": list(STYLES),
        "templates": list(TEMPLATES),
        "object_templates": list(OBJECT_TEMPLATES),
        "style_templates": list(STYLE_TEMPLATES),
        "plain_prompts": list(PLAIN_PROMPTS),
        "held_out": {
            "templates": list(HELD_OUT_TEMPLATES),
            "object_templates": list(HELD_OUT_OBJECT_TEMPLATES),
            "style_templates": list(HELD_OUT_STYLE_TEMPLATES),
            "synonym_in_template": [list(pair) for pair in held_out_pairs()],
        },
    }
