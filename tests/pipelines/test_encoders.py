"""The text side of gating: skipped layers, LoRAs and textual inversion in the encoders, encoders of other models."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from expunge import erase
from expunge.erase_ops.spm.concepts import Concept
from expunge.errors import AdapterMismatchError, ErasureLostError
from expunge.pipelines import conditioning

Pipe = Any
TinyPipe = Callable[..., Pipe]
Draw = Callable[..., torch.Tensor]


def gate(pipe: Pipe) -> float:
    return pipe.erasures.images[0].gates[0]


def by_embeddings(pipe: Pipe, draw: Draw, prompt: str = "cat", **kwargs: Any) -> float:
    """The gate of a prompt that the pipeline itself encodes and is then given as embeddings: the cosine's alone."""
    encoding = {key: value for key, value in kwargs.items() if key in ("clip_skip", "lora_scale")}
    calling = {key: value for key, value in kwargs.items() if key != "lora_scale"}
    if "lora_scale" in kwargs:
        calling["cross_attention_kwargs"] = {"scale": kwargs["lora_scale"]}
    states, negative, *pooled = pipe.encode_prompt(
        prompt, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True, **encoding
    )
    if pooled:
        calling |= {"pooled_prompt_embeds": pooled[0], "negative_pooled_prompt_embeds": pooled[1]}
    draw(pipe, None, prompt_embeds=states, negative_prompt_embeds=negative, **calling)
    return gate(pipe)


def encoder_lora(pipe: Pipe, folder: Path, strength: float = 1.0) -> None:
    """Loads a LoRA on UNet and text encoder from a file, as users do."""
    generator = torch.Generator().manual_seed(4)
    state = {}
    for prefix, model in (("unet", pipe.unet), ("text_encoder", pipe.text_encoder)):
        for name, module in model.named_modules():
            if name.endswith(("attn2.to_k", "self_attn.q_proj", "self_attn.v_proj")):
                rows, columns = module.weight.shape
                state[f"{prefix}.{name}.lora_A.weight"] = torch.randn(2, columns, generator=generator) * strength
                state[f"{prefix}.{name}.lora_B.weight"] = torch.randn(rows, 2, generator=generator) * strength
    StableDiffusionPipeline.save_lora_weights(
        folder,
        unet_lora_layers={k.removeprefix("unet."): v for k, v in state.items() if k.startswith("unet.")},
        text_encoder_lora_layers={k.removeprefix("text_encoder."): v for k, v in state.items() if k.startswith("text")},
    )
    pipe.load_lora_weights(folder, adapter_name="style")


# Skipped layers


@pytest.fixture
def _text_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers looks for an encoder's last layer norm under clip_skip; transformers 5 has no such level."""
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)


@pytest.mark.usefixtures("_text_model")
def test_clip_skip_compares_with_concepts_that_skip_as_well(erased: Pipe, draw: Draw) -> None:
    assert by_embeddings(erased, draw) == pytest.approx(1.0)
    assert by_embeddings(erased, draw, clip_skip=1) == pytest.approx(1.0)
    assert by_embeddings(erased, draw, clip_skip=2) == pytest.approx(1.0)
    skipped, _ = erased.encode_prompt("cat", "cpu", 1, False, clip_skip=2)
    draw(erased, None, prompt_embeds=skipped, negative_prompt_embeds=skipped)
    assert gate(erased) == 0.0  # as states of no skipped layer these are far from the concept's


@pytest.mark.usefixtures("_text_model")
def test_clip_skip_encodes_the_concepts_once(erased: Pipe, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    encoded: list[Any] = []
    original = conditioning.encode_phrasings
    monkeypatch.setattr(
        conditioning, "encode_phrasings", lambda *args, **kwargs: encoded.append(kwargs) or original(*args, **kwargs)
    )
    for _ in range(3):
        draw(erased, "a cat", clip_skip=1)
    draw(erased, "a cat")
    draw(erased, "a cat", clip_skip=2)
    assert [one["clip_skip"] for one in encoded] == [1, 2]


# LoRAs


def test_a_lora_in_the_text_encoder_moves_the_concepts_along(erased: Pipe, draw: Draw, tmp_path: Path) -> None:
    encoder_lora(erased, tmp_path)
    assert by_embeddings(erased, draw) == pytest.approx(1.0)
    assert by_embeddings(erased, draw, lora_scale=0.5) == pytest.approx(1.0)
    plain, _ = erased.encode_prompt("cat", "cpu", 1, False, lora_scale=0.0)
    moved, _ = erased.encode_prompt("cat", "cpu", 1, False)
    similarity = torch.nn.functional.cosine_similarity(plain.flatten(1), moved.flatten(1)).item()
    assert similarity < 0.98  # without the re-encoding the gate would have shut
    erased.set_adapters(["style"], [0.3])
    assert by_embeddings(erased, draw) == pytest.approx(1.0)
    erased.disable_lora()
    assert by_embeddings(erased, draw) == pytest.approx(1.0)
    erased.enable_lora()
    erased.fuse_lora()
    assert by_embeddings(erased, draw) == pytest.approx(1.0)
    erased.unfuse_lora()
    erased.unload_lora_weights()
    assert by_embeddings(erased, draw) == pytest.approx(1.0)


def test_a_lora_that_was_fused_for_good_asks_for_erasing_again(
    erased: Pipe, cat: Any, draw: Draw, tmp_path: Path
) -> None:
    encoder_lora(erased, tmp_path)
    erased.fuse_lora()
    erased.unload_lora_weights()
    with pytest.raises(ErasureLostError, match="allow_mismatch"):
        draw(erased)
    erase(erased, cat, allow_mismatch=True)
    assert by_embeddings(erased, draw) == pytest.approx(1.0)


def test_erasing_a_pipeline_with_a_lora_in_its_encoder(tiny_sd: TinyPipe, cat: Any, draw: Draw, tmp_path: Path) -> None:
    pipe = tiny_sd()
    encoder_lora(pipe, tmp_path)
    erase(pipe, cat)
    assert by_embeddings(pipe, draw) == pytest.approx(1.0)


# Textual inversion and new tokens


def test_textual_inversion_is_no_other_encoder(erased: Pipe, draw: Draw) -> None:
    erased.load_textual_inversion({"<thing>": torch.randn(32)}, token="<thing>")
    draw(erased, "a <thing>")
    assert gate(erased) == 0.0
    assert by_embeddings(erased, draw) == pytest.approx(1.0)


# Other models


def test_states_of_another_encoder_are_refused_or_made_anew(
    tiny_sd: TinyPipe, cat: Any, spm_for: Callable[..., Any], draw: Draw
) -> None:
    pipe = tiny_sd(seed=1)
    with pytest.raises(AdapterMismatchError, match="allow_mismatch"):
        erase(pipe, cat)
    assert type(pipe) is StableDiffusionPipeline
    erase(pipe, cat, allow_mismatch=True)
    assert by_embeddings(pipe, draw) == pytest.approx(1.0)
    assert not torch.equal(cat.concept_list[0].states, spm_for(pipe).concept_list[0].states)  # ours was not changed


def test_states_of_unknown_origin_are_compared(tiny_sd: TinyPipe, cat: Any, draw: Draw) -> None:
    unknown = replace(cat, text_encoder_fingerprint=None)
    assert by_embeddings(erase(tiny_sd(), unknown), draw) == pytest.approx(1.0)
    with pytest.raises(AdapterMismatchError, match="text encoders"):
        erase(tiny_sd(seed=1), unknown)
    pipe = erase(tiny_sd(), unknown)
    pipe.text_encoder = tiny_sd(seed=1).text_encoder
    with pytest.raises(ErasureLostError, match="text_encoder"):
        draw(pipe)


def test_adapters_without_states_get_them_from_the_pipeline(tiny_sd: TinyPipe, cat: Any, draw: Draw) -> None:
    bare = replace(cat, concept_list=[Concept("cat")], text_encoder_fingerprint=None)
    pipe = erase(tiny_sd(), bare)
    assert by_embeddings(pipe, draw) == pytest.approx(1.0)
    draw(pipe, "a cat")
    assert gate(pipe) == 1.0
    assert bare.concept_list[0].states is None


def test_a_cast_encoder_is_the_same(tiny_sd: TinyPipe, cat: Any, draw: Draw) -> None:
    for dtype in (torch.float16, torch.bfloat16):
        pipe = erase(tiny_sd().to(dtype), cat)
        draw(pipe, "a cat")
        assert gate(pipe) == 1.0
        assert draw(copy.deepcopy(pipe).to(torch.float32)).isfinite().all()


def test_the_encoders_are_looked_at_once(erased: Pipe, draw: Draw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A fingerprint of large encoders takes seconds: only a change may ask for another."""
    taken: list[int] = []
    original = conditioning.weights_fingerprint
    monkeypatch.setattr(conditioning, "weights_fingerprint", lambda *args: taken.append(1) or original(*args))
    for prompt in ("a cat", "a dog"):
        draw(erased, prompt)
    erased.to(torch.float16).to(torch.float32)
    draw(erased)
    assert not taken
    with torch.no_grad():
        erased.text_encoder.get_parameter("embeddings.position_embedding.weight").mul_(1.0)
    draw(erased)
    assert len(taken) == 1


# SDXL


def test_sdxl_has_two_encoders_and_two_prompts(tiny_sdxl: TinyPipe, spm_for: Callable[..., Any], draw: Draw) -> None:
    pipe = erase(tiny_sdxl(), spm_for(tiny_sdxl()))
    for prompts, expected in ((("a cat", None), 1.0), (("a dog", "a cat"), 1.0), (("a dog", "a house"), 0.0)):
        image = draw(pipe, prompts[0], prompt_2=prompts[1])
        assert gate(pipe) == expected
        assert torch.equal(image, draw(tiny_sdxl(), prompts[0], prompt_2=prompts[1])) == (expected == 0.0)
    assert by_embeddings(pipe, draw) == pytest.approx(1.0)
    assert by_embeddings(pipe, draw, clip_skip=1) == pytest.approx(1.0)
    pipe.text_encoder_2 = tiny_sdxl(seed=1).text_encoder_2
    with pytest.raises(ErasureLostError, match="text_encoder_2"):
        draw(pipe)


def test_sdxl_images_are_the_baked_models(
    tiny_sdxl: TinyPipe, spm_for: Callable[..., Any], bake: Callable[..., Pipe], draw: Draw
) -> None:
    spm = spm_for(tiny_sdxl())
    pipe, baked = erase(tiny_sdxl(), spm), bake(tiny_sdxl(), spm)
    assert torch.allclose(draw(pipe), draw(baked), atol=1e-4, rtol=0)
    mixed = draw(pipe, ["a dog", "a cat"], negative_prompt=["", "red"])
    assert torch.allclose(mixed[1:], draw(baked, "a cat", negative_prompt="red", seed=1), atol=1e-4, rtol=0)
    assert torch.allclose(mixed[:1], draw(tiny_sdxl(), "a dog", negative_prompt=""), atol=1e-4, rtol=0)
