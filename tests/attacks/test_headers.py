"""Malformed safetensors files, among them those that the safetensors library itself accepts."""

from __future__ import annotations

import resource
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from expunge.erase_ops.spm import SPMAdapter
from expunge.errors import AdapterFormatError, ExpungeError

from .conftest import FLAT, kohya, raw, save

Refusal = Callable[..., ExpungeError]
ENTRY = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
VALID = safetensors.torch.save(kohya())
DEEP = b'{"a":' * 50_000 + b"1" + b"}" * 50_000

FILES: dict[str, bytes] = {
    "empty": b"",
    "seven bytes": b"1234567",
    "no header": struct.pack("<Q", 0),
    "header beyond the file": raw(b"{}", length=100),
    "header of 2**64 - 1 bytes": raw(b"{}", length=2**64 - 1),
    "header of 99 MB": raw(b"{}", length=99 * 10**6),
    "header is no JSON": raw(b"{{{{"),
    "header is no UTF-8": raw(b'{"\xff": 1}'),
    "header is a list": raw(b"[]"),
    "header is a number": raw(b"1e5000"),
    "header is nested deeply": raw(DEEP),
    "no tensors": raw({}),
    "metadata only": raw({"__metadata__": {"prompts": "cat"}}),
    "duplicate keys": raw(b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],'
                          b'"data_offsets":[0,4]}}', bytes(4)),
    "duplicate metadata": raw(b'{"__metadata__":{"prompts":"cat","prompts":"dog"}}'),
    "metadata of numbers": raw({"__metadata__": {"rank": 1}, "a": ENTRY}, bytes(4)),
    "metadata is null": raw({"__metadata__": None, "a": ENTRY}, bytes(4)),
    "entry is a list": raw({"a": [1]}, bytes(4)),
    "entry without shape": raw({"a": {"dtype": "F32", "data_offsets": [0, 4]}}, bytes(4)),
    "entry with more": raw({"a": {**ENTRY, "extra": 1}}, bytes(4)),
    "unknown dtype": raw({"a": {**ENTRY, "dtype": "F7"}}, bytes(4)),
    "dtype is a list": raw({"a": {**ENTRY, "dtype": ["F32"]}}, bytes(4)),
    "negative size": raw({"a": {**ENTRY, "shape": [-1]}}, bytes(4)),
    "fractional size": raw({"a": {**ENTRY, "shape": [1.5]}}, bytes(4)),
    "size as text": raw({"a": {**ENTRY, "shape": ["1"]}}, bytes(4)),
    "size is true": raw({"a": {**ENTRY, "shape": [True]}}, bytes(4)),
    "size that overflows": raw({"a": {**ENTRY, "shape": [2**63, 2**63]}}, bytes(4)),
    "size beyond 64 bits": raw({"a": {**ENTRY, "shape": [2**70]}}, bytes(4)),
    "20000 tensors": raw({f"a{i}": {**ENTRY, "data_offsets": [4 * i, 4 * i + 4]} for i in range(20_000)}, bytes(80000)),
    "200 dimensions": raw({"a": {**ENTRY, "shape": [1] * 200}}, bytes(4)),
    "name is empty": raw({"": ENTRY}, bytes(4)),
    "name leads out": raw({"../../x": ENTRY}, bytes(4)),
    "name is absolute": raw({"/etc/passwd": ENTRY}, bytes(4)),
    "name has a NUL": raw({"a\0b": ENTRY}, bytes(4)),
    "name has an escape sequence": raw({"\x1b[2J": ENTRY}, bytes(4)),
    "name of a megabyte": raw({"a" * 2**20: ENTRY}, bytes(4)),
    "overlapping tensors": raw({"a": ENTRY, "b": ENTRY}, bytes(4)),
    "a hole": raw({"a": ENTRY, "b": {**ENTRY, "data_offsets": [8, 12]}}, bytes(12)),
    "offsets backwards": raw({"a": {**ENTRY, "data_offsets": [4, 0]}}, bytes(4)),
    "data too short": raw({"a": ENTRY}, bytes(3)),
    "data too long": raw({"a": ENTRY}, bytes(5)),
    "truncated": VALID[:-1],
    "trailing byte": VALID + b"\0",
    "half": VALID[: len(VALID) // 2],
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_malformed_file(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(FILES[name])
    assert str(path) in expect_refusal(AdapterFormatError, path).subject


def test_the_untouched_file_loads(tmp_path: Path) -> None:
    (tmp_path / "x.safetensors").write_bytes(VALID)
    assert len(SPMAdapter.from_pretrained(tmp_path / "x.safetensors", concepts="cat").factors) == 1


def test_100000_tensors_are_bounded(tmp_path: Path, expect_refusal: Refusal) -> None:
    """The library takes 5 seconds and 370 MB for these."""
    entry = {"dtype": "F32", "shape": []}
    header = {f"{FLAT}_{i}.alpha": {**entry, "data_offsets": [4 * i, 4 * i + 4]} for i in range(100_000)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw(header, bytes(400_000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    expect_refusal(AdapterFormatError, path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100 * 1024  # KiB


def test_a_sparse_file_of_a_terabyte_is_not_read(tmp_path: Path, expect_refusal: Refusal) -> None:
    path = tmp_path / "x.safetensors"
    with open(path, "wb") as file:
        file.truncate(2**40)
    assert "bytes" in expect_refusal(AdapterFormatError, path).found


@pytest.mark.parametrize("tensor", [torch.ones(1, 3, 1, 1, 1), torch.ones(()), torch.ones(0, 3), torch.ones(1, 3, 3)])
def test_shapes_that_no_layer_has(tmp_path: Path, expect_refusal: Refusal, tensor: Any) -> None:
    expect_refusal(AdapterFormatError, save(tmp_path / "x.safetensors", kohya(down=tensor)))
