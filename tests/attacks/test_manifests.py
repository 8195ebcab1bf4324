"""erasure.json of the wrong types, of the future, or made to stall; and concepts that are none."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expunge.erase_ops.spm import SPMAdapter
from expunge.errors import AdapterFormatError, ExpungeError, InvalidInputError

from .conftest import artefact, kohya, save

Refusal = Callable[..., ExpungeError]
LONG = 10**5000 if hasattr(int, "from_bytes") else 0

RAW: dict[str, bytes] = {
    "empty": b"",
    "no JSON": b"{",
    "a list": b"[]",
    "a number": b"1",
    "null": b"null",
    "no UTF-8": b'{"\xff": 1}',
    "NaN": b'{"format_version": NaN}',
    "nested deeply": b"[" * 10**6,
    "a number of 5000 digits": b'{"format_version": ' + b"9" * 5000 + b"}",
    "duplicate keys": b'{"format_version": 1, "format_version": 1}',
    "ten megabytes": b" " * 10**7 + b"{}",
}


@pytest.mark.parametrize("name", RAW)
def test_a_file_that_is_no_manifest(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    folder = artefact(tmp_path / "x")
    (folder / "erasure.json").write_bytes(RAW[name])
    expect_refusal(AdapterFormatError, folder, concepts=None)


CHANGES: dict[str, dict[str, Any]] = {
    "from the future": {"format_version": 2},
    "far future": {"format_version": 2**63},
    "version as text": {"format_version": "1"},
    "version 1.0": {"format_version": 1.0},
    "another kind": {"kind": "itd"},
    "unknown kind": {"kind": "virus"},
    "kind as a list": {"kind": ["spm"]},
    "method as a number": {"method": 1},
    "method of a megabyte": {"method": "x" * 2**20},
    "family": {"family": "flux"},
    "component": {"component": "../unet"},
    "component of another kind": {"component": "text_encoder"},
    "concepts as text": {"concepts": "cat"},
    "no concepts": {"concepts": []},
    "an empty concept": {"concepts": [{"text": "", "phrasings": [""], "token_ids": None, "all_token_ids": None}]},
    "a concept as text": {"concepts": ["cat", "dog"]},
    "a concept too many": {"concepts": [{"text": "cat"}] * 3},
    "100000 concepts": {"concepts": [{"text": "cat"}] * 100_000},
    "neutral": {"neutral": None},
    "threshold as text": {"threshold": "0.5"},
    "threshold as bool": {"threshold": True},
    "threshold below zero": {"threshold": -1},
    "threshold without end": {"threshold": 10**400},
    "calibration": {"calibration": 1},
    "base fingerprint": {"base_fingerprint": []},
    "encoder fingerprint": {"text_encoder_fingerprint": {"a": 1}},
    "settings": {"settings": None},
    "parameters": {"parameters": {}},
    "parameters with more": {"parameters": {"alpha": {"default": 1.0, "sites": {}}, "x": 1}},
    "alpha as text": {"parameters": {"alpha": {"default": "1", "sites": {}}}},
    "alpha as bool": {"parameters": {"alpha": {"default": True, "sites": {}}}},
    "alpha zero": {"parameters": {"alpha": {"default": 0, "sites": {}}}},
    "alphas as a list": {"parameters": {"alpha": {"default": 1.0, "sites": []}}},
    "alpha of no site": {"parameters": {"alpha": {"default": 1.0, "sites": {"c.d": 1.0}}}},
    "files": {"files": []},
    "files that lead out": {"files": {"../x": {"bytes": 1, "sha256": ""}}},
    "an unknown field": {"extra": 1},
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_manifest_with_other_fields(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    folder = artefact(tmp_path / "x")
    path = folder / "erasure.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CHANGES[name]}))
    expect_refusal(AdapterFormatError, folder, concepts=None)


CONCEPTS: dict[str, dict[str, Any]] = {
    "no text": {"text": None},
    "phrasings as text": {"phrasings": "cat"},
    "no phrasings": {"phrasings": []},
    "a phrasing as a number": {"phrasings": [1]},
    "phrasings without states": {"phrasings": ["cat", "a cat"]},
    "token ids as text": {"token_ids": "12"},
    "token ids as floats": {"token_ids": [1.0]},
    "token ids as bools": {"token_ids": [True]},
    "token ids below zero": {"all_token_ids": [-1]},
    "token ids too large": {"all_token_ids": [2**31]},
    "an unknown field": {"extra": 1},
}


@pytest.mark.parametrize("name", CONCEPTS)
def test_a_concept_with_other_fields(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    folder = artefact(tmp_path / "x")
    path = folder / "erasure.json"
    record = json.loads(path.read_text())
    record["concepts"][0].update(CONCEPTS[name])
    path.write_text(json.dumps(record))
    expect_refusal(AdapterFormatError, folder, concepts=None)


def test_commas_separate_concepts_in_reference_metadata_only(tmp_path: Path) -> None:
    path = save(tmp_path / "x.safetensors", kohya(), {"prompts": "Paris, Texas"})
    assert SPMAdapter.from_pretrained(path).concepts == ["Paris", "Texas"]
    adapter = SPMAdapter.from_pretrained(path, concepts=["Paris, Texas"])
    assert SPMAdapter.from_pretrained(adapter.save_pretrained(tmp_path / "y")).concepts == ["Paris, Texas"]
    with pytest.raises(InvalidInputError, match="comma"):
        adapter.save_reference(tmp_path / "z.safetensors")


@pytest.mark.parametrize("concepts", [[], "", [""], [" ", "cat"], [1], ["\n"]])
def test_concepts_that_are_none(tmp_path: Path, expect_refusal: Refusal, concepts: Any) -> None:
    expect_refusal(InvalidInputError, save(tmp_path / "x.safetensors", kohya()), concepts=concepts)


@pytest.mark.parametrize("prompts", ["", ",", "cat,", "cat,,dog", " , "])
def test_metadata_with_empty_concepts(tmp_path: Path, expect_refusal: Refusal, prompts: str) -> None:
    expect_refusal(AdapterFormatError, save(tmp_path / "x.safetensors", kohya(), {"prompts": prompts}), concepts=None)


def test_a_concept_cannot_write_into_the_card(tmp_path: Path) -> None:
    text = "x`\n---\n# Fake\n<script>alert(1)</script> | [a](b)"
    path = save(tmp_path / "x.safetensors", kohya())
    folder = SPMAdapter.from_pretrained(path, concepts=[text]).save_pretrained(tmp_path / "y")
    card = (folder / "README.md").read_text()
    assert "\n# Fake" not in card and "\n---\n# " not in card.removeprefix("---\n")
    assert all("<script>" not in line or line.count("`") >= 2 for line in card.splitlines())
