"""train_spm on tiny pipelines: what it learns, gives back, writes, repeats and refuses."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from expunge.erase_ops.attach import attach, attachment_of, detach
from expunge.erase_ops.spm.adapter import SPMAdapter
from expunge.erase_ops.spm.anchors import Anchors
from expunge.erase_ops.spm.config import PromptPair, SPMTrainingConfig
from expunge.erase_ops.spm.states import TrainingState
from expunge.erase_ops.spm.training import EncodedText, SPMTraining, new_adapter, train_spm
from expunge.erase_ops.training.families import Conditioning, family_of
from expunge.errors import AdapterMismatchError, InvalidInputError, NonFiniteError, UnsupportedOperationError

ROOT = Path(__file__).resolve().parents[3]
PAIRS = (PromptPair("a cat on the sofa", "on the sofa"), PromptPair("a cat", ""))
BASE: dict[str, Any] = {
    "prompts": PAIRS,
    "concepts": ("cat",),
    "max_train_steps": 4,
    "learning_rate": 1e-2,
    "batch_size": 2,
    "max_denoising_steps": 5,
    "states_per_rollout": 3,
    "anchor_source": "prompts",
    "anchor_prompts": ("a dog", "a tree", "a red car"),
    "anchors_per_step": 2,
    "anchor_weight": 10.0,
    "benign_prompts": ("a dog", "a tree", "a red car", "a house on the beach"),
}


def settings(**changes: Any) -> SPMTrainingConfig:
    return SPMTrainingConfig(**(BASE | changes))


def train(pipe: Any, folder: Path | None = None, callback: Any = None, **changes: Any) -> SPMAdapter:
    return train_spm(pipe, settings(**changes), output_dir=folder, progress=False, callback=callback)


def assert_same_factors(one: SPMAdapter, two: SPMAdapter) -> None:
    assert one.factors.keys() == two.factors.keys()
    for path, factors in one.factors.items():
        assert torch.equal(factors.down, two.factors[path].down) and torch.equal(factors.up, two.factors[path].up), path


def prepared(pipe: Any, strength: float = 0.3, **changes: Any) -> tuple[SPMTraining, SPMTrainingConfig]:
    """A method attached to the pipeline, its `up` factors drawn with this deviation, so that it does something."""
    config = settings(**changes)
    family = family_of(pipe)
    adapter = new_adapter(family, config)
    with torch.no_grad():
        for factors in adapter.factors.values():
            factors.up.normal_(std=strength)
    pipe.unet.requires_grad_(False)
    attachment = attach(pipe.unet, [adapter], trainable=True)
    return SPMTraining(family, attachment, adapter, EncodedText.of(family, config), config), config


def reference_step() -> Any:
    """What benchmarks/bench_spm_training.py compares with; checked here to compute the very same losses."""
    spec = importlib.util.spec_from_file_location("spm_reference_step", ROOT / "benchmarks" / "spm_reference_step.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ----------------------------------------------------------------------------------------------------------- the losses


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
@pytest.mark.parametrize("source", ["random", "prompts"])
def test_official_losses_equal_the_reference_s_forwards(name: str, source: str, request: pytest.FixtureRequest) -> None:
    """Same state, same anchors: losses and gradients of ours and of the reference's wasteful batch agree."""
    method, _ = prepared(
        request.getfixturevalue(name)(),
        batch_size=1,
        anchor_layout="official",
        anchors_per_step=4,
        anchor_source=source,
    )
    generator = torch.Generator().manual_seed(0)
    state = method.draw_state(generator)
    anchors = method.anchors.draw(state.pairs, generator)
    assert anchors.weights.tolist() == [1.0, 1.0, 2.0]
    results = []
    for losses in (method.losses_at, reference_step().ReferenceStep(method).losses_at):
        for parameter in method.parameters().values():
            parameter.grad = None
        values = losses(state, anchors)
        values["loss"].backward()
        results.append((values, [parameter.grad.clone() for parameter in method.parameters().values()]))  # type: ignore[union-attr]
    (ours, our_gradients), (theirs, their_gradients) = results
    for part in ("loss", "erase", "anchor"):
        torch.testing.assert_close(ours[part], theirs[part], rtol=1e-4, atol=1e-6)
    for ours_, theirs_ in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(ours_, theirs_, rtol=1e-3, atol=1e-4)


def test_losses_against_separate_forwards(tiny_sd: Callable[..., Any]) -> None:
    """The batched forwards against one forward a prompt: which text, latents and timestep go together."""
    pairs = (PromptPair("a cat", "a pet", positive="a blue cat", guidance_scale=0.5), PromptPair("a dog", "a house"))
    method, _ = prepared(tiny_sd(), prompts=pairs, concepts=("cat", "dog"))
    family, attachment = method.family, method.attachment
    state = TrainingState(torch.randn(2, 4, 8, 8), torch.tensor([801, 301]), torch.tensor([0, 1]), None)
    anchors = Anchors(family.encode(["a tree", ""]), torch.tensor([1.0, 3.0]), torch.tensor([1, 0]))
    losses = method.losses_at(state, anchors)

    def predict(gate: float, row: int, conditioning: Conditioning) -> Tensor:
        with torch.no_grad(), attachment.force(gate):
            return family.predict(state.latents[row : row + 1], state.timesteps[row : row + 1], conditioning)

    erase = []
    for row, (pair, eta) in enumerate(zip(pairs, (0.5, 1.0), strict=True)):
        neutral = predict(0.0, row, family.encode([pair.neutral]))
        positive = predict(0.0, row, family.encode([pair.positive or pair.target]))
        target = neutral - eta * (positive - neutral)
        erase.append((predict(1.0, row, family.encode([pair.target])) - target).square().mean())
    moved = [
        (predict(1.0, row, anchors.conditioning.rows([i])) - predict(0.0, row, anchors.conditioning.rows([i])))
        .square()
        .mean()
        for i, row in enumerate((1, 0))
    ]
    anchor = (moved[0] + 3 * moved[1]) / 4
    torch.testing.assert_close(losses["erase"], torch.stack(erase).mean(), rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["anchor"], anchor, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(losses["loss"], losses["erase"] + 10 * losses["anchor"], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_gradients_reach_every_factor(name: str, request: pytest.FixtureRequest) -> None:
    method, _ = prepared(request.getfixturevalue(name)())
    method.losses(torch.Generator().manual_seed(0))["loss"].backward()
    still = [
        key for key, parameter in method.parameters().items() if parameter.grad is None or not parameter.grad.any()
    ]
    assert still == [] and len(method.parameters()) == 2 * len(method.adapter.factors)
    assert all(parameter.grad is None for parameter in method.family.denoiser.parameters())


def test_gradient_checkpointing_gives_the_same_gradients(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    method, _ = prepared(pipe)
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            pipe.unet.enable_gradient_checkpointing()
        method.load_state_dict({})
        method.losses(torch.Generator().manual_seed(0))["loss"].backward()
        gradients.append([parameter.grad for parameter in method.parameters().values()])
        for parameter in method.parameters().values():
            parameter.grad = None
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("gate_negative", [True, False])
def test_rollouts_gate_the_negative_rows_as_asked(tiny_sd: Callable[..., Any], gate_negative: bool) -> None:
    method, _ = prepared(tiny_sd(), rollout_gate_negative=gate_negative, states_per_rollout=1)
    seen: list[list[float]] = []
    method.family.denoiser.register_forward_hook(
        lambda *_: seen.append(method.attachment.last.gates[:, 0].tolist())  # type: ignore[union-attr]
    )
    method.draw_state(torch.Generator().manual_seed(0))
    rows = len(seen[0]) // 2
    assert seen[0] == [float(gate_negative)] * rows + [1.0] * rows


def test_rollouts_through_merged_weights_are_those_through_the_factors(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    method, _ = prepared(pipe, batch_size=3, states_per_rollout=1)
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    merged = method.draw_state(torch.Generator().manual_seed(0))
    with method.attachment.force(1.0):
        plain = method.states.draw(torch.Generator().manual_seed(0))
    with method.attachment.force(0.0):
        base = method.states.draw(torch.Generator().manual_seed(0))
    torch.testing.assert_close(merged.latents, plain.latents, rtol=1e-4, atol=1e-4)
    assert float((plain.latents - base.latents).abs().max()) > 0.01
    assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())
    with torch.no_grad():  # the next block sees what training has changed
        for factors in method.adapter.factors.values():
            factors.up.zero_()
    torch.testing.assert_close(method.draw_state(torch.Generator().manual_seed(0)).latents, base.latents)


def test_pairs_without_anchoring_compute_no_anchors(tiny_sd: Callable[..., Any]) -> None:
    method, _ = prepared(tiny_sd(), anchor_weight=0.0, rollout_guidance_scale=1.0, states_per_rollout=1)
    rows: list[int] = []
    method.family.denoiser.register_forward_hook(lambda module, args, output: rows.append(len(args[0])))
    losses = method.losses(torch.Generator().manual_seed(0))
    assert rows[-2:] == [4, 2] and float(losses["anchor"]) == 0.0  # neutral and positive; target
    assert torch.equal(losses["loss"], losses["erase"])


# -------------------------------------------------------------------------------------------------------- the training


def test_training_lowers_the_loss(tiny_sd: Callable[..., Any]) -> None:
    """On states and anchors that are held fixed, and drawn with another seed than the training's."""
    changes = {"guidance_scale": 10.0, "anchor_weight": 1.0, "rollout_guidance_scale": 1.0}
    trained = train(tiny_sd(), max_train_steps=40, **changes)
    method, _ = prepared(tiny_sd(), strength=0.0, **changes)
    generator = torch.Generator().manual_seed(7)
    fixed = [(state := method.draw_state(generator), method.anchors.draw(state.pairs, generator)) for _ in range(9)]

    def loss() -> float:
        with torch.no_grad():
            return sum(method.losses_at(state, anchors)["loss"].item() for state, anchors in fixed)

    before = loss()
    with torch.no_grad():
        for path, factors in method.adapter.factors.items():
            factors.down.copy_(trained.factors[path].down)
            factors.up.copy_(trained.factors[path].up)
    assert loss() < 0.7 * before


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_what_an_adapter_holds(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pipe = request.getfixturevalue(name)()
    adapter = train(pipe, tmp_path / "cat", max_train_steps=2)
    assert adapter.family == ("sd" if name == "tiny_sd" else "sdxl") and adapter.concepts == ["cat"]
    assert all(factors.down.dtype == factors.up.dtype == torch.float32 for factors in adapter.factors.values())
    assert not any(factors.down.requires_grad or factors.up.requires_grad for factors in adapter.factors.values())
    assert all(bool(factors.up.any()) for factors in adapter.factors.values())
    assert adapter.threshold is not None and adapter.calibration is not None
    assert adapter.calibration["n_benign"] == 4 and adapter.base_fingerprint and adapter.text_encoder_fingerprint
    assert adapter.settings["learning_rate"] == 1e-2 and adapter.settings["final_losses"]["step"] == 2
    assert str(tmp_path) not in json.dumps(adapter.settings)
    again = SPMAdapter.from_pretrained(tmp_path / "cat")
    assert_same_factors(adapter, again)
    assert (again.threshold, again.concepts, again.settings) == (adapter.threshold, ["cat"], adapter.settings)


def test_several_concepts_and_targets_in_one_adapter(tiny_sd: Callable[..., Any]) -> None:
    pairs = (PromptPair("van gogh", "painting"), PromptPair("picasso", "painting", anchor_weight=0.0))
    adapter = train(tiny_sd(), prompts=pairs, concepts=(), phrasings=("{}", "a painting by {}"))
    assert adapter.concepts == ["van gogh", "picasso"] and adapter.neutral == "painting"
    states = adapter.concept_list[0].states
    assert states is not None and states.shape == (2, 16, 32)
    assert adapter.name == "van-gogh-picasso"


def test_the_pipeline_is_given_back_as_it_was(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    next(pipe.unet.parameters()).requires_grad_(False)
    pipe.unet.train()
    weights = {name: tensor.clone() for name, tensor in pipe.unet.state_dict().items()}
    flags = [parameter.requires_grad for parameter in pipe.unet.parameters()]
    modules = [id(module) for module in pipe.unet.modules()]
    for fail in (False, True):

        def callback(step: int, metrics: dict[str, float], fail: bool = fail) -> None:
            if fail:
                raise KeyboardInterrupt

        if fail:
            with pytest.raises(KeyboardInterrupt):
                train(pipe, callback=callback, gradient_checkpointing=True)
        else:
            train(pipe, callback=callback, gradient_checkpointing=True, max_train_steps=1)
        assert attachment_of(pipe.unet) is None and [id(module) for module in pipe.unet.modules()] == modules
        assert [parameter.requires_grad for parameter in pipe.unet.parameters()] == flags and pipe.unet.training
        assert not pipe.unet.is_gradient_checkpointing
        assert all(torch.equal(tensor, weights[name]) for name, tensor in pipe.unet.state_dict().items())


def test_a_seed_gives_the_same_adapter(tiny_sd: Callable[..., Any]) -> None:
    one, two, other = train(tiny_sd()), train(tiny_sd()), train(tiny_sd(), seed=1)
    assert_same_factors(one, two)
    with pytest.raises(AssertionError):
        assert_same_factors(one, other)


def test_outer_random_numbers_do_not_matter_and_are_left_alone(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    one = train(pipe)
    torch.manual_seed(99)
    before = torch.get_rng_state()
    assert_same_factors(one, train(pipe))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_resuming_anywhere_is_exact(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """Checkpoints lie inside and between rollouts of three states, and pass through one with dynamic crops."""
    pipe = request.getfixturevalue(name)()
    changes = {"max_train_steps": 5, "dynamic_crops": True, "lr_scheduler": "cosine", "anchor_source": "random"}
    whole = train(pipe, tmp_path, checkpointing_steps=1, **changes)
    for step in range(1, 6):
        resumed = train(
            pipe, tmp_path / f"again-{step}", resume_from_checkpoint=f"{tmp_path}/checkpoint-{step:06d}", **changes
        )
        assert_same_factors(whole, resumed)
        assert resumed.settings["final_losses"] == whole.settings["final_losses"]


def test_a_killed_run_resumes(tiny_sd: Callable[..., Any], tmp_path: Path) -> None:
    def kill(step: int, metrics: dict[str, float]) -> None:
        if step == 3:
            raise KeyboardInterrupt

    pipe = tiny_sd()
    with pytest.raises(KeyboardInterrupt):
        train(pipe, tmp_path, kill, checkpointing_steps=2)
    assert not (tmp_path / "erasure.json").exists()
    resumed = train(pipe, tmp_path, checkpointing_steps=2, resume_from_checkpoint="latest")
    assert_same_factors(train(pipe), resumed)
    assert_same_factors(SPMAdapter.from_pretrained(tmp_path), resumed)
    with pytest.raises(AdapterMismatchError, match="anchor_weight"):
        train(pipe, tmp_path, resume_from_checkpoint="latest", anchor_weight=1.0)


@pytest.mark.parametrize("name", ["tiny_sd", "tiny_sdxl"])
def test_validation_grid(name: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    pipe = request.getfixturevalue(name)()
    changes = {"validation_steps": 2, "validation_prompts": ("a cat", "a dog", ""), "validation_inference_steps": 2}
    drawn = train(pipe, tmp_path, **changes, num_validation_images=2, offload_text_encoders=True)
    assert_same_factors(drawn, train(pipe))  # drawing pictures does not touch the training
    grids = sorted((tmp_path / "validation").iterdir())
    assert [path.name for path in grids] == ["step-000002.png", "step-000004.png"]
    first, last = (Image.open(path).convert("RGB") for path in grids)
    assert first.size == last.size == (2 * 128, 6 * (128 + 16))  # 3 prompts, before and after; 16 px enlarged to 128
    row = 128 + 16
    before, after = (0, 16, 256, row), (0, row + 16, 256, 2 * row)
    assert first.crop(before).tobytes() == last.crop(before).tobytes()  # the untouched model, drawn once
    assert last.crop(after).tobytes() not in (last.crop(before).tobytes(), first.crop(after).tobytes())


def test_rank_alpha_and_coverage(tiny_sd: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    adapter = train(tiny_sd(), rank=8, alpha=1.0, coverage="cross_attention_kv", max_train_steps=1)
    assert all(".attn2.to_" in path for path in adapter.factors)
    assert {factors.rank for factors in adapter.factors.values()} == {8}
    assert "learns slowly" in caplog.text


def test_no_benign_prompts_no_threshold(tiny_sd: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    assert train(tiny_sd(), benign_prompts=(), max_train_steps=1).threshold is None
    assert "no calibrated threshold" in caplog.text


def test_what_cannot_be_trained_is_named(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    for changes, error in (
        ({"checkpointing_steps": 1}, InvalidInputError),  # without a folder
        ({"coverage": "everything"}, InvalidInputError),
        ({"resolution": 20}, UnsupportedOperationError),
        ({"dynamic_resolution": True}, InvalidInputError),  # of a 16 pixel model
        ({"concepts": ("pet",), "neutral": "a pet"}, InvalidInputError),  # no token of its own
    ):
        with pytest.raises(error):
            train(pipe, **changes)
        assert attachment_of(pipe.unet) is None
    attach(pipe.unet, [train(pipe, max_train_steps=1)], gate=1.0)
    with pytest.raises(UnsupportedOperationError, match="restore"):
        train(pipe)
    detach(pipe.unet)


def test_a_diverging_run_is_named(tiny_sd: Callable[..., Any]) -> None:
    pipe = tiny_sd()
    with torch.no_grad():
        pipe.unet.conv_out.bias.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="at step 1"):
        train(pipe)
    assert attachment_of(pipe.unet) is None
