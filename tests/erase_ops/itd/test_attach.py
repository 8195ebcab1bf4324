"""Erasing in a text encoder: what is edited, what is not, and what happens to the encoder."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from peft import LoraConfig
from torch import nn
from transformers import BertConfig, BertModel, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from expunge.erase_ops.hookpoints import block_path
from expunge.erase_ops.itd.adapter import ItDAdapter
from expunge.erase_ops.itd.attach import attach, attachment_of, detach
from expunge.erase_ops.itd.block import ItDBlock
from expunge.erase_ops.sae.activations import recorded
from expunge.erase_ops.unedited import unedited
from expunge.errors import (
    AdapterMismatchError,
    ErasureLostError,
    InvalidInputError,
    NonFiniteError,
    UnsupportedOperationError,
)

Make = Callable[..., Any]
LAYER = 1


@pytest.fixture(scope="module")
def cat(pipe: Any, itd_for: Make) -> Any:
    return itd_for(pipe, "cat")


def ids_of(pipe: Any, *prompts: str, **kwargs: Any) -> torch.Tensor:
    return pipe.tokenizer(list(prompts), padding="max_length", return_tensors="pt", **kwargs).input_ids


def state_after(encoder: Any, ids: torch.Tensor, layer: int = LAYER, **kwargs: Any) -> torch.Tensor:
    with torch.no_grad(), recorded(encoder, layer) as states:
        encoder(ids, **kwargs)
    return states[-1]


def oracle(adapter: Any, x: torch.Tensor, strength: float = 0.0) -> torch.Tensor:
    """x' = x - Σ (1 - s) a d of one prompt `[L, d]`, all tokens but the first, from all activations at once."""
    sae = adapter.sae
    scores = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    best = scores.topk(sae.config.k, dim=1)
    dense = torch.zeros_like(scores).scatter(1, best.indices, best.values.relu())
    erased = torch.zeros_like(dense)
    erased[1:, adapter.rows.ids] = dense[1:, adapter.rows.ids]
    return x - (1 - strength) * erased @ sae.W_dec


@pytest.mark.parametrize("strength", [0.0, -8.0, 0.5])
def test_flagged_prompts_lose_the_erased_features_and_nothing_else(
    strength: float, pipe: Any, encoder: Any, cat: Any
) -> None:
    ids = ids_of(pipe, "a cat", "a dog", "a photo of a cat")
    before = state_after(encoder, ids)
    attachment = attach(encoder, [cat], strength=strength)
    after = state_after(encoder, ids)
    for row in (0, 2):
        torch.testing.assert_close(after[row], oracle(cat, before[row], strength), atol=2e-5, rtol=1e-5)
        assert torch.equal(after[row, 0], before[row, 0]) and not torch.equal(after[row], before[row])
    assert torch.equal(after[1], before[1])
    record = attachment.last
    assert record is not None and record.flagged[:, 0].tolist() == [True, False, True]
    assert record.untouched[1] == 1 > record.untouched[0]


def test_unflagged_prompts_get_the_very_same_tensor(pipe: Any, encoder: Any, cat: Any) -> None:
    attach(encoder, [cat])
    block, seen = encoder.get_submodule(block_path(encoder, LAYER)), []
    base = type(block).__bases__[1]
    original = base.forward

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        seen.append(original(self, *args, **kwargs))
        return seen[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(base, "forward", forward)
        after = state_after(encoder, ids_of(pipe, "a dog", "a house"))
    assert any(after is one for one in seen)


def test_padding_is_edited_and_bos_is_not(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat")
    before = state_after(encoder, ids)[0]
    attach(encoder, [cat], gate=1.0)
    after = state_after(encoder, ids)[0]
    torch.testing.assert_close(after, oracle(cat, before), atol=2e-5, rtol=1e-5)
    assert torch.equal(after[0], before[0])


@pytest.mark.parametrize(("gate", "count"), [(1.0, 3), (0.0, 0), (None, 1)])
def test_the_gate_may_be_forced(gate: Any, count: int, pipe: Any, encoder: Any, cat: Any) -> None:
    attachment = attach(encoder, [cat], gate=gate)
    encoder(ids_of(pipe, "a cat", "a dog", "a house"))
    assert int(attachment.last.flagged.sum()) == count


def test_the_threshold_may_be_given(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat", "a dog")
    scores = cat.prompt_scores(encoder, pipe.tokenizer, ["a cat", "a dog"])
    for threshold, flags in [(0.0, scores > 0), (float(scores[0]) * 2, scores < 0)]:
        attachment = attach(encoder, [cat], score_threshold=threshold)
        encoder(ids)
        assert attachment.last.flagged[:, 0].tolist() == flags.tolist()


def test_detaching_brings_the_very_block_back(pipe: Any, encoder: Any, cat: Any) -> None:
    path = block_path(encoder, LAYER)
    block, state = encoder.get_submodule(path), encoder.state_dict()
    attach(encoder, [cat])
    assert encoder.state_dict().keys() == state.keys()
    assert isinstance(encoder.get_submodule(path), ItDBlock) and isinstance(encoder.get_submodule(path), type(block))
    assert attachment_of(encoder).carries(encoder)
    detach(encoder)
    assert encoder.get_submodule(path) is block and attachment_of(encoder) is None
    assert not encoder._forward_pre_hooks and not encoder._forward_hooks
    assert torch.equal(
        state_after(encoder, ids_of(pipe, "a cat")), state_after(pipe.text_encoder, ids_of(pipe, "a cat"))
    )
    detach(encoder)


def test_several_adapters_of_one_autoencoder_take_shared_features_out_once(
    pipe: Any, encoder: Any, cat: Any, itd_for: Make
) -> None:
    dog = itd_for(pipe, "monet", sae=cat.sae)
    both = ItDAdapter.from_sae(
        cat.sae, {"cat": cat.rows.ids, "x": torch.cat([cat.rows.ids[:4], dog.rows.ids]).unique()}
    )
    ids = ids_of(pipe, "a cat", "a cat by van gogh")
    before = state_after(encoder, ids)
    attach(encoder, [cat, replace(both)], gate=1.0)
    after = state_after(encoder, ids)
    for row in range(2):
        torch.testing.assert_close(after[row], oracle(both, before[row]), atol=2e-5, rtol=1e-5)
    assert len(attachment_of(encoder).editor.banks) == 1


def test_adapters_of_two_autoencoders_of_one_block_both_read_what_came_in(
    pipe: Any, encoder: Any, cat: Any, sae_for: Make, itd_for: Make
) -> None:
    other = itd_for(pipe, "cat", sae=sae_for(encoder, seed=5))
    ids = ids_of(pipe, "a cat")
    before = state_after(encoder, ids)[0]
    attach(encoder, [cat, other], gate=1.0)
    expected = oracle(cat, before) + oracle(other, before) - before
    torch.testing.assert_close(state_after(encoder, ids)[0], expected, atol=4e-5, rtol=1e-5)
    assert len(attachment_of(encoder).editor.banks) == 2


def test_only_the_adapter_that_flags_edits(pipe: Any, encoder: Any, cat: Any, itd_for: Make) -> None:
    gogh = itd_for(pipe, "monet", sae=cat.sae)
    ids = ids_of(pipe, "a cat", "monet")
    before = state_after(encoder, ids)
    attachment = attach(encoder, [replace(cat, threshold=1e-3), replace(gogh, threshold=1e9)])
    after = state_after(encoder, ids)
    assert attachment.last.flagged.tolist()[0] == [True, False]
    torch.testing.assert_close(after[0], oracle(cat, before[0]), atol=2e-5, rtol=1e-5)


def test_official_mode_replaces_flagged_prompts_by_their_reconstruction(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat", "a dog")
    before = state_after(encoder, ids)
    attach(encoder, [cat], mode="official", strength=-8.0)
    after = state_after(encoder, ids)
    values, indices = cat.sae.encode(before[0])
    erased = torch.isin(indices, cat.rows.ids)
    erased[0] = False
    expected = cat.sae.decode(torch.where(erased, -8 * values, values), indices)
    torch.testing.assert_close(after[0], expected, atol=1e-5, rtol=1e-5)
    assert not torch.equal(after[0, 0], before[0, 0]) and torch.equal(after[1], before[1])


def test_inside_unedited_the_encoder_is_the_base_models(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat")
    attach(encoder, [cat])
    with unedited():
        with unedited():
            pass
        plain = state_after(encoder, ids)
    assert torch.equal(plain, state_after(pipe.text_encoder, ids))
    assert not torch.equal(state_after(encoder, ids), plain)


@pytest.mark.parametrize("kind", [CLIPTextModel, CLIPTextModelWithProjection])
def test_both_clip_encoders(kind: type, tiny_sdxl: Make, itd_for: Make) -> None:
    pipe = tiny_sdxl()
    component = "text_encoder" if kind is CLIPTextModel else "text_encoder_2"
    encoder = getattr(pipe, component)
    assert type(encoder) is kind
    adapter = itd_for(pipe, "cat", component=component)
    ids = ids_of(pipe, "a cat", "a dog")
    before = state_after(encoder, ids)
    attach(encoder, [adapter])
    after = state_after(encoder, ids)
    torch.testing.assert_close(after[0], oracle(adapter, before[0]), atol=4e-5, rtol=1e-5)
    assert torch.equal(after[1], before[1])


def small_adapter(sae: Any, features: int = 40) -> Any:
    return ItDAdapter.from_sae(sae, {"x": torch.arange(features)}, hot=0)


def test_t5_whose_blocks_give_tuples_and_whose_first_token_is_text(sae_for: Make) -> None:
    """The third encoder of SD3 and the second of FLUX."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=50, d_model=24, d_kv=6, d_ff=32, num_layers=3, num_heads=4, eos_token_id=1)
    encoder = T5EncoderModel(config).eval()
    adapter = small_adapter(sae_for(encoder, component="text_encoder_3"), 128)
    ids = torch.tensor([[5, 6, 1, 0, 0], [7, 8, 9, 10, 1]])
    with torch.no_grad():
        plain = encoder(ids, output_hidden_states=True)
    before = plain.hidden_states[LAYER + 1]
    attach(encoder, [adapter], gate=1.0)
    after = state_after(encoder, ids)
    values, indices = adapter.sae.encode(before)
    kept = torch.where(torch.isin(indices, adapter.rows.ids), values, 0)
    change = torch.zeros(2, 5, adapter.sae.config.width).scatter(2, indices, kept) @ adapter.sae.W_dec
    torch.testing.assert_close(after, before - change, atol=1e-4, rtol=1e-5)
    assert not torch.equal(after[:, 0], before[:, 0])
    with torch.no_grad():
        out = encoder(ids, output_hidden_states=True)
    assert torch.equal(out.hidden_states[LAYER + 1], after) and torch.equal(
        out.hidden_states[1], plain.hidden_states[1]
    )
    attach(encoder, [adapter], gate=0.0)
    with torch.no_grad():
        assert torch.equal(encoder(ids).last_hidden_state, plain.last_hidden_state)


def test_bert(sae_for: Make) -> None:
    torch.manual_seed(0)
    config = BertConfig(vocab_size=50, hidden_size=24, num_hidden_layers=3, num_attention_heads=4, intermediate_size=32)
    encoder = BertModel(config).eval()
    adapter = small_adapter(sae_for(encoder))
    ids, mask = torch.tensor([[3, 5, 6, 4, 0]]), torch.tensor([[1, 1, 1, 1, 0]])
    before = state_after(encoder, ids, attention_mask=mask)
    attach(encoder, [adapter], gate=1.0)
    after = state_after(encoder, ids, attention_mask=mask)
    assert torch.equal(after[:, 0], before[:, 0]) and not torch.equal(after, before)


# What it survives

OPERATIONS: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda encoder: pickle.loads(pickle.dumps(encoder)),
    "torch.save": lambda encoder: torch.load(saved(encoder), weights_only=False),
    "half and back": lambda encoder: encoder.half().float(),
    "training mode and back": lambda encoder: encoder.train().eval(),
    "frozen": lambda encoder: encoder.requires_grad_(False),
    "reloaded weights": lambda encoder: reloaded(encoder),
    "a LoRA of no effect": lambda encoder: with_lora(encoder),
}


def saved(encoder: Any) -> io.BytesIO:
    file = io.BytesIO()
    torch.save(encoder, file)
    file.seek(0)
    return file


def reloaded(encoder: Any) -> Any:
    encoder.load_state_dict({name: value.clone() for name, value in encoder.state_dict().items()}, strict=True)
    return encoder


def with_lora(encoder: Any) -> Any:
    encoder.add_adapter(LoraConfig(r=2, target_modules=["q_proj"]), adapter_name="style")
    return encoder


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations(name: str, pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat", "a dog")
    attach(encoder, [cat])
    expected = state_after(encoder, ids)
    other = OPERATIONS[name](encoder)
    tolerance = 0.05 if "half" in name else 1e-6
    torch.testing.assert_close(state_after(other, ids), expected, atol=tolerance, rtol=tolerance)
    attachment = attachment_of(other)
    assert attachment.last.flagged[:, 0].tolist() == [True, False]
    block = other.get_submodule(block_path(other, LAYER))
    assert block.get_buffer("erasure_0_W_enc").dtype == torch.float32
    detach(other)
    assert attachment_of(other) is None and not isinstance(other.get_submodule(block_path(other, LAYER)), ItDBlock)
    other(ids)


def test_a_copy_is_a_thing_of_its_own(pipe: Any, encoder: Any, cat: Any) -> None:
    attach(encoder, [cat])
    other, ids = copy.deepcopy(encoder), ids_of(pipe, "a cat")
    detach(encoder)
    assert torch.equal(state_after(encoder, ids), state_after(pipe.text_encoder, ids))
    assert not torch.equal(state_after(other, ids), state_after(encoder, ids))


def test_gradients_flow_through_an_edit(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat")
    attach(encoder, [cat])
    encoder.train()
    encoder.gradient_checkpointing_enable()
    encoder(ids).last_hidden_state.square().sum().backward()
    found = [parameter.grad.clone() for parameter in encoder.parameters() if parameter.grad is not None]
    encoder.zero_grad()
    encoder.gradient_checkpointing_disable()
    encoder(ids).last_hidden_state.square().sum().backward()
    again = [parameter.grad for parameter in encoder.parameters() if parameter.grad is not None]
    assert len(found) == len(again) > 10
    for one, other in zip(found, again, strict=True):
        torch.testing.assert_close(one, other)


LOSSES: dict[str, Callable[[Any, Any], Any]] = {
    "the block replaced": lambda encoder, other: put(encoder, other.get_submodule(block_path(other, LAYER))),
    "no forward pre-hooks": lambda encoder, other: encoder._forward_pre_hooks.clear(),
    "no forward hooks": lambda encoder, other: encoder._forward_hooks.clear(),
}


def put(encoder: Any, block: nn.Module) -> None:
    parent, _, name = block_path(encoder, LAYER).rpartition(".")
    encoder.get_submodule(parent)[int(name)] = block


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_lost_is_named(name: str, pipe: Any, encoder: Any, cat: Any) -> None:
    attach(encoder, [cat])
    LOSSES[name](encoder, copy.deepcopy(pipe.text_encoder))
    with pytest.raises(ErasureLostError):
        encoder(ids_of(pipe, "a cat"))


def test_parts_of_the_encoder_do_not_run_alone(pipe: Any, encoder: Any, cat: Any) -> None:
    attach(encoder, [cat])
    with pytest.raises(ErasureLostError, match="entry"):
        encoder.forward(ids_of(pipe, "a cat"))


def test_bad_arguments(pipe: Any, encoder: Any, cat: Any, tiny_sdxl: Make, itd_for: Make, sae_for: Make) -> None:
    nan = float("nan")
    for arguments in (
        {"gate": 0.5},
        {"gate": nan},
        {"score_threshold": -1.0},
        {"score_threshold": nan},
        {"strength": 1.0},
        {"strength": nan},
        {"mode": "replace"},
    ):
        with pytest.raises(InvalidInputError):
            attach(encoder, [cat], **arguments)
    with pytest.raises(InvalidInputError, match="at least one"):
        attach(encoder, [])
    with pytest.raises(InvalidInputError, match="whole autoencoder"):
        attach(encoder, [replace(cat, sae=None)], mode="official")
    with pytest.raises(UnsupportedOperationError, match="one block"):
        attach(encoder, [cat, small_adapter(sae_for(encoder, 0))])
    with pytest.raises(AdapterMismatchError, match="block 7"):
        attach(encoder, [small_adapter(sae_for(encoder, 7))])
    with pytest.raises(AdapterMismatchError, match="width"):
        attach(tiny_sdxl().text_encoder_2, [cat])
    with pytest.raises(UnsupportedOperationError, match="model_type"):
        attach(pipe.unet, [cat])
    assert attachment_of(encoder) is None and not encoder._forward_pre_hooks


def test_infinite_states_are_named(pipe: Any, encoder: Any, cat: Any) -> None:
    attach(encoder, [cat])
    encoder.get_submodule(block_path(encoder, LAYER)).mlp.fc2.bias.data[:] = float("inf")
    with pytest.raises(NonFiniteError, match="NaN or infinity"):
        encoder(ids_of(pipe, "a cat"))
