"""How ItD erases concepts of the bundled model: which prompts tell a concept, and which set the threshold.

Held-out templates and synonym-in-template pairs are never used here; evaluation keeps them for itself.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from expunge import demo
from expunge.demo.builder.concepts import fill
from expunge.demo_run.recipe import STYLE_SUFFIX, other_prompts
from expunge.errors import InvalidInputError

if TYPE_CHECKING:
    from expunge.erase_ops.itd.adapter import ItDAdapter
    from expunge.erase_ops.itd.tokens import TokenSet
    from expunge.erase_ops.sae.model import SparseAutoencoder

TOP = 24  # features of a prompt, over all its tokens
TARGET_SHARE, BENIGN_SHARE = 0.005, 0.0  # of prompts that must have a feature among theirs, and that may
# The bundled encoder keeps objects at positions 6 to 9 and styles at 10 to 14: in most prompts these are padding.
TOKENS: TokenSet = "all"
STRENGTH = -8.0  # what erased activations are multiplied by: ItD's own
TARGETS = 600  # prompts with concepts, all concepts' together
SELECTION, CALIBRATION = 500, 400  # benign prompts whose features are subtracted, and that the threshold is set on
TARGET_FPR = 0.0  # of the prompts that the threshold is set on: scores of a concept lie far above them
STYLES_OF_AN_OBJECT = 2  # that an object's prompts go through, in turn


def concept_prompts(tables: dict[str, Any], concept: str) -> list[str]:
    """Prompts that name one object or style, in every training template.

    Args:
        tables: the caption tables.
        concept: a name in them, such as `"cat"`, `"neon"` or `"neon style"`.

    Raises:
        InvalidInputError: if the tables do not know the concept.
    """
    name = concept.removesuffix(STYLE_SUFFIX)
    objects, styles = tables["objects"], tables["styles"]
    held_out = {tuple(pair) for pair in tables["held_out"]["synonym_in_template"]}
    if name in styles:
        things = list(objects)
        prompts = [
            fill(template, things[(3 * index + turn) % len(things)], name)
            for index, template in enumerate(tables["templates"])
            for turn in range(3)
        ]
        return [*prompts, *(fill(template, style=name) for template in tables["style_templates"])]
    if name not in objects:
        raise InvalidInputError(
            "concept",
            expected=f"a concept of the bundled model: {', '.join([*objects, *styles])}",
            found=repr(concept),
            fix="Name one of them.",
        )
    words = [name, *objects[name]]
    prompts = [
        fill(template, word, styles[(index + turn) % len(styles)])
        for word in words
        for index, template in enumerate(tables["templates"])
        if (word, template) not in held_out
        for turn in range(STYLES_OF_AN_OBJECT)
    ]
    return [*prompts, *(fill(template, word) for word in words for template in tables["object_templates"])]


def spread(prompts: list[str], most: int) -> list[str]:
    """At most so many of the prompts, evenly from all of the list."""
    count = min(len(prompts), max(1, most))
    return [prompts[index * len(prompts) // count] for index in range(count)]


def benign_prompts(tables: dict[str, Any], concepts: Sequence[str], seed: int = 0) -> tuple[list[str], list[str]]:
    """Prompts that name none of the concepts, for subtracting features and for the threshold.

    They share the few plain prompts alone, the empty one among them: what an erasure must never touch.
    """
    names = [concept.removesuffix(STYLE_SUFFIX) for concept in concepts]
    plain = tables["plain_prompts"]
    found = sorted(set(other_prompts(tables, *names)) - set(plain))
    random.Random(seed).shuffle(found)
    split = min(SELECTION, len(found) // 2)
    return [*plain, *found[:split]], [*plain, *found[split : split + CALIBRATION]]


def make_adapter(pipe: Any, sae: SparseAutoencoder, concepts: Sequence[str], **fields: Any) -> ItDAdapter:
    """An adapter that erases concepts of the bundled model, its threshold set.

    Args:
        pipe: the bundled pipeline.
        sae: an autoencoder of its text encoder.
        concepts: objects or styles.
        fields: of the adapter, instead of the recipe's.

    Raises:
        InvalidInputError: if a concept is none of the bundled model's, or no feature tells it.
    """
    from expunge.erase_ops.itd.adapter import ItDAdapter
    from expunge.erase_ops.itd.features import find_concepts

    tables = demo.captions()
    prompts = {concept: spread(concept_prompts(tables, concept), TARGETS // len(concepts)) for concept in concepts}
    selection, calibration = benign_prompts(tables, concepts)
    encoder = (pipe.text_encoder, pipe.tokenizer)
    features = find_concepts(
        sae,
        *encoder,
        prompts,
        benign=selection,
        n=TOP,
        target_share=TARGET_SHARE,
        benign_share=BENIGN_SHARE,
        tokens=TOKENS,
    )
    adapter = ItDAdapter.from_sae(sae, features, **{"strength": STRENGTH, "tokens": TOKENS, "hot": 0} | fields)
    adapter.calibrate(calibration, text_encoder=encoder[0], tokenizer=encoder[1], target_fpr=TARGET_FPR)
    adapter.settings = {"top": TOP, "selection": len(selection), "target": sum(map(len, prompts.values()))}
    return adapter
