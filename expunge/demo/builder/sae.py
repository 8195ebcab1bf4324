"""The sparse autoencoder of the demo model's text encoder, which ItD erases with.

It is trained on the captions that erasures may be fitted on; held-out templates and pairs are left for evaluation.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPTextModel, CLIPTokenizer

from expunge.demo.builder.concepts import captions_record, fill
from expunge.erase_ops.sae.config import SAETrainingConfig
from expunge.erase_ops.sae.files import save_sae
from expunge.erase_ops.sae.metrics import evaluate_sae
from expunge.erase_ops.sae.training import train_sae

FOLDER, RUN = "sae", "sae-run"  # what ships; checkpoints and the log of the training
EVALUATED = 1000  # held-out captions that the figures are taken on
# Whitened, since a few directions (which position, which end) have nearly all the variance: without, half the features
# stay dead and the rest mix objects and styles. Block 0 of the two: what is edited there goes through the last one.
SETTINGS: dict[str, Any] = {
    "layer": 0,
    "width": 1024,
    "k": 8,
    "whiten": True,
    "max_train_steps": 1500,
    "token_batch_size": 1024,
    "buffer_tokens": 65536,
    "prompt_batch_size": 256,
    "padding_tokens": 4,
    "learning_rate": 2e-3,
    "lr_scheduler": "cosine",
    "lr_warmup_steps": 20,
    "auxk": 64,
    "auxk_weight": 0.06,
    "dead_after_tokens": 50_000,
}
SHORT = 4  # words of a caption that is taken twice
MOST_BEFORE = 6  # words in front of a concept, in `placed_prompts`
OBJECT_PLACES, STYLE_PLACES, SHIFTED = 10, 100, 0.2  # prompts of a word, of a style, and share of the captions

CARD = """# The demo model's sparse autoencoder

TopK, {width} features, {k} of them active, of the {d} wide hidden states after block {layer} of the text encoder in
`../model` (blocks are counted from 0). Trained by `python -m expunge.demo.builder sae` on {prompts} captions, none of
which uses a held-out template or pair, for {steps} steps of {batch} tokens: text and {padding} padding tokens a
caption, no BOS, whitened while it learned. SAELens's layout; `expunge.demo.sae()` opens it. Licence and attribution are
those of the model, whose states it was trained on.

On {evaluated} captions in held-out templates: {fvu:.2%} of the variance unexplained, {l0:.1f} active features a token,
{dead:.0%} of the features never active, {recovered:.2%} of the loss recovered through the rest of the encoder.
"""


def object_words(tables: dict[str, Any]) -> list[str]:
    """The objects' names, each with its synonyms behind it."""
    return [word for name, synonyms in tables["objects"].items() for word in (name, *synonyms)]


def training_prompts(tables: dict[str, Any]) -> list[str]:
    """Every caption of the tables that is not held out."""
    held_out = {tuple(pair) for pair in tables["held_out"]["synonym_in_template"]}
    words = object_words(tables)
    prompts = [
        fill(template, word, style)
        for word in words
        for template in tables["templates"]
        if (word, template) not in held_out
        for style in tables["styles"]
    ]
    prompts += [
        fill(template, word)
        for word in words
        for template in tables["object_templates"]
        if (word, template) not in held_out
    ]
    prompts += [fill(template, style=style) for template in tables["style_templates"] for style in tables["styles"]]
    return list(dict.fromkeys([*prompts, *tables["plain_prompts"]]))


def placed_prompts(tables: dict[str, Any], captions: list[str], seed: int = 0) -> list[str]:
    """Concepts behind random words of the templates, so that each stands at each of the first positions."""
    rng = random.Random(seed)
    words, styles = object_words(tables), tables["styles"]
    plain = " ".join(tables["templates"]).format(o="", s="").replace(",", " ").split()
    fillers = sorted({word for word in plain if word.isalpha()})

    def before() -> list[str]:
        return rng.choices(fillers, k=rng.randrange(MOST_BEFORE + 1))

    placed = [" ".join([*before(), word]) for _ in range(OBJECT_PLACES) for word in words]
    for _ in range(STYLE_PLACES):
        placed += [
            " ".join([*before(), style, "style", *rng.choices(fillers + words, k=rng.randrange(4))]) for style in styles
        ]
    shifted = rng.sample(captions, int(SHIFTED * len(captions)))
    return placed + [" ".join([*rng.choices(fillers, k=rng.randrange(1, MOST_BEFORE)), one]) for one in shifted]


def held_out_prompts(tables: dict[str, Any]) -> list[str]:
    """Captions in templates that neither the autoencoder nor an erasure was fitted on, in a fixed random order."""
    prompts = [
        fill(template, word, style)
        for word in object_words(tables)
        for template in tables["held_out"]["templates"]
        for style in tables["styles"]
    ]
    random.Random(0).shuffle(prompts)
    return prompts[:EVALUATED]


def train(output: Path, seed: int) -> dict[str, float]:
    """Trains the autoencoder of `model/text_encoder` into `sae/`, with its card; goes on from a checkpoint if cut off.

    Returns:
        The figures on held-out captions.
    """
    encoder = CLIPTextModel.from_pretrained(output / "model" / "text_encoder").eval()
    tokenizer = CLIPTokenizer.from_pretrained(output / "model" / "tokenizer")
    tables = captions_record()
    captions = training_prompts(tables)
    short = [caption for caption in captions if len(caption.split()) <= SHORT]
    prompts = [*captions, *short, *placed_prompts(tables, captions)]
    config = SAETrainingConfig(**SETTINGS, seed=seed)
    run = config.replace(checkpointing_steps=500, checkpoints_total_limit=1, resume_from_checkpoint="latest")
    sae = train_sae(encoder, tokenizer, prompts, run, output_dir=output / RUN)
    sae.config = sae.config.replace(model="expunge-demo")
    save_sae(sae, output / FOLDER, settings=config.to_dict())
    with torch.no_grad():
        found = evaluate_sae(sae, encoder, tokenizer, held_out_prompts(tables), config)
    (output / FOLDER / "README.md").write_text(
        CARD.format(
            width=config.width,
            k=config.k,
            d=sae.config.d_in,
            layer=config.layer,
            prompts=len(prompts),
            steps=config.max_train_steps,
            batch=config.token_batch_size,
            padding=config.padding_tokens,
            evaluated=EVALUATED,
            fvu=found.fvu,
            l0=found.l0,
            dead=found.dead_share,
            recovered=found.loss_recovered,
        ),
        encoding="utf-8",
    )
    (output / FOLDER / "scores.json").write_text(json.dumps(found.to_dict(), indent=1) + "\n", encoding="utf-8")
    return found.to_dict()
