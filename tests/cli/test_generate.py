"""`expunge generate`: pictures with and without erasures, and the report of their gates."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from expunge import ErasedPipeline, SPMAdapter

STEPS = ("--num_inference_steps", 2)


def pictures(folder: Path) -> list[np.ndarray]:
    return [np.asarray(Image.open(path)) for path in sorted(folder.glob("*.png"))]


@pytest.fixture
def generate(cli: Callable[..., Any], base: Path, tmp_path: Path) -> Callable[..., Path]:
    """`generate("name", *options)`: runs the command on the tiny base, gives the folder of the pictures."""

    def run(name: str, *options: object, code: int = 0) -> Path:
        folder = tmp_path / name
        cli(
            "generate", "--pretrained_model_name_or_path", base, "--output_dir", folder, *STEPS, *options, code=code
        )  # fmt: skip
        return folder

    return run


class TestPictures:
    def test_an_erasure_changes_its_concept_and_nothing_else(
        self, generate: Callable[..., Path], tiny_spm: Callable[..., SPMAdapter], tmp_path: Path
    ) -> None:
        tiny_spm(threshold=0.999).save_pretrained(tmp_path / "cat")
        prompts = ("--prompt", "a cat", "--prompt", "a red car")
        plain = pictures(generate("plain", *prompts, "--no_erasures"))
        erased = pictures(generate("erased", *prompts, "--erasures", tmp_path / "cat"))
        assert len(plain) == len(erased) == 2
        assert not np.array_equal(plain[0], erased[0])
        assert np.array_equal(plain[1], erased[1])

    def test_the_report_says_what_each_picture_is(self, generate: Callable[..., Path], artefact: Path) -> None:
        folder = generate(
            "out", "--prompt", "a cat", "--prompt", "a tree", "--num_images_per_prompt", 2, "--seed", 5,
            "--erasures", artefact, "--gate_threshold", 0.999,
        )  # fmt: skip
        report = json.loads((folder / "report.json").read_text())
        images = report["images"]
        assert [(image["prompt"], image["seed"]) for image in images] == [
            ("a cat", 5), ("a cat", 6), ("a tree", 7), ("a tree", 8)
        ]  # fmt: skip
        assert [image["gates"]["cat"] > 0 for image in images] == [True, True, False, False]
        assert report["settings"]["gate_threshold"] == 0.999
        assert all((folder / image["file"]).is_file() for image in images)

    def test_a_picture_can_be_drawn_again_by_its_seed(self, generate: Callable[..., Path], artefact: Path) -> None:
        both = pictures(generate("both", "--prompt", "a cat", "--num_images_per_prompt", 2, "--erasures", artefact))
        again = pictures(generate("again", "--prompt", "a cat", "--seed", 1, "--erasures", artefact))
        assert np.abs(both[1].astype(int) - again[0].astype(int)).max() <= 1

    def test_gate_zero_is_the_base_model(self, generate: Callable[..., Path], artefact: Path) -> None:
        plain = pictures(generate("plain", "--prompt", "a cat", "--no_erasures"))
        off = pictures(generate("off", "--prompt", "a cat", "--erasures", artefact, "--gate", 0))
        assert np.array_equal(plain[0], off[0])

    def test_json_is_the_report(self, cli: Callable[..., Any], base: Path, artefact: Path, tmp_path: Path) -> None:
        result = cli(
            "generate", "--pretrained_model_name_or_path", base, "--prompt", "a cat", "--erasures", artefact,
            "--output_dir", tmp_path / "out", "--json", *STEPS,
        )  # fmt: skip
        assert json.loads(result.stdout) == json.loads((tmp_path / "out" / "report.json").read_text())

    def test_a_folder_saved_erased_brings_its_erasures(
        self, cli: Callable[..., Any], generate: Callable[..., Path], base: Path, artefact: Path, tmp_path: Path
    ) -> None:
        ErasedPipeline.from_pretrained(base, erasures=[artefact]).save_pretrained(tmp_path / "saved")
        one = pictures(generate("one", "--prompt", "a cat", "--erasures", artefact))
        folder = tmp_path / "two"
        cli(
            "generate", "--pretrained_model_name_or_path", tmp_path / "saved", "--prompt", "a cat",
            "--output_dir", folder, *STEPS,
        )  # fmt: skip
        assert np.array_equal(one[0], pictures(folder)[0])
        assert "cat" in cli("info", tmp_path / "saved").stdout
        assert "ok" in cli("check", tmp_path / "saved").stdout


class TestErrors:
    def test_forgetting_the_erasures_is_no_way_to_an_unerased_picture(self, generate: Callable[..., Path]) -> None:
        assert not list(generate("out", "--prompt", "a cat", code=1).glob("*.png"))

    def test_with_and_without_contradict(self, generate: Callable[..., Path], artefact: Path) -> None:
        generate("out", "--prompt", "a cat", "--erasures", artefact, "--no_erasures", code=1)
        folder = generate("out", "--prompt", "a cat", "--gate", 0.5, "--no_erasures", code=1)
        assert not list(folder.glob("*.png"))

    def test_an_erasure_for_another_model_is_refused(
        self, generate: Callable[..., Path], tiny_spm: Callable[..., SPMAdapter], tmp_path: Path
    ) -> None:
        adapter = tiny_spm()
        adapter.factors["down_blocks.9.attentions.0.proj_in"] = adapter.factors.pop(
            "down_blocks.0.attentions.0.proj_in"
        )
        adapter.save_pretrained(tmp_path / "odd")
        folder = generate("out", "--prompt", "a cat", "--erasures", tmp_path / "odd", code=1)
        assert not list(folder.glob("*.png"))

    def test_concepts_belong_to_one_erasure(
        self, cli: Callable[..., Any], base: Path, artefact: Path, tmp_path: Path
    ) -> None:
        result = cli(
            "generate", "--pretrained_model_name_or_path", base, "--prompt", "a cat", "--erasures", artefact,
            "--erasures", artefact, "--concepts", "cat", "--output_dir", tmp_path / "out", code=1,
        )  # fmt: skip
        assert "--concepts" in result.stderr

    def test_a_wrong_dtype_is_named(self, generate: Callable[..., Path], cli: Callable[..., Any], base: Path) -> None:
        result = cli(
            "generate", "--pretrained_model_name_or_path", base, "--prompt", "a cat", "--dtype", "int8", code=1
        )  # fmt: skip
        assert "--dtype" in result.stderr
