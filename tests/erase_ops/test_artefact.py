"""The artefact folder: exact round trip, deterministic bytes, strict reading."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expunge.erase_ops.artefact import FORMAT_VERSION, Manifest, is_artefact, read_artefact, write_artefact
from expunge.errors import AdapterFormatError, InvalidInputError, NonFiniteError

MANIFEST = Manifest(
    kind="delta",
    method="esd",
    family="sd",
    component="unet",
    concepts=[{"text": "cat", "more": [1, 2.5, None]}],
    neutral="animal",
    threshold=0.1 + 0.2,  # not the shortest decimal
    calibration={"n_benign": 100},
    base_fingerprint="a1:0",
    text_encoder_fingerprint="w1:0",
    settings={"lr": 1e-4, "ü": True},
    parameters={},
)
TENSORS = {"a": torch.randn(3, 2), "b": torch.randn(2).bfloat16()}


def test_round_trip(tmp_path: Path) -> None:
    folder = tmp_path / "x" / "cat"
    assert not is_artefact(folder)
    write_artefact(folder, MANIFEST, TENSORS, {"README.md": b"card"})
    assert is_artefact(folder)
    artefact = read_artefact(folder, "delta")
    assert artefact.manifest == MANIFEST
    assert artefact.tensors.keys() == TENSORS.keys()
    assert all(torch.equal(artefact.tensors[name], TENSORS[name]) for name in TENSORS)
    assert {path.name for path in folder.iterdir()} == {"README.md", "erasure.json", "erasure.safetensors"}


def test_equal_artefacts_have_equal_bytes(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_artefact(tmp_path / name, MANIFEST, dict(reversed(TENSORS.items())), {})
    for file in ("erasure.json", "erasure.safetensors"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


def test_what_may_be_replaced(tmp_path: Path) -> None:
    write_artefact(tmp_path, MANIFEST, TENSORS, {})
    before = (tmp_path / "erasure.json").read_bytes()
    with pytest.raises(InvalidInputError, match="overwrite=True"):
        write_artefact(tmp_path, MANIFEST, TENSORS, {}, overwrite=False)
    with pytest.raises(InvalidInputError, match="'delta'"):
        write_artefact(tmp_path, Manifest(**{**vars(MANIFEST), "kind": "spm"}), TENSORS, {})
    assert (tmp_path / "erasure.json").read_bytes() == before
    with pytest.raises(AdapterFormatError, match="kind 'spm'"):
        read_artefact(tmp_path, "spm")


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("kind", "lora"),
        ("method", ""),
        ("family", "flux"),
        ("component", "vae"),
        ("concepts", []),
        ("concepts", [{"text": " "}]),
        ("concepts", [{}]),
        ("concepts", ["cat"]),
        ("neutral", None),
        ("threshold", float("nan")),
        ("threshold", -0.1),
        ("threshold", True),
        ("calibration", []),
        ("base_fingerprint", ""),
        ("text_encoder_fingerprint", 1),
        ("settings", None),
        ("settings", {"a": float("inf")}),
        ("settings", {"a": object()}),
    ],
)
def test_nothing_is_written_that_could_not_be_read(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(InvalidInputError):
        write_artefact(tmp_path / "x", Manifest(**{**vars(MANIFEST), name: value}), TENSORS, {})
    with pytest.raises(NonFiniteError):
        write_artefact(tmp_path / "x", MANIFEST, {"a": torch.tensor(float("inf"))}, {})
    assert not (tmp_path / "x").exists()


def edit(folder: Path, change: Callable[[dict[str, Any]], object]) -> None:
    path = folder / "erasure.json"
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))


CHANGES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "newer": (lambda r: r.update(format_version=FORMAT_VERSION + 1), "Upgrade Expunge"),
    "no version": (lambda r: r.pop("format_version"), "format_version"),
    "version as text": (lambda r: r.update(format_version="1"), "format_version"),
    "version as bool": (lambda r: r.update(format_version=True), "format_version"),
    "version 0": (lambda r: r.update(format_version=0), "format_version"),
    "unknown field": (lambda r: r.update(extra=1), "unexpected: ['extra']"),
    "missing field": (lambda r: r.pop("neutral"), "missing: ['neutral']"),
    "threshold as text": (lambda r: r.update(threshold="0.5"), "threshold"),
    "concepts as text": (lambda r: r.update(concepts="cat"), "concepts"),
    "settings as list": (lambda r: r.update(settings=[]), "settings"),
    "other checksum": (lambda r: r["files"]["erasure.safetensors"].update(sha256="0" * 64), "sha256"),
    "other size": (lambda r: r["files"]["erasure.safetensors"].update(bytes=1), "1 bytes"),
    "checksum of another file": (lambda r: r["files"].update(x={}), "files"),
    "no checksum": (lambda r: r.update(files={}), "files"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_an_edited_manifest_is_refused(tmp_path: Path, name: str) -> None:
    write_artefact(tmp_path, MANIFEST, TENSORS, {})
    change, words = CHANGES[name]
    edit(tmp_path, change)
    with pytest.raises(AdapterFormatError) as caught:
        read_artefact(tmp_path)
    assert words in str(caught.value) and "erasure." in caught.value.subject


def test_changed_tensors_are_refused(tmp_path: Path) -> None:
    write_artefact(tmp_path, MANIFEST, TENSORS, {})
    path = tmp_path / "erasure.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(AdapterFormatError, match="was changed"):
        read_artefact(tmp_path)
    path.unlink()
    with pytest.raises(AdapterFormatError, match="incomplete"):
        read_artefact(tmp_path)


def test_values_that_are_not_finite_are_refused_although_the_checksum_holds(tmp_path: Path) -> None:
    from safetensors.torch import save

    write_artefact(tmp_path, MANIFEST, TENSORS, {})
    data = save({"a": torch.tensor([float("nan")])})
    (tmp_path / "erasure.safetensors").write_bytes(data)
    entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    edit(tmp_path, lambda record: record["files"].update({"erasure.safetensors": entry}))
    with pytest.raises(NonFiniteError):
        read_artefact(tmp_path)


def test_a_folder_without_a_manifest(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match=r"erasure\.json"):
        read_artefact(tmp_path)
