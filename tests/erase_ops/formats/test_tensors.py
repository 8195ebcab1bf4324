"""Strict reading and deterministic writing of safetensors and JSON."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from expunge.erase_ops.formats.tensors import check_weights, json_bytes, parse_json, read_tensors, tensor_bytes
from expunge.errors import AdapterFormatError, NonFiniteError


def test_round_trip_keeps_every_bit(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 4),
        "a": torch.randn(2, dtype=torch.float64).half(),
        "c": torch.randn(2, 3).bfloat16().T,  # not contiguous
        "d": torch.tensor(3),
    }
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_bytes(tensors, {"k": "v"}))
    read = read_tensors(path)
    assert read.metadata == {"k": "v"}
    assert read.tensors.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read.tensors[name].dtype == tensor.dtype and torch.equal(read.tensors[name], tensor)


def test_safetensors_itself_reads_what_is_written(tmp_path: Path) -> None:
    metadata = {"prompts": "ä,b", "rank": "1", "alpha": "1.0"}
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_bytes({"a": torch.arange(4.0), "b": torch.ones(3)}, metadata))
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == metadata
        assert torch.equal(file.get_tensor("a"), torch.arange(4.0))


def test_tensors_come_in_the_order_of_their_names(tmp_path: Path) -> None:
    """Trap: safetensors gives them in an order that changes from one reading to the next."""
    tensors = {f"block {number}": torch.ones(1) for number in range(20)}
    path = tmp_path / "x.safetensors"
    path.write_bytes(tensor_bytes(tensors, {}))
    assert list(read_tensors(path).tensors) == sorted(tensors)


def test_equal_content_gives_equal_bytes() -> None:
    tensors = {"b": torch.ones(3), "a": torch.zeros(2)}
    metadata = {"prompts": "x", "rank": "1", "alpha": "1.0", "z": "", "y": "1"}
    reordered = {key: tensors[key] for key in reversed(list(tensors))}
    first = tensor_bytes(tensors, metadata)
    assert all(tensor_bytes(reordered, dict(reversed(metadata.items()))) == first for _ in range(8))
    code = (
        "import sys, torch; from expunge.erase_ops.formats.tensors import tensor_bytes;"
        "sys.stdout.buffer.write(tensor_bytes({'b': torch.ones(3), 'a': torch.zeros(2)},"
        "{'prompts': 'x', 'rank': '1', 'alpha': '1.0', 'z': '', 'y': '1'}))"
    )
    assert subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, check=True).stdout == first


@given(st.dictionaries(st.text(max_size=8), st.text(max_size=8), max_size=4))
def test_any_metadata_round_trips(metadata: dict[str, str]) -> None:
    data = tensor_bytes({"a": torch.ones(1)}, metadata)
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    assert json.loads(data[8 : 8 + length])["__metadata__"] == (metadata or {"format": "pt"})
    assert torch.equal(safetensors.torch.load(data)["a"], torch.ones(1))


@pytest.mark.parametrize(
    "text",
    ['{"a": NaN}', '{"a": Infinity}', '{"a": 1e999}', '{"a": 1, "a": 2}', "[" * 100_000, "{", b"\xff", "9" * 5000],
)
def test_json_is_strict(text: str | bytes) -> None:
    with pytest.raises(AdapterFormatError, match=r"^here: expected strict JSON"):
        parse_json(text, "here")


def test_json_is_written_sorted_and_refuses_nan() -> None:
    assert json_bytes({"b": 1, "a": "ä"}) == '{\n  "a": "ä",\n  "b": 1\n}\n'.encode()
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_bytes({"a": float("nan")})


def test_weights_are_finite_floating_point() -> None:
    check_weights("f", {"a": torch.ones(2), "b": torch.ones(2).bfloat16()})
    with pytest.raises(AdapterFormatError, match="int64"):
        check_weights("f", {"a": torch.ones(2, dtype=torch.int64)})
    with pytest.raises(NonFiniteError, match="1 of 2"):
        check_weights("f", {"a": torch.tensor([1.0, float("nan")])})
