"""The bundled autoregressive model: whole, offline, small, and it draws what is asked for."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from PIL import Image

from expunge import demo_ar
from expunge.demo_ar.builder import shapes, world
from expunge.demo_ar.recipe import training_fields
from expunge.demo_ar.scoring import Kind, Readings, read_pictures
from expunge.erase_ops.ear.config import EARConfig
from expunge.errors import InvalidInputError
from expunge.pipelines.janus import JanusPipeline

FOLDER = Path(demo_ar.__file__).parent
TABLES = demo_ar.captions()


@pytest.fixture(scope="module")
def pipe() -> JanusPipeline:
    return JanusPipeline(*demo_ar.load())


def wanted_prompts() -> tuple[list[Kind], list[str]]:
    """Every shape in two colours, by a held-out template."""
    kinds = [Kind(s, c, b) for s in TABLES["shapes"] for c, b in (("red", "white"), ("blue", "black"))]
    template = TABLES["held_out_templates"][0]
    return kinds, [world.fill(template, kind.shape, kind.colour, kind.background) for kind in kinds]


def test_files_are_whole_and_small() -> None:
    digests = json.loads((FOLDER / "checksums.json").read_text(encoding="utf-8"))
    assert set(digests) == {"classifier/model.safetensors", "model/model.safetensors"}
    for name, digest in digests.items():
        assert hashlib.sha256((FOLDER / name).read_bytes()).hexdigest() == digest
    assert sum(f.stat().st_size for f in FOLDER.rglob("*") if f.is_file() and f.suffix != ".pyc") < 8 * 2**20


def test_the_world_is_large_enough_and_every_shape_and_colour_was_drawn_right() -> None:
    assert len(TABLES["shapes"]) >= 8
    assert len(TABLES["colours"]) >= 8
    assert len(TABLES["backgrounds"]) >= 2
    scores = json.loads((FOLDER / "model" / "scores.json").read_text(encoding="utf-8"))["model"]
    assert min([*scores["per shape"].values(), *scores["per colour"].values()]) >= 0.95


def test_captions_are_the_builders() -> None:
    assert world.captions_record() == TABLES


def test_it_draws_what_is_asked_for(pipe: JanusPipeline) -> None:
    kinds, prompts = wanted_prompts()
    generators = [torch.Generator().manual_seed(seed) for seed in range(len(kinds))]
    settings = {"guidance_scale": demo_ar.GUIDANCE, "temperature": demo_ar.TEMPERATURE}
    images = pipe(prompts, generator=generators, output_type="pt", **settings).images
    readings = read_pictures(demo_ar.classifier(), images, kinds)
    for what in ("shape", "colour", "background"):
        assert readings.share(what).hits >= len(kinds) - 2
    assert readings.others("shape", "star").n == len(kinds) - 2


def test_the_tokenizer_encodes_what_it_decodes(pipe: JanusPipeline) -> None:
    """transformers compares with the raw codebook and decodes the normalised one: rows must have unit length."""
    vq = pipe.model.model.vqmodel
    assert torch.allclose(vq.quantize.embedding.weight.norm(dim=-1), torch.ones(256), atol=1e-5)
    rendered = torch.from_numpy(shapes.render("star", "red", "white", numpy.random.default_rng(0)).copy())
    x = rendered.permute(2, 0, 1)[None].float() / 127.5 - 1  # [H, W, 3] -> [1, 3, H, W]
    with torch.no_grad():
        tokens = vq.encode(x).image_tokens.view(1, -1)
        error = (vq.decode(tokens) - x).square().mean()
    assert tokens.shape == (1, 64)
    assert error < 0.02


def test_generate_of_the_host_works_on_the_bundled_files(pipe: JanusPipeline) -> None:
    inputs = pipe.processor(text=["a red star on white"], generation_mode="image", return_tensors="pt")
    tokens = pipe.model.generate(**inputs, generation_mode="image", do_sample=False, guidance_scale=1.5)
    mine = pipe("a red star on white", do_sample=False, guidance_scale=1.5, output_type="tokens").tokens
    assert torch.equal(tokens, mine)


class TestRecipe:
    @pytest.mark.parametrize("concept", ["star", "red"])
    def test_pairs_change_the_concept_alone_and_retain_prompts_lack_it(self, concept: str) -> None:
        config = EARConfig.preset("demo", **training_fields(concept))
        held_out = [template.split(" {")[0] for template in TABLES["held_out_templates"]]
        for pair in config.prompts:
            different = [(a, b) for a, b in zip(pair.original.split(), pair.modified.split(), strict=True) if a != b]
            assert {(concept, pair.replaced)} <= set(different)
            assert all(words == (concept, pair.replaced) or set(words) == {"a", "an"} for words in different)
        texts = [*config.retain, *(pair.original for pair in config.prompts)]
        assert not any(text.startswith(tuple(held_out)) for text in texts)
        assert not any(concept in text.split() for text in config.retain)

    @pytest.mark.parametrize("arguments", [{"concept": "hexagon"}, {"concept": "star", "neutral": "star"}])
    def test_what_the_model_does_not_know_is_refused(self, arguments: dict[str, Any]) -> None:
        with pytest.raises(InvalidInputError):
            training_fields(**arguments)


def test_pictures_of_every_class_differ() -> None:
    rng = numpy.random.default_rng(0)
    drawn = {shapes.render(*kind, rng).tobytes() for kind in world.classes()}
    assert len(drawn) == 128
    assert Image.fromarray(shapes.render("ring", "red", "black", rng)).size == (32, 32)


def test_new_pictures_are_others_of_the_same_classes() -> None:
    drawn = [shapes.new_pictures(1, seed) for seed in (0, 0, 1)]
    assert drawn[0].shape == (128, 3, 32, 32)
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    readings = read_pictures(demo_ar.classifier(), (drawn[2] + 1) / 2, [Kind(*kind) for kind in world.classes()])
    assert readings.share("all").hits == 128


def test_shares_are_counted_by_what_was_wanted() -> None:
    wanted = [Kind("star", "red", "white"), Kind("star", "red", "black"), Kind("ring", "blue", "white")]
    read = [Kind("star", "blue", "white"), Kind("ring", "red", "black"), Kind("ring", "blue", "white")]
    readings = Readings(wanted, read)
    assert (readings.share("shape").hits, readings.share("shape").n) == (2, 3)
    assert readings.share("shape", shape="star").hits == 1
    assert readings.share("all").hits == 1
    assert (readings.others("colour", "star").hits, readings.others("colour", "star").n) == (1, 1)
