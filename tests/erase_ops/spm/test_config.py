"""SPM settings: ranges, coercion, presets, our YAML files and the reference's."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from expunge.erase_ops.spm.config import SPMTrainingConfig
from expunge.erase_ops.spm.presets import PRESETS
from expunge.erase_ops.training.config import help_for
from expunge.erase_ops.training.prompts import PromptPair, fill, prompt_pairs
from expunge.errors import InvalidInputError

CAT = (PromptPair("a cat", "a pet"),)

# The two files of the reference implementation's "snoopy" demo, in its own format.
REFERENCE_CONFIG = """
prompts_file: "configs/snoopy/prompt.yaml"
pretrained_model: {name_or_path: "CompVis/stable-diffusion-v1-4", v2: false, v_pred: false, clip_skip: 1}
network: {rank: 1, alpha: 1.0}
train:
  precision: float32
  noise_scheduler: "ddim"
  iterations: 3000
  batch_size: 1
  lr: 0.0001
  unet_lr: 0.0001
  text_encoder_lr: 5e-05
  optimizer_type: "AdamW8bit"
  lr_scheduler: "cosine_with_restarts"
  lr_warmup_steps: 500
  lr_scheduler_num_cycles: 3
  max_denoising_steps: 30
save: {name: "snoopy", path: "output/snoopy", per_steps: 500, precision: float32}
logging:
  use_wandb: true
  interval: 500
  seed: 7
  generate_num: 2
  run_name: "snoopy"
  verbose: false
  prompts: ['snoopy', '', 'dog']
other: {use_xformers: true}
"""
REFERENCE_PROMPTS = """
- target: "snoopy"
  positive: "snoopy"
  unconditional: ""
  neutral: ""
  action: "erase_with_la"
  guidance_scale: "1.0"
  resolution: 512
  batch_size: 1
  dynamic_resolution: true
  la_strength: 1000
  sampling_batch_size: 4
- target: "wonder woman"
  neutral: "gal gadot"
  action: "erase"
  guidance_scale: 2
  dynamic_resolution: true
"""


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("max_train_steps", 0),
        ("learning_rate", 0.0),
        ("learning_rate", float("nan")),
        ("adam_beta1", 1.0),
        ("rank", 0),
        ("rank", 1.5),
        ("alpha", -1.0),
        ("optimizer", "lion"),
        ("lr_scheduler", "step"),
        ("mixed_precision", "fp8"),
        ("anchor_layout", "half"),
        ("rollout_guidance_scale", 0.5),
        ("false_positive_rate", 1.0),
        ("states_per_rollout", 30),
        ("min_denoising_steps", 30),
        ("lr_warmup_steps", 3000),
        ("phrasings", ("a photo",)),
        ("concepts", ("cat", " ")),
        ("anchor_source", "prompts"),
        ("validation_steps", 10),
        ("gradient_checkpointing", 1),
        ("prompts", ()),
        ("prompts", "cat"),
    ],
)
def test_a_value_out_of_range_is_named(field: str, value: Any) -> None:
    with pytest.raises(InvalidInputError) as caught:
        SPMTrainingConfig(**({"prompts": CAT} | {field: value}))
    named = "states_per_rollout" if field == "min_denoising_steps" else field  # what no longer fits
    named = {"anchor_source": "anchor_prompts", "validation_steps": "validation_prompts"}.get(named, named)
    assert named in caught.value.subject


def test_every_field_is_documented_and_survives_json() -> None:
    names = [item.name for item in dataclasses.fields(SPMTrainingConfig)]
    assert [name for name in names if not help_for(SPMTrainingConfig, name).endswith((".", ".)"))] == []
    config = SPMTrainingConfig.preset("demo", prompts=CAT, anchor_prompts=["a dog"], concepts=["cat"], seed=3)
    assert SPMTrainingConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config


def test_fields_are_brought_to_their_types() -> None:
    config = SPMTrainingConfig(
        prompts=[{"target": "cat", "guidance_scale": "1.5"}],  # type: ignore[arg-type]
        learning_rate="1e-4",  # type: ignore[arg-type]
        max_train_steps=20.0,  # type: ignore[arg-type]
        anchor_weight=3,
    )
    assert config.prompts == (PromptPair("cat", guidance_scale=1.5),)
    assert (config.learning_rate, config.max_train_steps, config.anchor_weight) == (1e-4, 20, 3.0)
    assert isinstance(config.max_train_steps, int)


def test_pairs_fall_back_on_the_config() -> None:
    plain, own = PromptPair("a cat", "a pet"), PromptPair("a dog", "a pet", guidance_scale=0.0, anchor_weight=5.0)
    config = SPMTrainingConfig(prompts=(plain, own), guidance_scale=2.0, anchor_weight=7.0)
    assert [config.guidance_scale_of(pair) for pair in config.prompts] == [2.0, 0.0]
    assert [config.anchor_weight_of(pair) for pair in config.prompts] == [7.0, 5.0]
    assert config.concept_texts == ("a cat", "a dog")
    assert config.neutral_text == "a pet"
    assert SPMTrainingConfig(prompts=(plain, PromptPair("a dog"))).neutral_text == ""
    assert not SPMTrainingConfig(prompts=(PromptPair("a cat", anchor_weight=0.0),)).needs_anchors


def test_unknown_fields_are_refused() -> None:
    for make in (
        lambda: SPMTrainingConfig.from_dict({"prompts": CAT, "learning_rat": 1}),
        lambda: SPMTrainingConfig.preset("demo", prompts=CAT, anchor_prompts=["a dog"], learning_rat=1),
        lambda: SPMTrainingConfig(prompts=CAT).replace(learning_rat=1),
        lambda: SPMTrainingConfig.from_dict({"prompts": [{"targt": "cat"}]}),
        lambda: SPMTrainingConfig.from_dict({"prompts": [{"neutral": "cat"}]}),
        lambda: SPMTrainingConfig.preset("sd99", prompts=CAT),
    ):
        with pytest.raises(InvalidInputError):
            make()


def test_presets_are_valid_and_keep_the_reference_values() -> None:
    for name in PRESETS:
        assert SPMTrainingConfig.preset(name, prompts=CAT, anchor_prompts=["a dog"]).prompts == CAT
    reference = SPMTrainingConfig.preset("sd15", prompts=CAT)
    assert (reference.max_train_steps, reference.learning_rate, reference.lr_warmup_steps) == (3000, 1e-4, 500)
    assert (reference.anchor_weight, reference.anchors_per_step, reference.max_denoising_steps) == (1000.0, 4, 30)
    demo = SPMTrainingConfig.preset("demo", prompts=CAT, anchor_prompts=["a dog"])
    assert (demo.max_train_steps, demo.batch_size, demo.states_per_rollout) == (250, 8, 4)


def test_prompt_pairs_from_templates() -> None:
    pairs = prompt_pairs("cat", [("a {} in noto style", "noto style"), ("{}", "")], guidance_scale=0.5)
    assert pairs == (
        PromptPair("a cat in noto style", "noto style", guidance_scale=0.5),
        PromptPair("cat", "", guidance_scale=0.5),
    )
    assert prompt_pairs("neon", ["a dog in {} style"], neutral="noto") == (
        PromptPair("a dog in neon style", "a dog in noto style"),
    )
    assert prompt_pairs("cat", ["a {}"]) == (PromptPair("a cat", ""),)
    assert prompt_pairs("cat", [("{a {}}", "{}")], neutral="dog") == (PromptPair("{a cat}", "dog"),)
    with pytest.raises(InvalidInputError):
        fill("a photo", "cat")


def test_own_yaml(tmp_path: Path) -> None:
    path = tmp_path / "cat.yaml"
    path.write_text("preset: demo\nprompts: [{target: a cat, neutral: a pet}]\nanchor_prompts: [a dog]\nseed: 4\n")
    config = SPMTrainingConfig.from_yaml(path, learning_rate=0.5)
    assert (config.prompts, config.seed, config.learning_rate, config.max_train_steps) == (CAT, 4, 0.5, 250)


@pytest.mark.parametrize("text", ["[1, 2", "just text", "- 3\n", "[]\n", "prompts: [{target: cat}]\nsed: 1\n"])
def test_bad_yaml_is_named(tmp_path: Path, text: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(InvalidInputError) as caught:
        SPMTrainingConfig.from_yaml(path)
    assert str(path) in caught.value.subject or "sed" in caught.value.found


def test_missing_yaml_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=r"none\.yaml"):
        SPMTrainingConfig.from_yaml(tmp_path / "none.yaml")


def write_reference(folder: Path, config: str = REFERENCE_CONFIG, prompts: str = REFERENCE_PROMPTS) -> Path:
    (folder / "prompt.yaml").write_text(prompts)
    (folder / "config.yaml").write_text(config)
    return folder / "config.yaml"


def test_reference_config_file(tmp_path: Path) -> None:
    config = SPMTrainingConfig.from_yaml(write_reference(tmp_path), optimizer="adamw")
    assert config.prompts == (
        PromptPair("snoopy", "", "snoopy", "", guidance_scale=1.0, anchor_weight=1000.0),
        PromptPair("wonder woman", "gal gadot", None, "", guidance_scale=2.0, anchor_weight=0.0),
    )
    assert config.concept_texts == ("snoopy", "wonder woman")
    assert config.pretrained_model_name_or_path == "CompVis/stable-diffusion-v1-4"
    assert (config.max_train_steps, config.learning_rate, config.lr_scheduler) == (3000, 1e-4, "cosine_with_restarts")
    assert (config.lr_warmup_steps, config.lr_num_cycles, config.max_grad_norm) == (500, 3, 0.0)
    assert (config.resolution, config.dynamic_resolution, config.anchors_per_step) == (512, True, 4)
    assert (config.anchor_layout, config.anchor_source, config.mixed_precision) == ("official", "random", "no")
    assert (config.name, config.output_dir, config.checkpointing_steps) == ("snoopy", "output/snoopy", 500)
    assert (config.validation_steps, config.validation_prompts) == (500, ("snoopy", "", "dog"))
    assert (config.validation_seed, config.num_validation_images, config.seed) == (7, 2, 0)
    assert (config.optimizer, config.clip_skip) == ("adamw", None)
    assert SPMTrainingConfig.from_yaml(tmp_path / "config.yaml").optimizer == "adamw8bit"


def test_reference_prompt_file_alone(tmp_path: Path) -> None:
    write_reference(tmp_path)
    config = SPMTrainingConfig.from_yaml(tmp_path / "prompt.yaml")
    assert [pair.target for pair in config.prompts] == ["snoopy", "wonder woman"]
    assert (config.max_train_steps, config.optimizer) == (3000, "adamw")


def test_reference_defaults_of_a_prompt(tmp_path: Path) -> None:
    path = tmp_path / "prompts.yaml"
    path.write_text("- {target: van gogh, unconditional: bad}\n")
    config = SPMTrainingConfig.from_yaml(path)
    # neutral falls back on unconditional, the action on plain erasing
    assert config.prompts == (PromptPair("van gogh", "bad", None, "bad", guidance_scale=1.0, anchor_weight=0.0),)
    assert (config.resolution, config.dynamic_resolution) == (512, False)


@pytest.mark.parametrize(
    ("old", "new", "subject"),
    [
        ("iterations: 3000", "iteration: 3000", "train"),
        ("network:", "net:", "config.yaml"),
        ("AdamW8bit", "Lion", "optimizer_type"),
        ('noise_scheduler: "ddim"', 'noise_scheduler: "lms"', "noise_scheduler"),
        ("precision: float32\n  noise", "precision: float8\n  noise", "precision"),
        ("  unet_lr: 0.0001", "  optimizer_args: [a=1]", "optimizer_args"),
        ("snoopy/prompt.yaml", "snoopy/prompts.yaml", "prompts_file"),
    ],
)
def test_what_the_reference_config_may_not_say(tmp_path: Path, old: str, new: str, subject: str) -> None:
    assert old in REFERENCE_CONFIG
    with pytest.raises(InvalidInputError) as caught:
        SPMTrainingConfig.from_yaml(write_reference(tmp_path, REFERENCE_CONFIG.replace(old, new, 1)))
    assert subject in caught.value.subject


@pytest.mark.parametrize(
    ("old", "new", "subject"),
    [
        ('- target: "snoopy"', '- targets: "snoopy"', "entry 1"),
        ('action: "erase"\n', 'action: "keep"\n', "entry 2: action"),
        ("  resolution: 512", "  resolution: 768", "resolution"),
        ('  neutral: "gal gadot"', "  neutrals: 1", "entry 2"),
        ('guidance_scale: "1.0"', "guidance_scale: much", "guidance_scale"),
    ],
)
def test_what_the_reference_prompt_file_may_not_say(tmp_path: Path, old: str, new: str, subject: str) -> None:
    assert old in REFERENCE_PROMPTS
    with pytest.raises(InvalidInputError) as caught:
        SPMTrainingConfig.from_yaml(write_reference(tmp_path, prompts=REFERENCE_PROMPTS.replace(old, new, 1)))
    assert subject in caught.value.subject


def test_which_differences_matter_on_resuming() -> None:
    config = SPMTrainingConfig(prompts=CAT, max_train_steps=10)
    saved = config.to_dict()
    assert config.replace(checkpointing_steps=3, output_dir="x", validation_seed=9).resume_differences(saved) == []
    assert config.replace(seed=1, prompts=[PromptPair("dog")]).resume_differences(saved) == ["seed", "prompts"]
    assert config.replace(max_train_steps=20).resume_differences(saved) == []  # a constant rate knows no end
    cosine = config.replace(lr_scheduler="cosine")
    assert cosine.replace(max_train_steps=20).resume_differences(cosine.to_dict()) == ["max_train_steps"]
