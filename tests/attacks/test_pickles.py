"""Pickled files with a payload: never opened by pickle, whatever they are called and whatever lies beside them."""

from __future__ import annotations

import os
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from expunge.errors import AdapterFormatError, ExpungeError

from .conftest import kohya

Refusal = Callable[..., ExpungeError]


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, (str(self.marker),)


def test_the_payload_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "marker")))
    assert (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["x.bin", "x.pt", "x.pth", "x.ckpt", "x.pkl", "X.BIN", "x.safetensors", "x"])
@pytest.mark.parametrize("form", ["pickle", "torch", "legacy"])
def test_a_pickle_is_refused_unread(tmp_path: Path, expect_refusal: Refusal, name: str, form: str) -> None:
    marker, path = tmp_path / "marker", tmp_path / name
    if form == "pickle":
        path.write_bytes(pickle.dumps(Payload(marker)))
    else:
        torch.save({"x": Payload(marker)}, path, _use_new_zipfile_serialization=form == "torch")
    assert "pickled" in expect_refusal(AdapterFormatError, path).found
    assert not marker.exists()


@pytest.mark.parametrize("name", ["pytorch_lora_weights.bin", "adapter_model.bin", "x_last.pt"])
def test_a_folder_with_pickles_only(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    marker = tmp_path / "marker"
    folder = tmp_path / "x"
    folder.mkdir()
    torch.save(Payload(marker), folder / name)
    error = expect_refusal(AdapterFormatError, folder)
    assert name in error.subject and "safetensors" in error.fix
    assert not marker.exists()


def test_no_fallback_from_a_broken_file_to_a_pickle(tmp_path: Path, expect_refusal: Refusal) -> None:
    """diffusers says "defaulting to unsafe serialization" here."""
    marker = tmp_path / "marker"
    folder = tmp_path / "x"
    folder.mkdir()
    torch.save(Payload(marker), folder / "pytorch_lora_weights.bin")
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"broken")
    expect_refusal(AdapterFormatError, folder)
    assert not marker.exists()


def test_a_plain_state_dict_is_refused_as_well(tmp_path: Path, expect_refusal: Refusal) -> None:
    torch.save(kohya(), tmp_path / "x.pt")
    expect_refusal(AdapterFormatError, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "y.safetensors", "w") as archive:
        archive.writestr("x", b"")
    expect_refusal(AdapterFormatError, tmp_path / "y.safetensors")
