"""`train_ear` from end to end on a tiny model: the file, exact resume, both students, and what is refused."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge import erase
from expunge.erase_ops.delta.adapter import DeltaAdapter
from expunge.erase_ops.ear.config import EARConfig
from expunge.erase_ops.ear.pairs import ConceptPair
from expunge.erase_ops.ear.training import train_ear
from expunge.errors import InvalidInputError, UnsupportedOperationError
from expunge.pipelines.janus import JanusPipeline

PAIRS = [
    ConceptPair("a red star on white", "a red ring on white", "star"),
    ConceptPair("a star on black", "a moon on black", "star"),
]


@pytest.fixture
def pipe(tiny_janus: Callable[..., Any]) -> JanusPipeline:
    return JanusPipeline(*tiny_janus())


def config_of(**fields: Any) -> EARConfig:
    return EARConfig.preset("demo", **{"prompts": PAIRS, "window": 32, "retain": ["a blue moon on white"], **fields})


def digest(pipe: JanusPipeline) -> str:
    parts = [parameter.detach().float().numpy().tobytes() for parameter in pipe.model.parameters()]
    return hashlib.sha256(b"".join(parts)).hexdigest()


@pytest.mark.parametrize("student", ["selected", "lora"])
def test_the_model_comes_back_and_the_delta_is_what_was_trained(
    pipe: JanusPipeline, tmp_path: Path, student: str
) -> None:
    before, state, flags = digest(pipe), torch.get_rng_state(), [p.requires_grad for p in pipe.model.parameters()]
    steps = []
    delta = train_ear(
        pipe, config_of(student=student), output_dir=tmp_path, progress=False, callback=lambda i, m: steps.append(m)
    )
    assert digest(pipe) == before
    assert torch.equal(torch.get_rng_state(), state)
    assert [p.requires_grad for p in pipe.model.parameters()] == flags
    assert [sorted(step) for step in steps] == [["erase", "kept", "learning_rate", "loss", "retain", "skipped"]] * 4
    assert (delta.method, delta.component, delta.family) == ("ear", "language_model", "janus")
    assert delta.concepts == ["star"]
    assert bool(delta.values) is (student == "selected")
    again = DeltaAdapter.from_pretrained(tmp_path)
    ids = pipe.encode_prompt(["a red star on white"])[0]
    with torch.no_grad():
        erased = [erase(pipe, [one]).model(input_ids=ids).logits for one in (delta, again)]
    assert torch.equal(*erased)


def test_a_run_that_was_cut_off_goes_on_bit_for_bit(pipe: JanusPipeline, tmp_path: Path) -> None:
    whole = train_ear(pipe, config_of(), progress=False)

    def stop(step: int, metrics: dict[str, float]) -> None:
        if step == 3:  # in the middle of the second rollout
            raise KeyboardInterrupt

    config = config_of(checkpointing_steps=1)
    with pytest.raises(KeyboardInterrupt):
        train_ear(pipe, config, output_dir=tmp_path, progress=False, callback=stop)
    resumed = train_ear(pipe, config.replace(resume_from_checkpoint="latest"), output_dir=tmp_path, progress=False)
    assert all(torch.equal(value, resumed.values[name]) for name, value in whole.values.items())


def test_master_weights_are_float32(pipe: JanusPipeline) -> None:
    """Adam's steps of 1e-4 on bfloat16 weights round away, as in the published scripts."""
    pipe.to(torch.bfloat16)
    before = {name: p.detach().float() for name, p in pipe.language_model.named_parameters()}
    delta = train_ear(pipe, config_of(learning_rate=1e-5, prompts=PAIRS[:1], retain=()), progress=False)
    for name, value in delta.values.items():
        moved = value - before[name]
        assert value.dtype == torch.float32
        assert 0 < moved.abs().max() < 1e-4
        assert not torch.equal(value.bfloat16().float(), value)  # it holds what bfloat16 would round away
    assert pipe.language_model.embed_tokens.weight.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layers": (3, 4)}, "layers from 0 to 3"),
        ({"window": 0}, "window"),
        ({"window": 65}, "window.*at most 64"),
        ({"threshold": -1.0}, "threshold"),
        ({"threshold_quantile": 1.0}, "threshold_quantile"),
        ({"space": "logits", "granularity": "element"}, "granularity"),
        ({"prompts": [ConceptPair("a star", "a ring")]}, "concepts"),
        ({"projections": ("gate_proj",)}, "projections"),
        ({"rollout_guidance_scale": 0.0}, "rollout_guidance_scale"),
        ({"retain": (" ",)}, "retain"),
    ],
)
def test_settings_that_do_not_fit_are_refused(pipe: JanusPipeline, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInputError, match=message):
        train_ear(pipe, config_of(**fields), progress=False)


@pytest.mark.parametrize(
    "fields",
    [
        {"gradient_checkpointing": True},
        {"gradient_accumulation_steps": 2},
        {"max_train_steps": 3},
        {"validation_steps": 1, "validation_prompts": ("a star",)},
    ],
)
def test_what_is_not_supported_says_so(pipe: JanusPipeline, tmp_path: Path, fields: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedOperationError, match=next(iter(fields))):
        train_ear(pipe, config_of(**fields), output_dir=tmp_path, progress=False)


def test_an_erased_model_is_not_trained_on(pipe: JanusPipeline) -> None:
    delta = train_ear(pipe, config_of(prompts=PAIRS[:1], window=64), progress=False)
    with pytest.raises(UnsupportedOperationError, match="without erasures"):
        train_ear(erase(pipe, [delta]), config_of(), progress=False)


def test_the_paper_preset_has_the_published_numbers() -> None:
    config = EARConfig.preset("paper", prompts=PAIRS)
    assert (config.window, config.threshold, config.eta, config.learning_rate) == (48, 0.05, 1.0, 1e-4)
    assert config.layers == (0, 1, 2, 3, 4)
    assert config.steps(576) == 2 * 12
    assert config.replace(window=100).windows(576) == 6  # the published scripts drop the sixth
