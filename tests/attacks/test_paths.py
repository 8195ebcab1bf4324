"""Names, subfolders and links that lead out of the folder they belong to, and files that are no files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expunge.erase_ops.spm import Concept, Factors, SPMAdapter
from expunge.errors import AdapterFormatError, ExpungeError, UnsafePathError

from .conftest import artefact, kohya, save

Refusal = Callable[..., ExpungeError]


@pytest.mark.parametrize("subfolder", ["..", "../x", "a/../../x", "/tmp", "..\\x", "C:\\x", "a\0b", ""])
def test_subfolder(tmp_path: Path, expect_refusal: Refusal, subfolder: str) -> None:
    artefact(tmp_path / "x")
    (tmp_path / "y").mkdir()
    expect_refusal(UnsafePathError, tmp_path / "y", subfolder=subfolder)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/x.safetensors", "a/../../x.safetensors", "..", ""])
def test_weight_name(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    save(tmp_path / "x.safetensors", kohya())
    (tmp_path / "y").mkdir()
    expect_refusal(UnsafePathError, tmp_path / "y", weight_name=name)


@pytest.mark.parametrize("name", ["../evil", "/tmp/evil", "a.b", "", " ", "..", "con/x", "a\nb", "a" * 100])
def test_adapter_name(tmp_path: Path, name: str) -> None:
    """PEFT accepts "/tmp/evil" and later writes there."""
    adapter = SPMAdapter({"a": Factors(torch.ones(1, 1), torch.ones(1, 1))}, [Concept("../../evil")])
    assert adapter.name == "evil"
    if name:
        with pytest.raises(UnsafePathError):
            SPMAdapter(adapter.factors, adapter.concept_list, name=name)


def test_a_hostile_file_name_gives_a_safe_adapter_name(tmp_path: Path) -> None:
    path = save(tmp_path / "..evil .. $(x).safetensors", kohya())
    assert SPMAdapter.from_pretrained(path, concepts="cat").name == "evil-x"


@pytest.mark.parametrize("name", ["erasure.json", "erasure.safetensors"])
def test_a_link_out_of_an_artefact(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    folder = artefact(tmp_path / "x")
    secret = (folder / name).rename(tmp_path / "secret")
    (folder / name).symlink_to(secret)
    expect_refusal(UnsafePathError, folder, concepts=None)


def test_a_link_out_of_a_run_folder(tmp_path: Path, expect_refusal: Refusal) -> None:
    secret = save(tmp_path / "secret", kohya())
    run = tmp_path / "run"
    run.mkdir()
    (run / "run_last.safetensors").symlink_to(secret)
    expect_refusal(UnsafePathError, run)
    (run / "run_last.safetensors").rename(run / "only.safetensors")
    expect_refusal(UnsafePathError, run)


def test_a_subfolder_that_is_a_link_out(tmp_path: Path, expect_refusal: Refusal) -> None:
    artefact(tmp_path / "x")
    (tmp_path / "y").mkdir()
    (tmp_path / "y" / "inner").symlink_to(tmp_path / "x")
    expect_refusal(UnsafePathError, tmp_path / "y", subfolder="inner")


def test_links_in_a_circle_and_to_nowhere(tmp_path: Path, expect_refusal: Refusal) -> None:
    (tmp_path / "erasure.json").symlink_to("erasure.json")
    expect_refusal(UnsafePathError, tmp_path)
    (tmp_path / "erasure.json").unlink()
    (tmp_path / "erasure.json").symlink_to("nowhere")
    expect_refusal(UnsafePathError, tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path: Path, expect_refusal: Refusal) -> None:
    os.mkfifo(tmp_path / "x.safetensors")
    assert "pipe" in expect_refusal(AdapterFormatError, tmp_path).found


def test_an_endless_device_is_not_read(expect_refusal: Refusal) -> None:
    expect_refusal(AdapterFormatError, "/dev/zero")


@pytest.mark.parametrize("name", ["erasure.json", "erasure.safetensors"])
def test_a_folder_in_place_of_a_file(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    folder = artefact(tmp_path / "x")
    (folder / name).unlink()
    (folder / name).mkdir()
    expect_refusal(AdapterFormatError, folder, concepts=None)


def test_saving_does_not_follow_a_planted_link(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    folder = tmp_path / "x"
    folder.mkdir()
    for name in ("erasure.safetensors", "README.md", "adapter_config.json"):
        (folder / name).symlink_to(tmp_path / "precious")
    artefact(folder)
    assert (tmp_path / "precious").read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
