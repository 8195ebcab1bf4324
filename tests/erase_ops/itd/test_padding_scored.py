"""Adapters that score all tokens: the score is that of the prompt padded in full, however the encoder is called."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import T5Config, T5EncoderModel

from expunge.erase_ops.itd.adapter import ItDAdapter
from expunge.erase_ops.itd.attach import attach, attachment_of
from expunge.erase_ops.itd.features import find_concepts, prompt_features
from expunge.erase_ops.itd.tokens import full_length, padded_in_full
from expunge.erase_ops.sae.activations import recorded
from expunge.errors import InvalidInputError, UnsupportedOperationError

Make = Callable[..., Any]
PROMPTS = ["a cat", "a photo of a cat on a sofa", "a dog", "a house in the night"]


@pytest.fixture(scope="module")
def pipe(tiny_sd: Make) -> Any:
    return tiny_sd()


@pytest.fixture
def encoder(pipe: Any) -> Any:
    """A fresh copy."""
    return copy.deepcopy(pipe.text_encoder)


@pytest.fixture(scope="module")
def adapter(pipe: Any, sae_for: Make) -> Any:
    """One of tokens="all" whose features fire on every prompt; its threshold lies between their scores."""
    sae = sae_for(pipe.text_encoder)
    features = prompt_features(sae, pipe.text_encoder, pipe.tokenizer, PROMPTS, n=12, tokens="all")
    made = ItDAdapter.from_sae(sae, {"cat": torch.cat(features).unique()}, tokens="all")
    made.threshold = float(made.prompt_scores(pipe.text_encoder, pipe.tokenizer, PROMPTS).median())
    return made


def called(pipe: Any, encoder: Any, prompts: list[str], padding: str) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """The record of one call of an erased encoder, what came out of its block, and the token ids."""
    ids = pipe.tokenizer(prompts, padding=padding, return_tensors="pt").input_ids
    with torch.no_grad(), recorded(encoder, 1) as states:
        encoder(ids)
    return attachment_of(encoder).last, states[-1], ids


@pytest.mark.parametrize("padding", ["max_length", "longest"])
@pytest.mark.parametrize("size", [1, 2, 4])
def test_scores_do_not_depend_on_batches_or_padding(
    padding: str, size: int, pipe: Any, encoder: Any, adapter: Any
) -> None:
    expected = adapter.prompt_scores(encoder, pipe.tokenizer, PROMPTS)
    attach(encoder, [adapter])
    found = [called(pipe, encoder, PROMPTS[i : i + size], padding)[0] for i in range(0, len(PROMPTS), size)]
    torch.testing.assert_close(torch.cat([record.scores for record in found])[:, 0], expected, rtol=1e-5, atol=0)
    flags = torch.cat([record.flagged for record in found])[:, 0]
    assert flags.tolist() == (expected >= adapter.threshold).tolist() and 0 < int(flags.sum()) < len(flags)


def test_padding_alone_may_flag_a_prompt(pipe: Any, encoder: Any, adapter: Any) -> None:
    own = copy.copy(adapter)
    own.tokens = "own"
    scores = {one.tokens: one.prompt_scores(encoder, pipe.tokenizer, PROMPTS) for one in (adapter, own)}
    assert bool((scores["all"] >= scores["own"]).all()) and bool((scores["all"] > scores["own"]).any())


def test_a_short_call_is_edited_as_the_long_one(pipe: Any, encoder: Any, adapter: Any) -> None:
    plain = called(pipe, attached(encoder, adapter, gate=0.0), PROMPTS, "longest")[1]
    _, short, _ = called(pipe, attached(encoder, adapter), PROMPTS, "longest")
    record, long, _ = called(pipe, encoder, PROMPTS, "max_length")
    torch.testing.assert_close(short, long[:, : short.shape[1]], rtol=1e-5, atol=1e-5)
    for row, flagged in enumerate(record.flagged[:, 0].tolist()):
        assert torch.equal(short[row], plain[row]) != flagged


def attached(encoder: Any, adapter: Any, **settings: Any) -> Any:
    attach(encoder, [adapter], **settings)
    return encoder


def test_a_short_call_leaves_nothing_behind(pipe: Any, encoder: Any, adapter: Any) -> None:
    running = attach(encoder, [adapter]).block.running
    called(pipe, encoder, PROMPTS, "longest")
    assert (running.work, running.full, running.seen, running.record) == (None,) * 4
    with pytest.raises(IndexError):
        encoder(torch.full((1, 3), 10**6))  # fails while the prompt padded in full is looked at
    assert (running.work, running.full, running.seen) == (None,) * 3
    assert called(pipe, encoder, PROMPTS, "longest")[0].flagged.any()


def test_short_calls_of_several_threads_do_not_mix(pipe: Any, encoder: Any, adapter: Any) -> None:
    attachment = attach(encoder, [adapter])
    expected = adapter.prompt_scores(pipe.text_encoder, pipe.tokenizer, PROMPTS)
    found: dict[int, torch.Tensor] = {}

    def call(index: int) -> None:
        for _ in range(5):
            with attachment.recording() as records:
                called(pipe, encoder, [PROMPTS[index]], "longest")
            found[index] = records[-1].scores[0, 0]

    threads = [threading.Thread(target=call, args=(index,)) for index in range(len(PROMPTS))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    torch.testing.assert_close(torch.stack([found[i] for i in range(4)]), expected, rtol=1e-5, atol=0)


def test_own_and_all_adapters_of_one_autoencoder_score_each_for_itself(
    pipe: Any, encoder: Any, adapter: Any, itd_for: Make
) -> None:
    own = itd_for(pipe, "cat", sae=adapter.sae, fields={"name": "own"})
    attach(encoder, [own, adapter])
    record, _, _ = called(pipe, encoder, PROMPTS, "max_length")
    expected = [one.prompt_scores(pipe.text_encoder, pipe.tokenizer, PROMPTS) for one in (own, adapter)]
    torch.testing.assert_close(record.scores, torch.stack(expected, 1), rtol=1e-5, atol=0)


def test_features_are_looked_for_where_scores_are(pipe: Any, adapter: Any) -> None:
    tokens = ["own", "all"]
    own, every = (
        prompt_features(adapter.sae, pipe.text_encoder, pipe.tokenizer, ["cat"], n=64, tokens=one) for one in tokens
    )
    assert set(own[0].tolist()) < set(every[0].tolist())
    found = find_concepts(adapter.sae, pipe.text_encoder, pipe.tokenizer, {"cat": ["cat"]}, n=64, tokens="all")
    assert found["cat"].tolist() == sorted(every[0].tolist())


def test_it_is_kept_in_files(adapter: Any, tmp_path: Any) -> None:
    assert ItDAdapter.from_pretrained(adapter.save_pretrained(tmp_path)).tokens == "all"
    with pytest.raises(InvalidInputError, match="tokens"):
        ItDAdapter(adapter.rows, adapter.concept_features, tokens="padding")


def test_an_encoder_without_a_full_length_is_refused(sae_for: Make) -> None:
    sizes = {"vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2}
    encoder = T5EncoderModel(T5Config(**sizes))
    sae = sae_for(encoder)
    adapter = ItDAdapter.from_sae(sae, {"cat": [1, 2]}, tokens="all")
    with pytest.raises(UnsupportedOperationError, match="tokens='own'"):
        attach(encoder, [adapter])


def test_padding_in_full(pipe: Any) -> None:
    ids, mask = torch.tensor([[8, 1, 9]]), torch.tensor([[1, 1, 1]])
    padded, hidden = padded_in_full(ids, mask, 5, 7)
    assert padded.tolist() == [[8, 1, 9, 7, 7]] and hidden is not None and hidden.tolist() == [[1, 1, 1, 0, 0]]
    assert padded_in_full(ids[0], None, 2, 7)[0].tolist() == ids.tolist()  # never cut
    assert full_length(pipe.text_encoder.config) == pipe.tokenizer.model_max_length
