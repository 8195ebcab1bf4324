"""`expunge train`: options out of the config, and training on the tiny pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge import SPMAdapter, SPMTrainingConfig
from expunge.cli.methods import METHODS
from expunge.cli.train import build_config, config_options
from expunge.erase_ops.delta.adapter import DeltaAdapter
from expunge.erase_ops.methods import METHODS as ERASERS
from expunge.erase_ops.sae.files import load_sae
from expunge.errors import InvalidInputError

QUICK = (
    "--max_train_steps", 2, "--max_denoising_steps", 2, "--resolution", 16, "--anchors_per_step", 1, "--seed", 3
)  # fmt: skip


class TestOptions:
    def test_every_scalar_field_is_an_option_with_its_help(self, cli: Callable[..., Any]) -> None:
        text = cli("train", "spm", "--help").output
        options = config_options(SPMTrainingConfig)
        assert {"learning_rate", "rank", "anchor_layout", "validation_prompts", "gradient_checkpointing"} <= set(
            options
        )
        assert "prompts" not in options  # nested: spelled by --erase or a file
        for name in ("--learning_rate", "--anchor_layout", "--erase", "--preset", "--config"):
            assert name in text

    def test_what_is_not_said_is_left_to_the_preset(self) -> None:
        asked = {"prompts": [{"target": "cat"}], "rank": 4}
        config = build_config(SPMTrainingConfig, "sd15", None, asked)
        assert config == SPMTrainingConfig.preset("sd15", **asked)

    def test_a_file_gives_way_to_the_command_line(self, tmp_path: Path) -> None:
        file = tmp_path / "cat.yaml"
        file.write_text("prompts: [{target: cat}]\nrank: 2\nlearning_rate: 1e-3\n", encoding="utf-8")
        config = build_config(SPMTrainingConfig, None, file, {"rank": 8})
        assert (config.rank, config.learning_rate) == (8, 1e-3)

    def test_a_preset_and_a_file_are_one_too_many(self, tmp_path: Path) -> None:
        with pytest.raises(InvalidInputError, match="one of the two"):
            build_config(SPMTrainingConfig, "sd15", tmp_path / "cat.yaml", {})

    def test_wrong_values_are_named(self, cli: Callable[..., Any]) -> None:
        result = cli("train", "spm", "--erase", "cat", "--rank", 0, code=1)
        assert "SPMTrainingConfig.rank" in result.stderr

    @pytest.mark.parametrize("option", ["pretrained_model_name_or_path", "output_dir"])
    def test_base_and_folder_are_needed(self, cli: Callable[..., Any], tmp_path: Path, option: str) -> None:
        other = {"pretrained_model_name_or_path": "output_dir", "output_dir": "pretrained_model_name_or_path"}[option]
        result = cli("train", "spm", "--erase", "cat", f"--{other}", tmp_path / "x", code=1)
        assert f"--{option}" in result.stderr

    def test_methods_are_listed(self, cli: Callable[..., Any]) -> None:
        assert set(METHODS) == {*ERASERS, "sae"}
        listed = cli("train", "--help").output
        assert all(name in listed for name in METHODS)


class TestTraining:
    def test_writes_an_adapter_that_says_how_it_was_made(
        self, cli: Callable[..., Any], base: Path, tmp_path: Path
    ) -> None:
        result = cli(
            "train", "spm", "--pretrained_model_name_or_path", base, "--erase", "cat", "--neutral", "dog",
            "--output_dir", tmp_path / "cat", "--json", *QUICK,
        )  # fmt: skip
        adapter = SPMAdapter.from_pretrained(tmp_path / "cat")
        assert adapter.concepts == ["cat"]
        assert adapter.neutral == "dog"
        assert json.loads(result.stdout)["concepts"] == ["cat"]
        assert adapter.settings["max_train_steps"] == 2

    def test_a_seed_gives_the_same_file(self, cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
        for name in ("one", "two"):
            cli(
                "train", "spm", "--pretrained_model_name_or_path", base, "--erase", "cat",
                "--output_dir", tmp_path / name, *QUICK,
            )  # fmt: skip
        one, two = (tmp_path / name / "erasure.safetensors" for name in ("one", "two"))
        assert one.read_bytes() == two.read_bytes()

    def test_the_preset_demo_knows_the_bundled_models_prompts(
        self, cli: Callable[..., Any], base: Path, tmp_path: Path
    ) -> None:
        cli(
            "train", "spm", "--pretrained_model_name_or_path", base, "--erase", "owl", "--preset", "demo",
            "--output_dir", tmp_path / "owl", "--max_train_steps", 1, "--resolution", 16, "--max_denoising_steps", 5,
        )  # fmt: skip
        adapter = SPMAdapter.from_pretrained(tmp_path / "owl")
        assert adapter.concepts == ["owl"]
        assert adapter.threshold is not None
        assert adapter.calibration is not None
        assert adapter.calibration["n_benign"] == 1000
        assert {"target": "an owl in neon style", "neutral": "neon style"}.items() <= next(
            pair for pair in adapter.settings["prompts"] if pair["target"] == "an owl in neon style"
        ).items()

    @pytest.mark.parametrize("erase", [("unicorn",), ("owl", "cat")])
    def test_the_preset_demo_refuses_what_it_does_not_know(
        self, cli: Callable[..., Any], tmp_path: Path, erase: tuple[str, ...]
    ) -> None:
        words = [part for word in erase for part in ("--erase", word)]
        result = cli("train", "spm", *words, "--preset", "demo", "--output_dir", tmp_path, code=1)
        assert "--erase" in result.stderr

    def test_a_base_that_is_not_there(self, cli: Callable[..., Any], tmp_path: Path) -> None:
        result = cli(
            "train", "spm", "--pretrained_model_name_or_path", tmp_path / "absent", "--erase", "cat",
            "--output_dir", tmp_path / "out", code=1,
        )  # fmt: skip
        assert "absent" in result.stderr
        assert len(result.stderr.strip().splitlines()[-1]) > 20

    @pytest.mark.parametrize("method", ["esd", "concept_ablation", "all_but_one", "few_shot"])
    def test_every_trained_method_takes_the_same_names(
        self, cli: Callable[..., Any], base: Path, tmp_path: Path, method: str
    ) -> None:
        own = ("--state_source", "drawn", "--drawn_images", 2) if method == "few_shot" else ("--preserve", "a car")
        cli(
            "train", method, "--pretrained_model_name_or_path", base, "--erase", "cat", "--alternative", "dog",
            "--output_dir", tmp_path / "cat", "--max_train_steps", 1, "--max_denoising_steps", 2, "--resolution", 16,
            *own,
        )  # fmt: skip
        delta = DeltaAdapter.from_pretrained(tmp_path / "cat")
        assert (delta.method, delta.concepts, delta.alternatives) == (method, ["cat"], ["dog"])

    @pytest.mark.parametrize("method", ["uce", "speed"])
    def test_the_closed_forms_take_several_concepts(
        self, cli: Callable[..., Any], base: Path, tmp_path: Path, method: str
    ) -> None:
        config = tmp_path / "config.yaml"
        config.write_text("templates: ['a {}', 'the {}']\npreserve: [a house]\nridge: 0.25\n", encoding="utf-8")
        cli(
            "train", method, "--pretrained_model_name_or_path", base, "--erase", "cat", "--erase", "car",
            "--alternative", "tree", "--config", config, "--output_dir", tmp_path / "out",
        )  # fmt: skip
        delta = DeltaAdapter.from_pretrained(tmp_path / "out")
        assert delta.alternatives == ["tree", "tree"] and delta.settings["ridge"] == 0.25
        assert [pair["target"] for pair in delta.settings["prompts"]] == ["a cat", "the cat", "a car", "the car"]
        assert "['cat', 'car']" in cli("info", tmp_path / "out").output

    def test_alternatives_are_one_or_one_for_each(self, cli: Callable[..., Any], tmp_path: Path) -> None:
        three = [word for concept in "abc" for word in ("--erase", concept)]
        result = cli("train", "esd", *three, "--alternative", "d", "--alternative", "e", code=1)
        assert "--alternative" in result.stderr


def test_methods_are_told(cli: Callable[..., Any]) -> None:
    rows = json.loads(cli("methods", "--json").stdout)
    assert set(rows) == set(ERASERS)
    assert all(set(row) == {"title", "trains", "needs", "costs", "writes"} for row in rows.values())
    shown = cli("methods").output
    assert all(name in shown for name in rows) and "…" not in shown  # 80 columns are enough


class TestAutoencoder:
    def test_writes_an_autoencoder_of_the_pipelines_text_encoder(
        self, cli: Callable[..., Any], base: Path, tmp_path: Path
    ) -> None:
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("\n".join(f"a {word} on a {thing}" for word in "cdo" for thing in "mtx"), encoding="utf-8")
        result = cli(
            "train", "sae", "--pretrained_model_name_or_path", base, "--prompts_file", prompts, "--layer", 0,
            "--width", 32, "--k", 4, "--max_train_steps", 3, "--token_batch_size", 16, "--buffer_tokens", 32,
            "--bias_tokens", 16, "--auxk", 8, "--output_dir", tmp_path / "sae", "--json",
        )  # fmt: skip
        told = json.loads(result.stdout)
        sae = load_sae(tmp_path / "sae")
        assert (
            (sae.config.width, sae.config.k, sae.config.layer)
            == (told["width"], told["k"], told["layer"])
            == (32, 4, 0)
        )
        assert sae.config.fingerprint is not None

    def test_it_has_no_concept_to_erase(self, cli: Callable[..., Any]) -> None:
        assert "--erase" not in cli("train", "sae", "--help").output

    def test_needs_prompts(self, cli: Callable[..., Any], base: Path, tmp_path: Path) -> None:
        common = ("train", "sae", "--pretrained_model_name_or_path", base, "--output_dir", tmp_path / "sae")
        assert "--prompts_file" in cli(*common, code=1).stderr
        assert "--prompts_file" in cli(*common, "--prompts_file", tmp_path / "absent.txt", code=1).stderr

    def test_needs_a_text_encoder_that_the_pipeline_has(
        self, cli: Callable[..., Any], base: Path, tmp_path: Path
    ) -> None:
        (tmp_path / "prompts.txt").write_text("a cat\n", encoding="utf-8")
        result = cli(
            "train", "sae", "--pretrained_model_name_or_path", base, "--prompts_file", tmp_path / "prompts.txt",
            "--component", "text_encoder_2", "--output_dir", tmp_path / "sae", code=1,
        )  # fmt: skip
        assert "text_encoder_2" in result.stderr
