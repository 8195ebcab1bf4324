"""The seam between trainers and models: what a family encodes and predicts is what its pipeline would."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expunge.erase_ops.training.families import Conditioning, family_of
from expunge.errors import UnsupportedOperationError

FAMILIES = ["tiny_sd", "tiny_sdxl"]


def watch(pipe: Any) -> list[dict[str, Any]]:
    """Records the keyword arguments and output of every denoiser call."""
    calls: list[dict[str, Any]] = []

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        calls.append({"latents": args[0], "timestep": args[1], "output": output[0], **kwargs})

    pipe.unet.register_forward_hook(hook, with_kwargs=True)
    return calls


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_are_the_pipelines_own(name: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)()
    calls = watch(pipe)
    pipe("a cat", negative_prompt="blue", num_inference_steps=1, output_type="latent", guidance_scale=5.0)
    seen = calls.pop()
    family = family_of(pipe)
    conditioning = Conditioning.cat([family.encode_negative(["blue"]), family.encode(["a cat"])])
    size = family.image_size(family.native_resolution, torch.Generator(), dynamic_crops=False)
    timesteps = torch.as_tensor(seen["timestep"]).expand(2)
    with torch.no_grad():
        output = family.predict(seen["latents"], timesteps, conditioning, size)
    torch.testing.assert_close(output, seen["output"], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(conditioning.states, seen["encoder_hidden_states"], atol=1e-6, rtol=1e-5)


def test_sdxl_forces_zeros_for_the_empty_negative_prompt(tiny_sdxl: Callable[..., Any]) -> None:
    pipe = tiny_sdxl()
    calls = watch(pipe)
    pipe("a cat", num_inference_steps=1, output_type="latent", guidance_scale=5.0)
    family = family_of(pipe)
    negative = family.encode_negative(["", "blue"])
    assert negative.pooled is not None
    assert torch.equal(negative.states[:1], calls[0]["encoder_hidden_states"][:1])
    assert not negative.pooled[0].any() and bool(negative.states[1].any())
    pipe.register_to_config(force_zeros_for_empty_prompt=False)
    torch.testing.assert_close(family.encode_negative([""]).states, family.encode([""]).states)


@pytest.mark.parametrize("name", FAMILIES)
def test_images_from_cached_embeddings_are_the_same(name: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)()
    settings = {"num_inference_steps": 2, "output_type": "latent", "guidance_scale": 5.0}
    text = pipe("a cat", negative_prompt="blue", generator=torch.Generator().manual_seed(1), **settings).images
    inputs = family_of(pipe).pipeline_inputs(["a cat"], "blue")
    cached = pipe(**inputs, generator=torch.Generator().manual_seed(1), **settings).images
    torch.testing.assert_close(cached, text, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_equal_prompts_are_encoded_once(name: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)()
    seen: list[int] = []
    pipe.text_encoder.register_forward_hook(lambda module, args, output: seen.append(1))
    encoded = family_of(pipe).encode(["a cat", "a dog", "a cat"])
    assert len(seen) == 1 and torch.equal(encoded.states[0], encoded.states[2])
    assert not torch.equal(encoded.states[0], encoded.states[1]) and len(encoded) == 3
    assert (encoded.pooled is None) == (name == "tiny_sd")


@pytest.mark.parametrize("name", FAMILIES)
def test_clip_skip_reaches_the_encoder(name: str, request: pytest.FixtureRequest) -> None:
    pipe = request.getfixturevalue(name)()
    tokens = pipe.tokenizer("a cat", padding="max_length", max_length=16, return_tensors="pt").input_ids
    with torch.no_grad():
        hidden = pipe.text_encoder(tokens, output_hidden_states=True).hidden_states
        # SD reads the last layer through the final norm, SDXL the one before it without
        expected = pipe.text_encoder.final_layer_norm(hidden[-2]) if name == "tiny_sd" else hidden[-3]
    states = family_of(pipe, clip_skip=1).encode(["a cat"]).states[..., : expected.shape[-1]]
    torch.testing.assert_close(states, expected)
    assert not torch.equal(family_of(pipe).encode(["a cat"]).states[..., : expected.shape[-1]], expected)


def test_latent_shapes(tiny_sd: Callable[..., Any]) -> None:
    family = family_of(tiny_sd())
    assert family.native_resolution == 16 and family.latent_shape(16) == (4, 8, 8)
    for side in (15, 20, 0):  # three resolutions: latents must be a multiple of 4
        with pytest.raises(UnsupportedOperationError, match="resolution"):
            family.latent_shape(side)


def test_models_that_need_more_than_text_are_refused(tiny_sd: Callable[..., Any]) -> None:
    with pytest.raises(UnsupportedOperationError, match="inpainting"):
        family_of(tiny_sd(in_channels=9))
    with pytest.raises(UnsupportedOperationError, match="distilled"):
        family_of(tiny_sd(time_cond_proj_dim=8))
    with pytest.raises(UnsupportedOperationError, match="UNet2DConditionModel"):
        family_of(object())
