"""Fingerprints: the same for the same model in any form, different for any other."""

from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig

from expunge.erase_ops.fingerprint import architecture_fingerprint, base_parameters, same_weights, weights_fingerprint
from expunge.errors import InvalidInputError

TinyPipeline = Callable[..., StableDiffusionPipeline]


def of(pipe: Any) -> str:
    encoders = [pipe.text_encoder, getattr(pipe, "text_encoder_2", None)]
    tokenizers = [pipe.tokenizer, getattr(pipe, "tokenizer_2", None)]
    return weights_fingerprint([e for e in encoders if e is not None], [t for t in tokenizers if t is not None])


def test_an_architecture_is_its_class_configuration_and_shapes(tiny_sd: TinyPipeline) -> None:
    unet = tiny_sd().unet
    fingerprint = architecture_fingerprint(unet)
    assert fingerprint.startswith("a1:") and len(fingerprint) == 35
    assert architecture_fingerprint(tiny_sd(seed=1).unet) == fingerprint
    assert architecture_fingerprint(deepcopy(unet).half()) == fingerprint
    assert architecture_fingerprint(torch.compile(unet)) == fingerprint
    assert architecture_fingerprint(tiny_sd(in_channels=9).unet) == fingerprint  # an inpainting model of the same base
    for other in ({"attention_head_dim": 4}, {"cross_attention_dim": 64}, {"use_linear_projection": True}):
        assert architecture_fingerprint(tiny_sd(**other).unet) != fingerprint


def test_adapters_do_not_change_an_architecture(tiny_sd: TinyPipeline) -> None:
    pipe = tiny_sd()
    architecture, names = architecture_fingerprint(pipe.unet), [name for name, _ in base_parameters(pipe.unet)]
    weights = of(pipe)
    for component in (pipe.unet, pipe.text_encoder):
        component.add_adapter(LoraConfig(r=2, target_modules=["to_k", "q_proj"]))
    assert any("lora_A" in name for name, _ in pipe.unet.named_parameters())
    assert architecture_fingerprint(pipe.unet) == architecture
    assert [name for name, _ in base_parameters(pipe.unet)] == names
    assert of(pipe) == weights


def test_text_encoders_in_any_precision_are_the_same(tiny_sd: TinyPipeline, tiny_sdxl: TinyPipeline) -> None:
    for make in (tiny_sd, tiny_sdxl):
        fingerprint = of(make())
        assert of(make()) == fingerprint
        for dtype in (torch.float16, torch.bfloat16):
            assert same_weights(of(make().to(dtype)), fingerprint)


def test_other_text_encoders_are_not(tiny_sd: TinyPipeline, tiny_sdxl: TinyPipeline) -> None:
    fingerprint = of(tiny_sd())
    assert not same_weights(of(tiny_sd(seed=1)), fingerprint)
    assert not same_weights(of(tiny_sdxl()), fingerprint)
    tuned = tiny_sd()
    with torch.no_grad():
        for parameter in tuned.text_encoder.parameters():
            parameter += 0.02 * parameter.square().mean().sqrt() * torch.randn_like(parameter)
    assert not same_weights(of(tuned), fingerprint)


def test_one_layer_tuned_hard_is_another_encoder(tiny_sd: TinyPipeline) -> None:
    fingerprint, tuned = of(tiny_sd()), tiny_sd()
    with torch.no_grad():
        next(p for n, p in tuned.text_encoder.named_parameters() if n.endswith("layers.1.mlp.fc1.weight")).normal_()
    assert not same_weights(of(tuned), fingerprint)


def test_two_swapped_layers_are_another_encoder(tiny_sd: TinyPipeline) -> None:
    fingerprint, swapped = of(tiny_sd()), tiny_sd()
    parameters = dict(swapped.text_encoder.named_parameters())
    first, second = (next(p for n, p in parameters.items() if f"layers.{i}.mlp.fc1.weight" in n) for i in (0, 1))
    first.data, second.data = second.data, first.data
    assert not same_weights(of(swapped), fingerprint)


def test_textual_inversion_is_the_same_encoder(tiny_sd: TinyPipeline) -> None:
    pipe = tiny_sd()
    fingerprint = of(pipe)
    pipe.load_textual_inversion({"<new>": torch.randn(1, 32)}, token="<new>")
    assert pipe.text_encoder.get_input_embeddings().weight.shape[0] == pipe.tokenizer.vocab_size + 1
    assert same_weights(of(pipe), fingerprint)


def test_another_vocabulary_is_another_encoder(tiny_sd: TinyPipeline) -> None:
    pipe = tiny_sd()

    class Renamed:
        vocab_size = pipe.tokenizer.vocab_size

        def get_vocab(self) -> dict[str, int]:
            return {token.replace("cat", "dog!"): index for token, index in pipe.tokenizer.get_vocab().items()}

    assert not same_weights(weights_fingerprint([pipe.text_encoder], [Renamed()]), of(pipe))


def test_sequential_offloading_hides_no_weights(tiny_sd: TinyPipeline) -> None:
    from accelerate import cpu_offload

    pipe = tiny_sd()
    fingerprint = of(pipe)
    cpu_offload(pipe.text_encoder, execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in pipe.text_encoder.parameters())
    assert of(pipe) == fingerprint


def test_what_cannot_be_fingerprinted(tiny_sd: TinyPipeline) -> None:
    pipe = tiny_sd()
    with pytest.raises(InvalidInputError, match="one for each of 1"):
        weights_fingerprint([pipe.text_encoder], [])
    with pytest.raises(InvalidInputError, match="on meta"):
        weights_fingerprint([pipe.text_encoder.to("meta")], [pipe.tokenizer])


@pytest.mark.parametrize(
    "text", ["", "w1:", "w1:" + "0" * 16 + ":" + "0" * 16 + ":" + "A" * 171 + "=", "a1:" + "0" * 32]
)
def test_a_foreign_string_equals_only_itself(tiny_sd: TinyPipeline, text: str) -> None:
    assert same_weights(text, text)
    assert not same_weights(text, of(tiny_sd()))
