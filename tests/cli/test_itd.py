"""`expunge itd`: finding, calibrating and inspecting on a tiny pipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge import ItDAdapter
from expunge.cli.itd import concept_prompts
from expunge.erase_ops.sae.files import save_sae
from expunge.errors import InvalidInputError

TEMPLATES = ("a photo of a {}", "the {} sleeps")
OTHERS = ("a house", "one tree in the rain", "blue water", "my old car")


@pytest.fixture
def sae_folder(tiny_sd: Callable[..., Any], sae_for: Callable[..., Any], tmp_path: Path) -> Path:
    """An autoencoder of the tiny pipeline's text encoder, on disk."""
    save_sae(sae_for(tiny_sd().text_encoder), tmp_path / "sae")
    return tmp_path / "sae"


@pytest.fixture
def found(cli: Callable[..., Any], base: Path, sae_folder: Path, tmp_path: Path) -> Path:
    """An artefact that `expunge itd find` wrote."""
    targets = [part for template in TEMPLATES for part in ("--target", template)]
    benign = [part for prompt in OTHERS[:2] for part in ("--benign", prompt)]
    cli(
        "itd", "find", "--pretrained_model_name_or_path", base, "--sae", sae_folder, "--erase", "cat", "--erase", "dog",
        *targets, *benign, "--output_dir", tmp_path / "pets",
    )  # fmt: skip
    return tmp_path / "pets"


class TestPrompts:
    def test_templates_are_filled_with_each_concept(self) -> None:
        assert concept_prompts(["cat", "dog"], ["a {}", "{}, {}"]) == {
            "cat": ["a cat", "cat, cat"],
            "dog": ["a dog", "dog, dog"],
        }

    def test_a_concept_alone_is_its_own_prompt(self) -> None:
        assert concept_prompts(["nudity"], []) == {"nudity": ["nudity"]}

    def test_several_concepts_cannot_share_a_prompt(self) -> None:
        assert concept_prompts(["cat"], ["a kitten"]) == {"cat": ["a kitten"]}
        with pytest.raises(InvalidInputError, match="--target"):
            concept_prompts(["cat", "dog"], ["a {}", "a kitten"])


class TestFind:
    def test_writes_an_artefact_of_its_concepts(self, found: Path) -> None:
        adapter = ItDAdapter.from_pretrained(found)
        assert adapter.concepts == ["cat", "dog"]
        assert adapter.threshold is None
        assert adapter.settings["prompts"] == {"cat": 2, "dog": 2} and adapter.settings["n_benign"] == 2

    def test_says_when_nothing_tells_the_concept(
        self, cli: Callable[..., Any], base: Path, sae_folder: Path, tmp_path: Path
    ) -> None:
        result = cli(
            "itd", "find", "--pretrained_model_name_or_path", base, "--sae", sae_folder.parent, "--sae_subfolder",
            sae_folder.name, "--erase", "cat", "--benign", "cat", "--output_dir", tmp_path / "none", code=1,
        )  # fmt: skip
        assert "'cat'" in result.stderr
        assert not (tmp_path / "none" / "erasure.json").exists()


class TestCalibrate:
    def test_writes_the_threshold_and_how_it_was_set(
        self, cli: Callable[..., Any], base: Path, found: Path, tmp_path: Path
    ) -> None:
        benign = tmp_path / "benign.txt"
        benign.write_text("\n".join(OTHERS), encoding="utf-8")
        result = cli(
            "itd", "calibrate", found, "--pretrained_model_name_or_path", base, "--benign_file", benign,
            "--target", "look, a {}", "--target_fpr", 0.0, "--json",
        )  # fmt: skip
        told, adapter = json.loads(result.stdout), ItDAdapter.from_pretrained(found)
        assert adapter.threshold == told["threshold"] > 0
        assert told["calibration"]["n_benign"] == 4 and told["calibration"]["n_target"] == 2
        assert told["calibration"]["realised_fpr"] == 0.0

    def test_needs_benign_prompts(self, cli: Callable[..., Any], base: Path, found: Path) -> None:
        assert "--benign_file" in cli("itd", "calibrate", found, "--pretrained_model_name_or_path", base, code=1).stderr


class TestInspect:
    def test_an_artefact_shows_its_concepts(
        self, cli: Callable[..., Any], base: Path, found: Path, tmp_path: Path
    ) -> None:
        result = cli(
            "itd", "inspect", found, "--pretrained_model_name_or_path", base, "--prompt", "a photo of a cat",
            "--prompt", "a <b>house</b>", "--output_dir", tmp_path / "page",
        )  # fmt: skip
        page = (tmp_path / "page" / "index.html").read_text(encoding="utf-8")
        assert "<h2>cat</h2>" in page and "<h2>dog</h2>" in page
        first = ItDAdapter.from_pretrained(found).concept_features["cat"][0].item()
        assert f"Feature {first}<" in page
        assert str(first) in result.stdout
        assert "<b>" not in page

    def test_an_autoencoder_shows_the_features_that_are_named(
        self, cli: Callable[..., Any], base: Path, sae_folder: Path, tmp_path: Path
    ) -> None:
        result = cli(
            "itd", "inspect", sae_folder, "--pretrained_model_name_or_path", base, "--feature", 3, "--feature", 7,
            "--prompt", "a cat", "--output_dir", tmp_path, "--json",
        )  # fmt: skip
        inner = cli(
            "itd", "inspect", sae_folder.parent, "--sae_subfolder", sae_folder.name, "--pretrained_model_name_or_path",
            base, "--feature", 3, "--feature", 7, "--prompt", "a cat", "--output_dir", tmp_path, "--json",
        )  # fmt: skip
        assert inner.stdout == result.stdout
        assert [one["feature"] for one in json.loads(result.stdout)["features"]] == [3, 7]

    @pytest.mark.parametrize("missing", ["--prompts_file", "--feature"])
    def test_needs_prompts_and_features(
        self, cli: Callable[..., Any], base: Path, sae_folder: Path, tmp_path: Path, missing: str
    ) -> None:
        given = {"--prompts_file": ("--feature", 3), "--feature": ("--prompt", "a cat")}[missing]
        common = ("itd", "inspect", sae_folder, "--pretrained_model_name_or_path", base, "--output_dir", tmp_path)
        assert missing in cli(*common, *given, code=1).stderr
