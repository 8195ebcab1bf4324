"""Each known way of getting ItD wrong, one test a trap. Those of the GPU's code are in `test_traps_of_kernels.py`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import CLIPTextModel

from expunge import ItDAdapter, erase
from expunge.erase_ops.hookpoints import block_path
from expunge.erase_ops.itd.attach import attach, attachment_of, detach
from expunge.erase_ops.itd.classifier import calibrate_scores, is_flagged
from expunge.erase_ops.itd.features import find_features, top_features
from expunge.erase_ops.sae.activations import recorded
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.errors import UnsupportedOperationError

Make = Callable[..., Any]
LAYER = 1


@pytest.fixture(scope="module")
def cat(pipe: Any, itd_for: Make) -> Any:
    return itd_for(pipe, "cat")


@pytest.fixture(scope="module")
def wide(pipe: Any, sae_for: Make) -> Any:
    """An adapter with so many features that some fire on anything."""
    return ItDAdapter.from_sae(sae_for(pipe.text_encoder), {"x": range(0, 256, 3)})


def ids_of(pipe: Any, *prompts: str) -> torch.Tensor:
    return pipe.tokenizer(list(prompts), padding="max_length", return_tensors="pt").input_ids


def states(encoder: Any, ids: torch.Tensor) -> torch.Tensor:
    with torch.no_grad(), recorded(encoder, LAYER) as found:
        encoder(ids)
    return found[-1]


def edit_of(adapter: Any, x: torch.Tensor) -> torch.Tensor:
    """What erasing does to states `[T, d]`, all of whose tokens may be edited."""
    return adapter.rows.erase(x)[0]


def active(sae: Any, x: torch.Tensor, *, without: Any = ()) -> torch.Tensor:
    """All activations `[T, h]`, by the definition: the k best of the scores, of which positive ones count."""
    scores = (x - sae.b_dec) @ sae.W_enc.T + sae.b_enc
    scores[:, list(without)] = -torch.inf
    best = scores.topk(sae.config.k, dim=1)
    return torch.zeros_like(scores).scatter(1, best.indices, best.values.relu())


def test_trap_1_masking_before_the_choice_of_the_k_best_lets_other_features_in(wide: Any) -> None:
    x, ids = torch.randn(20, 32), wide.rows.ids
    dense = active(wide.sae, x)
    after = dense.clone()
    after[:, ids] = 0
    before = active(wide.sae, x, without=ids.tolist())
    mask_after, mask_before = (x + (one - dense) @ wide.sae.W_dec for one in (after, before))
    torch.testing.assert_close(edit_of(wide, x), mask_after, atol=1e-5, rtol=1e-5)
    assert (mask_before - mask_after).norm() > 0.3 * (mask_after - x).norm()


def test_trap_2_a_score_that_is_not_positive_is_not_active_although_among_the_k_best(sae_for: Make, pipe: Any) -> None:
    sae = sae_for(pipe.text_encoder)
    sae.b_enc.data -= 100.0
    sae.b_enc.data[5] += 101.0
    x = 0.1 * torch.randn(6, 32)
    assert (sae.encode(x)[0] > 0).sum() < 6 * sae.config.k
    adapter = ItDAdapter.from_sae(sae, {"x": range(256)})
    acts = adapter.rows.membership(x)
    assert (acts >= 0).all() and set(acts.nonzero()[:, 1].tolist()) <= {5}


def test_trap_3_encoder_and_decoder_are_not_tied_and_decoder_rows_have_no_unit_norm(sae_for: Make, pipe: Any) -> None:
    sae = sae_for(pipe.text_encoder)
    sae.W_dec.data = torch.randn(256, 32) * torch.rand(256, 1) * 7
    adapter, x = ItDAdapter.from_sae(sae, {"x": range(0, 256, 2)}), torch.randn(9, 32)
    expected = x - active(sae, x)[:, ::2] @ sae.W_dec[::2]
    torch.testing.assert_close(edit_of(adapter, x), expected, atol=1e-4, rtol=1e-5)


def test_trap_4_the_decoders_bias_is_subtracted_before_encoding_and_added_to_no_delta(sae_for: Make, pipe: Any) -> None:
    for subtracts in (True, False):
        sae = sae_for(pipe.text_encoder, apply_b_dec_to_input=subtracts)
        sae.b_dec.data *= 20
        adapter, x = ItDAdapter.from_sae(sae, {"x": range(256)}), torch.randn(5, 32)
        scores = (x - (sae.b_dec if subtracts else 0)) @ sae.W_enc.T + sae.b_enc
        best = scores.topk(8, dim=1)
        acts = torch.zeros_like(scores).scatter(1, best.indices, best.values.relu())
        torch.testing.assert_close(edit_of(adapter, x), x - acts @ sae.W_dec, atol=1e-3, rtol=1e-5)


def test_trap_5_a_square_dictionary_hides_a_transposed_one_and_strides_are_not_shapes(pipe: Any, sae_for: Make) -> None:
    plain = sae_for(pipe.text_encoder, width=32)
    strided = SparseAutoencoder(
        plain.config,
        {"W_enc": plain.W_enc.T.contiguous().T, "W_dec": plain.W_dec.T.contiguous().T}
        | {"b_enc": plain.b_enc, "b_dec": plain.b_dec},
    )
    turned = SparseAutoencoder(
        plain.config, {"W_enc": plain.W_enc.T, "W_dec": plain.W_dec.T, "b_enc": plain.b_enc, "b_dec": plain.b_dec}
    )
    x, features = torch.randn(7, 32), {"x": range(0, 32, 3)}
    one, same, other = (edit_of(ItDAdapter.from_sae(sae, features), x) for sae in (plain, strided, turned))
    expected = x - active(plain, x)[:, ::3] @ plain.W_dec[::3]
    torch.testing.assert_close(one, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(same, one, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(other, one, atol=0.1)


def test_trap_6_the_error_of_the_reconstruction_and_bos_stay_in_the_states(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat")
    before = states(encoder, ids)[0]
    attach(encoder, [cat])
    after = states(encoder, ids)[0]
    error = before - cat.sae(before)
    quiet = (after == before).all(1)
    assert quiet[0] and 1 < quiet.sum() < len(quiet)  # tokens on which nothing fires keep every bit
    assert error.abs().max() > 0.1
    kept = torch.zeros(len(before), 256).scatter(1, *reversed(cat.sae.encode(before)))
    kept[1:, cat.rows.ids] = 0
    kept[0] = 0
    loud = ~quiet
    edited = (kept @ cat.sae.W_dec + cat.sae.b_dec + error)[loud]  # the error of the plain reconstruction
    torch.testing.assert_close(after[loud], edited, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("length", [8, 11, 16])
def test_trap_7_bos_counts_for_nothing_and_padding_is_edited_but_not_scored(
    length: int, pipe: Any, encoder: Any, cat: Any
) -> None:
    whole = ids_of(pipe, "a cat", "a dog", "a small cat")
    attachment = attach(encoder, [cat])
    encoder(whole)
    expected, flags = attachment.last.scores, attachment.last.flagged
    for rows in ([0], [2, 1, 0], [0, 1, 2] * 5):
        encoder(whole[rows, :length])
        torch.testing.assert_close(attachment.last.scores, expected[rows], rtol=1e-5, atol=0)
        assert torch.equal(attachment.last.flagged, flags[rows])
    before = states(pipe.text_encoder, whole[:1])[0]
    attach(encoder, [cat], gate=1.0)
    changed = (states(encoder, whole[:1])[0] != before).any(1)
    fires = (active(cat.sae, before)[:, cat.rows.ids] > 0).any(1)
    assert changed[1:].equal(fires[1:]) and not changed[0]


def test_trap_8_the_negative_prompt_is_not_edited(tiny_sd: Make, cat: Any) -> None:
    pipe, plain = tiny_sd(), tiny_sd()
    arguments = {"device": "cpu", "num_images_per_prompt": 1, "do_classifier_free_guidance": True}
    base = plain.encode_prompt("a dog", negative_prompt="a cat", **arguments)
    erased = erase(pipe, cat).encode_prompt("a dog", negative_prompt="a cat", **arguments)
    assert all(torch.equal(one, other) for one, other in zip(erased, base, strict=True))
    positive, negative = erase(pipe, cat).encode_prompt("a cat", negative_prompt="a cat", **arguments)
    assert torch.equal(negative, base[1]) and not torch.equal(positive, negative)
    both = erase(pipe, cat, edit_negative=True).encode_prompt("a cat", negative_prompt="a cat", **arguments)
    assert torch.equal(both[0], both[1]) and torch.equal(both[0], positive)


def test_trap_9_a_blocks_output_is_a_tensor_and_its_first_row_is_one_prompt(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a dog", "a cat", "a cat")
    attach(encoder, [cat])
    block = encoder.get_submodule(block_path(encoder, LAYER))
    outputs: list[Any] = []
    block.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    encoder(ids)
    assert isinstance(outputs[0], torch.Tensor) and outputs[0].shape == (3, 16, 32)
    assert torch.equal(outputs[0][1], outputs[0][2])


@pytest.mark.parametrize("recorded_before", [False, True])
def test_trap_10_recorded_hidden_states_are_the_edited_ones(
    recorded_before: bool, pipe: Any, encoder: Any, cat: Any
) -> None:
    ids = ids_of(pipe, "a cat")
    if recorded_before:  # transformers hooks the blocks the first time that it is asked to record
        encoder(ids, output_hidden_states=True)
    plain = pipe.text_encoder(ids, output_hidden_states=True).hidden_states
    attach(encoder, [cat])
    found = encoder(ids, output_hidden_states=True).hidden_states
    assert len(found) == len(plain) == 4
    assert torch.equal(found[LAYER], plain[LAYER]) and not torch.equal(found[LAYER + 1], plain[LAYER + 1])
    torch.testing.assert_close(found[LAYER + 1], states(encoder, ids), atol=1e-5, rtol=1e-5)
    detach(encoder)
    again = encoder(ids, output_hidden_states=True).hidden_states
    assert all(torch.equal(one, other) for one, other in zip(again, plain, strict=True))


def test_trap_11_skipped_blocks(tiny_sd: Make, itd_for: Make, draw: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where diffusers looks for an encoder's last norm under clip_skip, transformers 5 has no such level."""
    pipe = erase(tiny_sd(), itd_for(tiny_sd(), "cat"))
    found = draw(pipe, ["a cat", "a dog"], clip_skip=1)
    assert not hasattr(pipe.text_encoder, "text_model")
    with pytest.raises(UnsupportedOperationError, match="clip_skip=2"):
        draw(pipe, "a cat", clip_skip=2)  # the edited block's output would not be used
    monkeypatch.setattr(CLIPTextModel, "text_model", property(lambda self: self), raising=False)
    plain = draw(tiny_sd(), ["a cat", "a dog"], clip_skip=1)
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_trap_12_the_choice_does_not_depend_on_the_models_dtype_or_autocast(dtype: Any, wide: Any) -> None:
    x = torch.randn(40, 32).to(dtype)
    expected = wide.rows.membership(x.float())
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(wide.rows.membership(x), expected)
    assert torch.equal(wide.rows.membership(x), expected) and (expected > 0).any()


def test_trap_12_casting_the_encoder_leaves_the_autoencoder_as_it_is(pipe: Any, encoder: Any, cat: Any) -> None:
    attach(encoder, [cat])
    encoder.to(torch.bfloat16)
    block = encoder.get_submodule(block_path(encoder, LAYER))
    assert torch.equal(block.get_buffer("erasure_0_W_enc"), cat.rows.W_enc)
    out = encoder(ids_of(pipe, "a cat"))
    assert out.last_hidden_state.dtype == torch.bfloat16 and bool(attachment_of(encoder).last.flagged)


def test_trap_13_the_threshold_is_set_on_benign_prompts_and_used_for_the_very_same_score(
    pipe: Any, encoder: Any, cat: Any
) -> None:
    benign, target = torch.tensor([0.0, 1.0, 2.0, 9.0]), torch.tensor([3.0, 10.0])
    lowest = 0.99 * target.min()  # ItD's rule
    assert is_flagged(benign, lowest).sum() == 1
    threshold, record = calibrate_scores(benign, 0.0, target)
    assert not is_flagged(benign, threshold).any() and record["recall"] == 0.5
    prompts = ["a cat", "a dog", "a small cat on a beach"]
    for score, strength in [("max", 0.0), ("mean", -8.0), ("official", -6.0)]:
        adapter = replace(cat, score=score, detection_strength=strength, strength=-8.0)
        attachment = attach(encoder, [adapter])
        encoder(ids_of(pipe, *prompts))
        expected = adapter.prompt_scores(pipe.text_encoder, pipe.tokenizer, prompts)
        torch.testing.assert_close(attachment.last.scores[:, 0], expected, rtol=1e-5, atol=1e-7)


def test_trap_14_more_features_than_are_active_are_not_filled_up_with_any_ids(pipe: Any, sae_for: Make) -> None:
    sae = sae_for(pipe.text_encoder)
    x, own = torch.randn(1, 3, 32), torch.tensor([[False, True, True]])
    (found,) = top_features(sae, x, own, n=200)
    values, ids = sae.encode(x[own])
    assert len(found) <= 16 and set(found.tolist()) == set(ids[values > 0].tolist())
    assert set(find_features([found]).tolist()) == set(found.tolist())


@pytest.mark.parametrize("activation", ["batchtopk", "jumprelu", "topk"])
def test_trap_15_a_prompts_features_do_not_depend_on_its_batch(activation: Any, pipe: Any, sae_for: Make) -> None:
    sae = sae_for(pipe.text_encoder, activation=activation)
    adapter, x = ItDAdapter.from_sae(sae, {"x": range(0, 256, 5)}), torch.randn(4, 6, 32)
    loud = torch.cat([x[:1], 50 * torch.randn(3, 6, 32)])
    torch.testing.assert_close(adapter.rows.membership(loud)[0], adapter.rows.membership(x)[0], rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_trap_16_the_edit_runs_in_a_compiled_encoder(pipe: Any, encoder: Any, cat: Any) -> None:
    torch._dynamo.reset()
    ids = ids_of(pipe, "a cat", "a dog")
    attach(encoder, [cat])
    compiled = torch.compile(encoder, backend="eager")
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(compiled(ids).last_hidden_state, encoder(ids).last_hidden_state)
            assert attachment_of(compiled).last.flagged[:, 0].tolist() == [True, False]
        detach(compiled)
        plain = pipe.text_encoder(ids).last_hidden_state
        torch.testing.assert_close(compiled(ids).last_hidden_state, plain)
        attach(compiled, [cat])
        assert not torch.allclose(compiled(ids).last_hidden_state, plain)
    torch._dynamo.reset()


def test_trap_22_nothing_is_left_behind_by_an_exception(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat")
    attachment = attach(encoder, [cat])
    expected = states(encoder, ids)
    handle = encoder.final_layer_norm.register_forward_pre_hook(lambda *_: 1 / 0)
    for _ in range(2):
        with attachment.recording() as records, pytest.raises(ZeroDivisionError):
            encoder(ids)
        assert records == [] and attachment._running.work is None
    handle.remove()
    assert torch.equal(states(encoder, ids), expected)
    assert len(encoder._forward_pre_hooks) == len(encoder._forward_hooks) == 1


def test_trap_22_erasing_twice_erases_once(pipe: Any, encoder: Any, cat: Any) -> None:
    ids = ids_of(pipe, "a cat")
    attach(encoder, [cat])
    once = states(encoder, ids)
    attach(encoder, [cat])
    assert torch.equal(states(encoder, ids), once) and len(encoder._forward_pre_hooks) == 1
    attach(encoder, [cat, replace(cat)])
    assert torch.equal(states(encoder, ids), once)
    detach(encoder)
    assert torch.equal(states(encoder, ids), states(pipe.text_encoder, ids))
