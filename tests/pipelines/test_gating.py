"""Which images are changed by how much: rows, prompts, embeddings, negative prompts, guidance, callbacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expunge import erase
from expunge.erase_ops.attach import attachment_of
from expunge.errors import InvalidInputError, NonFiniteError

Pipe = Any
TinyPipe = Callable[..., Pipe]
Draw = Callable[..., torch.Tensor]
Bake = Callable[..., Pipe]


def close(image: torch.Tensor, reference: torch.Tensor) -> bool:
    return torch.allclose(image, reference, atol=1e-4, rtol=0)


def gates(pipe: Pipe) -> list[float]:
    """The first erasure's gate of each image of the last call."""
    return [image.gates[0] for image in pipe.erasures.images]


def decided_by(pipe: Pipe) -> list[str]:
    return [image.decided_by[0] for image in pipe.erasures.images]


# Prompts


def test_each_row_of_a_mixed_batch_is_its_single_run(tiny_sd: TinyPipe, cat: Any, van_gogh: Any, draw: Draw) -> None:
    pipe = erase(tiny_sd(), [cat, van_gogh])
    prompts = ["a cat", "a dog", "van gogh sofa", "a cat by van gogh", "a van", "", "red house", "cat cat cat"]
    together = draw(pipe, prompts)
    for index, prompt in enumerate(prompts):
        torch.testing.assert_close(
            together[index : index + 1], draw(pipe, prompt, seed=index), atol=1e-4, rtol=0, msg=prompt
        )


def test_prompts_below_the_threshold_are_the_base_models_bit_for_bit(
    tiny_sd: TinyPipe, erased: Pipe, draw: Draw
) -> None:
    for prompts in ("a dog on a sofa", ["a dog", "a house"], ""):
        assert torch.equal(draw(erased, prompts), draw(tiny_sd(), prompts))
        assert set(gates(erased)) == {0.0} and set(decided_by(erased)) == {"off"}


def test_prompts_with_the_concept_are_the_baked_models(
    tiny_sd: TinyPipe, erased: Pipe, cat: Any, bake: Bake, draw: Draw
) -> None:
    baked = bake(tiny_sd(), cat)
    for prompt in ("a cat", "A CAT!", "a photo of the cat\u200b, red"):
        assert close(draw(erased, prompt), draw(baked, prompt))
        assert gates(erased) == [1.0] and decided_by(erased) == ["overlap"]


@pytest.mark.parametrize(("combine", "power"), [("linear", 1), ("official", 2)])
def test_without_a_threshold_the_cosine_is_the_strength(
    combine: str, power: int, tiny_sd: TinyPipe, cat: Any, bake: Bake, draw: Draw
) -> None:
    pipe = erase(tiny_sd(), cat, combine=combine, gate_threshold=0.0)
    image = draw(pipe, "a dog", guidance_scale=1.0)
    (gate,) = gates(pipe)
    assert 0.5 < gate < 0.98 and decided_by(pipe) == ["cosine"]
    # The reference multiplies both factors by the gate, so that one SPM acts with its square.
    assert close(image, draw(bake(tiny_sd(), cat, gate=gate**power), "a dog", guidance_scale=1.0))


def test_several_erasures_add_up_and_each_has_its_strength(
    tiny_sd: TinyPipe, cat: Any, van_gogh: Any, bake: Bake, draw: Draw
) -> None:
    pipe = erase(tiny_sd(), [cat, van_gogh], multiplier=[2.0, 0.5])
    baked = bake(bake(tiny_sd(), cat, gate=2.0), van_gogh, gate=0.5)
    assert close(draw(pipe, "a cat by van gogh"), draw(baked, "a cat by van gogh"))
    assert close(draw(pipe, "a cat"), draw(bake(tiny_sd(), cat, gate=2.0), "a cat"))


def test_always_on(tiny_sd: TinyPipe, spm_for: Callable[..., Any], cat: Any, bake: Bake, draw: Draw) -> None:
    pipe = erase(tiny_sd(), cat, gate=1.0)
    assert close(draw(pipe, "a dog"), draw(bake(tiny_sd(), cat), "a dog"))
    assert gates(pipe) == [1.0] and decided_by(pipe) == ["always"]
    assert "constant gate" in str(pipe.erasures)


def test_text_beyond_the_encoders_length_cannot_gate(tiny_sd: TinyPipe, erased: Pipe, draw: Draw) -> None:
    seen, unseen = "dog " * 10 + "cat", "dog " * 14 + "cat"  # 14 words fit
    assert torch.equal(draw(erased, unseen), draw(tiny_sd(), unseen)) and gates(erased) == [0.0]
    assert not torch.equal(draw(erased, seen), draw(tiny_sd(), seen)) and gates(erased) == [1.0]


def test_images_of_one_prompt_share_its_gate(erased: Pipe, draw: Draw) -> None:
    images = draw(erased, ["a cat", "a dog"], num_images_per_prompt=2)
    assert [image.prompt for image in erased.erasures.images] == [0, 0, 1, 1]
    assert gates(erased) == [1.0, 1.0, 0.0, 0.0]
    for index, prompt in enumerate(["a cat", "a cat", "a dog", "a dog"]):
        assert close(images[index : index + 1], draw(erased, prompt, seed=index))


# Embeddings


def test_embeddings_alone_are_gated_by_their_cosine(erased: Pipe, tiny_sd: TinyPipe, draw: Draw) -> None:
    states, negative = erased.encode_prompt("cat", "cpu", 1, True)
    by_text, by_states = draw(erased, "cat"), draw(erased, None, prompt_embeds=states, negative_prompt_embeds=negative)
    assert close(by_states, by_text)
    assert gates(erased) == [pytest.approx(1.0)] and decided_by(erased) == ["cosine"]
    states, _ = erased.encode_prompt("a dog", "cpu", 1, False)
    assert torch.equal(
        draw(erased, None, prompt_embeds=states, negative_prompt_embeds=negative), draw(tiny_sd(), "a dog")
    )


def test_long_embeddings_are_gated_by_their_best_chunk(erased: Pipe, draw: Draw) -> None:
    parts = [erased.encode_prompt(text, "cpu", 1, True) for text in ("a dog", "cat")]
    states, negative = (torch.cat([part[i] for part in parts], dim=1) for i in (0, 1))  # [1, 2 L, D]
    draw(erased, None, prompt_embeds=states, negative_prompt_embeds=negative)
    assert gates(erased) == [pytest.approx(1.0)]


def test_embeddings_that_are_not_numbers_are_refused(erased: Pipe) -> None:
    states = torch.full((1, 16, 32), torch.nan)
    with pytest.raises(NonFiniteError, match="prompt_embeds"):
        erased(prompt_embeds=states, negative_prompt_embeds=states, num_inference_steps=1)
    assert erased("a dog", num_inference_steps=1, output_type="latent").images.isfinite().all()


def test_a_pipeline_without_text_encoders(tiny_sd: TinyPipe, cat: Any, draw: Draw) -> None:
    source = tiny_sd()
    states, negative = source.encode_prompt("cat", "cpu", 1, True)
    given = {"prompt_embeds": states, "negative_prompt_embeds": negative}
    pipe = tiny_sd()
    pipe.text_encoder = pipe.tokenizer = None
    plain = draw(pipe, None, **given)
    erase(pipe, cat)
    assert not close(draw(pipe, None, **given), plain) and decided_by(pipe) == ["cosine"]


# Negative prompts and guidance


def test_a_negative_prompt_does_not_open_the_gate(tiny_sd: TinyPipe, erased: Pipe, draw: Draw) -> None:
    for negative in ("a cat", "ugly"):
        assert torch.equal(
            draw(erased, "a dog", negative_prompt=negative), draw(tiny_sd(), "a dog", negative_prompt=negative)
        )


@pytest.mark.parametrize("gate_negative", [True, False])
def test_negative_rows_follow_their_prompt_or_stay(
    gate_negative: bool, tiny_sd: TinyPipe, cat: Any, draw: Draw
) -> None:
    pipe, plain = erase(tiny_sd(), cat, gate_negative=gate_negative), erase(tiny_sd(), cat)
    attachment = attachment_of(plain.unet)
    assert attachment is not None
    plain.__class__ = plain.base
    with attachment.force([[float(gate_negative)], [1.0]]):
        reference = draw(plain, "a cat", negative_prompt="ugly")
    assert close(draw(pipe, "a cat", negative_prompt="ugly"), reference)
    mixed = draw(pipe, ["a cat", "a dog"], negative_prompt=["ugly", "a cat"])
    assert close(mixed[:1], reference)
    assert close(mixed[1:], draw(tiny_sd(), "a dog", negative_prompt="a cat", seed=1))


def test_without_guidance(tiny_sd: TinyPipe, erased: Pipe, cat: Any, bake: Bake, draw: Draw) -> None:
    prompts = ["a cat", "a dog"]
    images = draw(erased, prompts, guidance_scale=1.0)
    assert close(images[:1], draw(bake(tiny_sd(), cat), "a cat", guidance_scale=1.0))
    assert close(images[1:], draw(tiny_sd(), "a dog", guidance_scale=1.0, seed=1))
    assert gates(erased) == [1.0, 0.0]


# Callbacks


def once(act: Callable[[Pipe, dict[str, Any]], Any]) -> dict[str, Any]:
    """Arguments of a call whose callback acts after the first step."""

    def callback(pipe: Pipe, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if step == 0:
            act(pipe, tensors)
        return tensors

    return {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}


@pytest.mark.parametrize("in_place", [False, True])
def test_a_callback_that_swaps_the_embeddings_swaps_the_gate(
    in_place: bool, tiny_sd: TinyPipe, erased: Pipe, cat: Any, bake: Bake, draw: Draw
) -> None:
    def to(prompt: str) -> Callable[[Pipe, dict[str, Any]], None]:
        def swap(pipe: Pipe, tensors: dict[str, Any]) -> None:
            states, negative = pipe.encode_prompt(prompt, "cpu", 1, True)
            both = torch.cat([negative, states])
            if in_place:
                tensors["prompt_embeds"].copy_(both)
            else:
                tensors["prompt_embeds"] = both

        return swap

    def baking(pipe: Pipe, tensors: dict[str, Any]) -> None:
        to("cat")(pipe, tensors)
        bake(pipe, cat)

    assert close(draw(erased, "a dog", **once(to("cat"))), draw(tiny_sd(), "a dog", **once(baking)))
    assert gates(erased) == [pytest.approx(1.0)] and decided_by(erased) == ["cosine"]
    draw(erased, "a cat", **once(to("a dog")))
    assert gates(erased) == [0.0]  # the tokens of "a cat" no longer count
    draw(erased, "a cat")
    assert gates(erased) == [1.0]


def test_a_callback_that_ends_the_guidance(tiny_sd: TinyPipe, erased: Pipe, cat: Any, bake: Bake, draw: Draw) -> None:
    def end(pipe: Pipe, tensors: dict[str, Any]) -> None:
        pipe._guidance_scale = 0.0
        tensors["prompt_embeds"] = tensors["prompt_embeds"].chunk(2)[-1]

    for prompts in ("a cat", ["a cat", "a cat", "a cat"]):
        assert close(draw(erased, prompts, **once(end)), draw(bake(tiny_sd(), cat), prompts, **once(end)))
    mixed = draw(erased, ["a dog", "a cat"], **once(end))
    assert close(mixed[:1], draw(tiny_sd(), "a dog", **once(end)))


def test_a_call_of_the_pipeline_inside_its_callback(erased: Pipe, draw: Draw) -> None:
    """Not that diffusers' own state would survive it; but every image that comes out is an erased one."""
    inner: list[list[float]] = []

    def call(pipe: Pipe, tensors: dict[str, Any]) -> None:
        pipe("a dog", num_inference_steps=2, output_type="latent")
        inner.append(gates(pipe))

    draw(erased, "a cat", **once(call))
    assert inner == [[0.0]] and gates(erased) == [1.0]


# Other ways to call


def test_inference_mode_and_autocast(erased: Pipe, draw: Draw) -> None:
    reference = draw(erased, ["a cat", "a dog"])
    with torch.inference_mode():
        assert torch.equal(draw(erased, ["a cat", "a dog"]), reference)
        assert torch.equal(draw(erased, "a cat"), draw(erased, "a cat"))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        draw(erased, ["a cat", "a dog"])
    assert gates(erased) == [1.0, 0.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tiny_sd: TinyPipe, cat: Any, bake: Bake, draw: Draw) -> None:
    pipe, baked = erase(tiny_sd().to(dtype), cat), bake(tiny_sd(), cat).to(dtype)
    reference = draw(baked, "a cat")
    assert (draw(pipe, "a cat") - reference).abs().max() < 0.2 < (draw(tiny_sd().to(dtype)) - reference).abs().max()
    assert torch.equal(draw(pipe, "a dog"), draw(tiny_sd().to(dtype), "a dog"))


def test_bad_settings_are_named(tiny_sd: TinyPipe, cat: Any) -> None:
    for setting in ({"combine": "best"}, {"multiplier": [1.0, 2.0]}, {"gate": float("nan")}):
        with pytest.raises(InvalidInputError, match=next(iter(setting))):
            erase(tiny_sd(), cat, **setting)
