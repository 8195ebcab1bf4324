"""The text side: states as the pipelines encode them, tokens, concepts, calibration."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expunge.erase_ops import gates
from expunge.erase_ops.gates import calibrate, encode_states, make_concept, normalise, token_sets
from expunge.erase_ops.spm import Factors, SPMAdapter
from expunge.errors import InvalidInputError

PROMPTS = ["a cat", "", "A photo of a DOG, on the beach", "cat " * 40]


def sd_text(pipe: StableDiffusionPipeline) -> dict[str, Any]:
    return {"tokenizers": [pipe.tokenizer], "text_encoders": [pipe.text_encoder]}


def adapter_for(pipe: StableDiffusionPipeline, text: str = "cat", neutral: str = "", **kw: Any) -> SPMAdapter:
    concept = make_concept(text, neutral=neutral, family="sd", **sd_text(pipe), **kw)
    factors = {"mid_block.attentions.0.proj_in": Factors(torch.ones(1, 4), torch.ones(4, 1))}
    return SPMAdapter(factors, [concept], neutral=neutral)


@pytest.mark.parametrize("clip_skip", [None, 0, 1, 2])
def test_sd_states_are_what_the_pipeline_encodes(
    tiny_sd: Callable[..., StableDiffusionPipeline], clip_skip: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    if not hasattr(pipe.text_encoder, "text_model"):  # diffusers 0.42 asks for it, transformers 5 has dropped it
        pipe.text_encoder.__dict__["text_model"] = pipe.text_encoder
    with torch.no_grad():
        expected = torch.cat([pipe.encode_prompt(p, "cpu", 1, False, clip_skip=clip_skip)[0] for p in PROMPTS])
    states = encode_states(prompts=PROMPTS, family="sd", clip_skip=clip_skip, **sd_text(pipe))
    assert states.dtype == torch.float32 and not states.requires_grad
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-6)
    monkeypatch.setattr(gates, "BATCH", 3)  # more prompts than one batch
    torch.testing.assert_close(
        encode_states(prompts=PROMPTS, family="sd", clip_skip=clip_skip, **sd_text(pipe)),
        expected,
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("clip_skip", [None, 1])
@pytest.mark.parametrize("refiner", [False, True])
def test_sdxl_states_are_what_the_pipeline_encodes(
    tiny_sdxl: Callable[..., StableDiffusionXLPipeline], clip_skip: int | None, refiner: bool
) -> None:
    pipe = tiny_sdxl()
    if refiner:
        pipe.text_encoder = pipe.tokenizer = None
    with torch.no_grad():
        expected = torch.cat(
            [
                pipe.encode_prompt(p, device="cpu", do_classifier_free_guidance=False, clip_skip=clip_skip)[0]
                for p in PROMPTS
            ]
        )
    states = encode_states(
        [t for t in (pipe.tokenizer, pipe.tokenizer_2) if t is not None],
        [e for e in (pipe.text_encoder, pipe.text_encoder_2) if e is not None],
        PROMPTS,
        family="sdxl",
        clip_skip=clip_skip,
    )
    assert states.shape[2] == (64 if refiner else 96)
    torch.testing.assert_close(states, expected, atol=1e-6, rtol=1e-6)


def test_a_half_precision_encoder_gives_float32_states(tiny_sd: Callable[..., StableDiffusionPipeline]) -> None:
    pipe = tiny_sd()
    exact = encode_states(prompts=PROMPTS, family="sd", **sd_text(pipe))
    pipe.text_encoder.to(torch.bfloat16)
    states = encode_states(prompts=PROMPTS, family="sd", **sd_text(pipe))
    assert states.dtype == torch.float32
    assert 0 < (states - exact).norm() / exact.norm() < 0.02


@pytest.mark.parametrize(("family", "encoders"), [("sd", 2), ("flux", 1), ("sdxl", 3), ("sd", 0)])
def test_encoders_that_do_not_fit_the_family(
    tiny_sd: Callable[..., StableDiffusionPipeline], family: str, encoders: int
) -> None:
    pipe = tiny_sd()
    with pytest.raises(InvalidInputError, match="encode_states"):
        encode_states([pipe.tokenizer] * encoders, [pipe.text_encoder] * encoders, ["a"], family=family)


@pytest.mark.parametrize(
    ("written", "meant"),
    [
        ("c\u200bat", "cat"),  # zero-width space
        ("CAT", "cat"),
        ("c\u00adat", "cat"),  # soft hyphen
        ("\ufeffｃａｔ", "cat"),  # byte-order mark, full-width letters
        ("𝒸𝒶𝓉", "cat"),
        ("Straße", "strasse"),
        ("a  cat", "a  cat"),
    ],
)
def test_normalise(written: str, meant: str) -> None:
    assert normalise(written) == meant


@given(st.text())
def test_normalise_changes_nothing_twice_for_ascii(text: str) -> None:
    ascii_text = text.encode("ascii", "ignore").decode()
    assert normalise(ascii_text) == ascii_text.lower()
    assert "\u200b" not in normalise(text)


def test_token_sets(tiny_sd: Callable[..., StableDiffusionPipeline]) -> None:
    tokenizer = tiny_sd().tokenizer
    cat, dog, a = (tokenizer.convert_tokens_to_ids(f"{word}</w>") for word in ("cat", "dog", "a"))
    assert token_sets(tokenizer, ["a cat", "A C\u200bAT", "", "dog dog"]) == [{a, cat}, {a, cat}, set(), {dog}]
    assert token_sets(tokenizer, []) == []
    beyond = "dog " * 14 + "cat"  # 14 words and two special tokens fill the encoder: the cat is not read
    assert token_sets(tokenizer, [beyond]) == [{dog}]


def test_make_concept(tiny_sd: Callable[..., StableDiffusionPipeline]) -> None:
    pipe = tiny_sd()
    tokens = {w: pipe.tokenizer.convert_tokens_to_ids(f"{w}</w>") for w in ("monet", "style", "watercolour")}
    phrasings = ["monet style", "a painting in monet style"]
    concept = make_concept(
        "monet style", neutral="watercolour style", family="sd", phrasings=phrasings, **sd_text(pipe)
    )
    assert concept.token_ids == (tokens["monet"],)
    assert concept.all_token_ids == tuple(sorted((tokens["monet"], tokens["style"])))
    assert concept.phrasings == tuple(phrasings)
    assert concept.states is not None
    assert torch.equal(concept.states, encode_states(prompts=phrasings, family="sd", **sd_text(pipe)))
    assert make_concept("cat", neutral="", family="sd", **sd_text(pipe)).phrasings == ("cat",)
    with pytest.raises(InvalidInputError, match="neutral"):
        make_concept("style", neutral="watercolour style", family="sd", **sd_text(pipe))


def brute_force(scores: list[float], rate: float) -> float:
    """The infimum of thresholds with at most that rate of scores at or above: tried on all of them."""
    return min(t for t in scores if sum(s > t for s in scores) <= rate * len(scores) + 1e-9)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.25, 0.5])
def test_calibrated_threshold_is_the_lowest_with_the_rate(
    tiny_sd: Callable[..., StableDiffusionPipeline], rate: float
) -> None:
    pipe = tiny_sd()
    adapter = adapter_for(pipe)
    words = ["dog", "car", "panda", "tree", "house", "person", "sofa", "beach", "night", "red"]
    benign = [f"a {word}" for word in words] + [f"a photo of a {word}" for word in words]
    threshold, record = calibrate(adapter, benign=benign, false_positive_rate=rate, **sd_text(pipe))
    states = encode_states(prompts=benign, family="sd", **sd_text(pipe))
    concept = adapter.concept_list[0].states
    assert concept is not None
    scores = torch.cosine_similarity(states.flatten(1), concept.flatten(1)).tolist()
    assert threshold == pytest.approx(brute_force(scores, rate), abs=3e-5)
    assert record["realised_false_positive_rate"] <= rate
    assert record["realised_false_positive_rate"] == pytest.approx(sum(s >= threshold for s in scores) / len(scores))
    assert record["n_benign"] == 20 and record["n_target"] == 0 and record["recall"] is None
    assert record["quantile_score"] < threshold
    assert json.loads(json.dumps(record)) == record
    assert calibrate(adapter, benign=benign, false_positive_rate=rate, **sd_text(pipe)) == (threshold, record)


def scored(monkeypatch: pytest.MonkeyPatch, cosines: dict[str, float]) -> None:
    """Replaces the cosine by given numbers: states carry the number of the prompt."""
    monkeypatch.setattr(
        gates, "encode_states", lambda t, e, prompts, family: torch.tensor([cosines[p] for p in prompts])
    )
    monkeypatch.setattr(gates, "cosine_scores", lambda adapter, states: states)


def test_a_gap_moves_the_threshold_half_way(
    tiny_sd: Callable[..., StableDiffusionPipeline], monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = tiny_sd()
    adapter = adapter_for(pipe)
    scored(monkeypatch, {"a dog": 0.5, "a car": 0.4, "a cat": 0.9, "cat photo": 0.7, "a kitten": 0.3})
    threshold, record = calibrate(adapter, benign=["a dog", "a car"], target=["a cat", "cat photo"], **sd_text(pipe))
    assert threshold == pytest.approx(0.6)
    assert record["recall"] == record["recall_with_overlap"] == 1.0 and record["lowest_target_score"] == pytest.approx(
        0.7
    )
    threshold, record = calibrate(adapter, benign=["a dog", "a car"], target=["a cat", "a kitten"], **sd_text(pipe))
    assert threshold == pytest.approx(0.5, abs=2e-5) and threshold > 0.5
    assert record["recall"] == 0.5
    threshold, record = calibrate(adapter, benign=["a dog", "a cat"], target=["a kitten"], **sd_text(pipe))
    assert record["realised_false_positive_rate"] == 0.0
    assert record["realised_false_positive_rate_with_overlap"] == 0.5, (
        "'a cat' among the benign has the concept's token"
    )


def test_calibration_refuses_what_has_no_answer(
    tiny_sd: Callable[..., StableDiffusionPipeline],
) -> None:
    pipe = tiny_sd()
    adapter = adapter_for(pipe)
    for arguments in ({"benign": []}, {"benign": ["a dog"], "false_positive_rate": 1.0}):
        with pytest.raises(InvalidInputError, match="calibrate"):
            calibrate(adapter, **arguments, **sd_text(pipe))
    with pytest.raises(InvalidInputError, match="benign"):
        calibrate(adapter, benign=["cat", "dog"], **sd_text(pipe))
    adapter.concept_list[0].states = None
    with pytest.raises(InvalidInputError, match="make_concept"):
        calibrate(adapter, benign=["a dog"], **sd_text(pipe))


def test_scores_take_the_nearest_phrasing(tiny_sd: Callable[..., StableDiffusionPipeline]) -> None:
    pipe = tiny_sd()
    adapter = adapter_for(pipe, phrasings=["cat", "a photo of a kitten"])
    states: Tensor = encode_states(prompts=["a photo of a kitten", "cat"], family="sd", **sd_text(pipe))
    assert gates.cosine_scores(adapter, states).tolist() == pytest.approx([1.0, 1.0], abs=1e-6)
