"""Any bytes: a load gives finite tensors or one of the named errors, and nothing else."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from expunge.erase_ops.spm import SPMAdapter
from expunge.errors import ExpungeError

from .conftest import FLAT, artefact, kohya, raw

FIXTURES = Path(__file__).parent.parent / "fixtures" / "spm"
OFFICIAL = (FIXTURES / "official_spm_tiny.safetensors").read_bytes()
SMALL = safetensors.torch.save(kohya(), {"prompts": "cat", "rank": "1", "alpha": "1.0"})
EXAMPLES = 120


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("fuzz")


def assert_finite_or_named(path: Path) -> bool:
    """Whether the load succeeded; any other error than the named ones passes through and fails the test."""
    try:
        adapter = SPMAdapter.from_pretrained(path)
    except ExpungeError as error:
        assert str(error)
        return False
    for item in adapter.factors.values():
        assert torch.isfinite(item.delta()).all()
        assert torch.isfinite(item.down).all() and torch.isfinite(item.up).all() and item.alpha > 0
    assert all(concept.text.strip() for concept in adapter.concept_list)
    return True


def mutate(data: bytes, edits: list[tuple[int, int, bytes]]) -> bytes:
    """Each edit replaces `length` bytes at a position by others."""
    for position, length, replacement in edits:
        start = position % (len(data) + 1)
        data = data[:start] + replacement + data[start + length :]
    return data


EDITS = st.lists(st.tuples(st.integers(0, 2**16), st.integers(0, 8), st.binary(max_size=8)), min_size=1, max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_the_untouched_files_load(folder: Path) -> None:
    for data in (OFFICIAL, SMALL):
        path = folder / "x.safetensors"
        path.write_bytes(data)
        assert assert_finite_or_named(path)


@settings(max_examples=EXAMPLES)
@given(edits=EDITS)
def test_edited_bytes_of_a_small_file(folder: Path, edits: list[tuple[int, int, bytes]]) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(mutate(SMALL, edits))
    assert_finite_or_named(path)


@pytest.mark.slow
@settings(max_examples=EXAMPLES * 50)
@given(edits=EDITS)
def test_edited_bytes_for_longer(folder: Path, edits: list[tuple[int, int, bytes]]) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(mutate(SMALL, edits))
    assert_finite_or_named(path)


@settings(max_examples=EXAMPLES // 4)
@given(edits=EDITS)
def test_edited_bytes_of_a_reference_file(folder: Path, edits: list[tuple[int, int, bytes]]) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(mutate(OFFICIAL, edits))
    assert_finite_or_named(path)


@settings(max_examples=EXAMPLES)
@given(position=st.integers(0, len(SMALL) - 1), byte=st.integers(0, 255))
def test_one_byte(folder: Path, position: int, byte: int) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(SMALL[:position] + bytes([byte]) + SMALL[position + 1 :])
    assert_finite_or_named(path)


@settings(max_examples=EXAMPLES)
@given(data=st.binary(max_size=200))
def test_any_bytes(folder: Path, data: bytes) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(data)
    assert not assert_finite_or_named(path)


@settings(max_examples=EXAMPLES)
@given(
    header=st.dictionaries(
        st.sampled_from([*kohya(), "__metadata__", "x"]),
        JSON
        | st.fixed_dictionaries(
            {
                "dtype": st.sampled_from(["F32", "F16", "I64", "F8_E4M3", "BOOL", "?"]) | JSON,
                "shape": st.lists(st.integers(-1, 2**40), max_size=6) | JSON,
                "data_offsets": st.lists(st.integers(-1, 2**64), min_size=2, max_size=2) | JSON,
            }
        ),
    ),
    data=st.binary(max_size=32),
)
def test_any_header(folder: Path, header: dict[str, object], data: bytes) -> None:
    path = folder / "x.safetensors"
    path.write_bytes(raw(header, data))
    assert_finite_or_named(path)


@settings(max_examples=EXAMPLES)
@given(
    values=st.lists(st.floats(width=32), min_size=6, max_size=6),
    metadata=st.dictionaries(st.sampled_from(["prompts", "alpha", "x"]), st.text(max_size=8)),
)
def test_any_values(folder: Path, values: list[float], metadata: dict[str, str]) -> None:
    numbers = torch.tensor(values)
    path = folder / "x.safetensors"
    path.write_bytes(
        safetensors.torch.save(
            {
                f"{FLAT}.lora_down.weight": numbers[:3].view(1, 3),
                f"{FLAT}.lora_up.weight": numbers[3:5].view(2, 1).clone(),
                f"{FLAT}.alpha": numbers[5].clone(),
            },
            metadata or None,
        )
    )
    loaded = assert_finite_or_named(path)
    assert not loaded or (bool(torch.isfinite(numbers).all()) and bool(metadata.get("prompts", "").strip(" ,")))


@settings(max_examples=EXAMPLES)
@given(edits=EDITS)
def test_edited_bytes_of_a_manifest(folder: Path, edits: list[tuple[int, int, bytes]]) -> None:
    path = artefact_of(folder) / "erasure.json"
    original = path.read_bytes()
    path.write_bytes(mutate(original, edits))
    try:
        assert_finite_or_named(path.parent)
    finally:
        path.write_bytes(original)


@settings(max_examples=EXAMPLES)
@given(name=st.integers(0, 100), value=JSON)
def test_any_value_in_a_manifest(folder: Path, name: int, value: object) -> None:
    path = artefact_of(folder) / "erasure.json"
    original = path.read_text()
    record = json.loads(original)
    places = [record, record["concepts"][0], record["parameters"], record["parameters"]["alpha"], record["files"]]
    keys = [(place, key) for place in places for key in place]
    place, key = keys[name % len(keys)]
    place[key] = value
    path.write_text(json.dumps(record))
    try:
        assert_finite_or_named(path.parent)
    finally:
        path.write_text(original)


def artefact_of(folder: Path) -> Path:
    return folder / "artefact" if (folder / "artefact").exists() else artefact(folder / "artefact")
