"""The bundled autoencoder belongs to the bundled text encoder and is as good as its card says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import CLIPTextModel, CLIPTokenizer

from expunge import demo
from expunge.demo.builder import sae as builder
from expunge.erase_ops.fingerprint import same_weights, weights_fingerprint
from expunge.erase_ops.sae.config import SAETrainingConfig
from expunge.erase_ops.sae.metrics import evaluate_sae

FOLDER = Path(demo.__file__).parent / "sae"


@pytest.fixture(scope="module")
def pair() -> tuple[CLIPTextModel, CLIPTokenizer]:
    encoder = CLIPTextModel.from_pretrained(demo.path() / "text_encoder").eval()
    return encoder, CLIPTokenizer.from_pretrained(demo.path() / "tokenizer")


def test_it_belongs_to_the_bundled_text_encoder(pair: tuple[CLIPTextModel, CLIPTokenizer]) -> None:
    sae = demo.sae()
    assert sae.config.d_in == 128 and sae.config.activation == "topk" and sae.config.fingerprint is not None
    assert same_weights(sae.config.fingerprint, weights_fingerprint([pair[0]], [pair[1]]))
    assert (sae.config.layer, sae.config.width) == (builder.SETTINGS["layer"], builder.SETTINGS["width"])


def test_it_is_small(pair: tuple[CLIPTextModel, CLIPTokenizer]) -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 2 * 2**20


def test_its_figures_are_those_of_the_card(pair: tuple[CLIPTextModel, CLIPTokenizer]) -> None:
    promised = json.loads((FOLDER / "scores.json").read_text())
    config = SAETrainingConfig(**builder.SETTINGS)
    found = evaluate_sae(demo.sae(), *pair, builder.held_out_prompts(demo.captions())[:200], config)
    assert found.fvu == pytest.approx(promised["fvu"], rel=0.15) and found.fvu < 0.02
    assert found.loss_recovered == pytest.approx(promised["loss_recovered"], abs=0.01) and found.loss_recovered > 0.97


def test_no_held_out_caption_is_trained_on() -> None:
    tables = demo.captions()
    captions = builder.training_prompts(tables)
    placed = builder.placed_prompts(tables, captions)
    assert placed == builder.placed_prompts(tables, captions)  # the same for the same seed
    prompts = {*captions, *placed}
    held_out = builder.held_out_prompts(tables)
    assert len(prompts) > 10_000 and len(set(held_out)) == builder.EVALUATED and not prompts & set(held_out)
