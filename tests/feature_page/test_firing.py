"""What features fire on, against the autoencoder's own activations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expunge.erase_ops.sae.activations import hidden_states, tokenize
from expunge.erase_ops.sae.config import SAEConfig
from expunge.errors import InvalidInputError
from expunge.feature_page.firing import PADDING, FeatureReport, examine
from expunge.feature_page.page import render

PROMPTS = ["a cat", "the old dog sleeps", "cat", "a house in the rain"]


@pytest.fixture
def pieces(tiny_sd: Callable[..., Any], sae_for: Callable[..., Any]) -> tuple[Any, Any, Any]:
    pipe = tiny_sd()
    return sae_for(pipe.text_encoder), pipe.text_encoder, pipe.tokenizer


def test_activations_are_the_autoencoders_at_the_prompts_own_tokens(pieces: tuple[Any, Any, Any]) -> None:
    sae, encoder, tokenizer = pieces
    ids = list(range(sae.config.width))
    reports = examine(sae, encoder, tokenizer, PROMPTS, ids, shown=len(PROMPTS))
    tokens = tokenizer("the old dog sleeps").input_ids[1:]  # BOS is left out, the end of text is the prompt's
    with torch.no_grad():
        states = encoder(
            torch.tensor([tokenizer("the old dog sleeps").input_ids]), output_hidden_states=True
        ).hidden_states[sae.config.layer + 1]
    expected = sae.membership(states[0, 1:], torch.tensor(ids))  # [tokens, h]
    for feature, report in zip(ids, reports, strict=True):
        here = [example for example in report.examples if example.prompt == "the old dog sleeps"]
        assert bool(here) == bool((expected[:, feature] > 0).any())
        if here:
            assert len(here[0].tokens) == len(tokens)
            torch.testing.assert_close(torch.tensor(here[0].acts), expected[:, feature], rtol=1e-4, atol=1e-5)
            assert here[0].acts[here[0].peak] == here[0].strongest
    assert sum(report.prompts > 0 for report in reports) > 5


def test_padding_is_looked_at_where_it_is_asked_for(pieces: tuple[Any, Any, Any]) -> None:
    sae, encoder, tokenizer = pieces
    states = hidden_states(encoder, tokenize(tokenizer, ["a cat"]), sae.config.layer)
    acts = sae.membership(states, torch.arange(sae.config.width))[0, 1:]  # [L - 1, h]
    feature = int(acts[-1].argmax())  # one that fires on the last token, which is padding
    (found,) = examine(sae, encoder, tokenizer, ["a cat"], [feature], tokens="all")
    assert found.share == pytest.approx((acts[:, feature] > 0).float().mean().item())
    (example,) = found.examples
    assert example.tokens[1] == "cat" and example.tokens[-1] == PADDING != example.tokens[2]
    torch.testing.assert_close(torch.tensor(example.acts), acts[:, feature], rtol=1e-4, atol=1e-5)


def test_the_strongest_prompts_come_first_and_no_more_than_asked_for(pieces: tuple[Any, Any, Any]) -> None:
    sae, encoder, tokenizer = pieces
    for report in examine(sae, encoder, tokenizer, PROMPTS, range(sae.config.width), shown=2):
        peaks = [example.strongest for example in report.examples]
        assert peaks == sorted(peaks, reverse=True) and len(peaks) == min(2, report.prompts)
        assert all(peak > 0 for peak in peaks)
        assert report.strongest == (peaks[0] if peaks else 0.0)


def test_an_artefacts_rows_know_their_own_features_alone(pieces: tuple[Any, Any, Any]) -> None:
    sae, encoder, tokenizer = pieces
    rows = sae.rows(torch.tensor([2, 5, 9]))
    assert examine(rows, encoder, tokenizer, PROMPTS, [9, 2]) == examine(sae, encoder, tokenizer, PROMPTS, [9, 2])
    with pytest.raises(InvalidInputError, match="3, whose rows"):
        examine(rows, encoder, tokenizer, PROMPTS, [2, 3])


def test_there_must_be_prompts(pieces: tuple[Any, Any, Any]) -> None:
    with pytest.raises(InvalidInputError, match="prompts"):
        examine(*pieces, [], [1])


def test_a_page_of_a_feature_that_never_fires() -> None:
    silent = FeatureReport(4, 0.0, 0, 0.0, 0.0, [], [])
    page = render("<sae>", SAEConfig(d_in=4, width=8, k=2, layer=1), 3, {"4": [4]}, [silent])
    assert "None of the prompts makes it fire" in page
    assert "&lt;sae&gt;" in page and "<sae>" not in page
