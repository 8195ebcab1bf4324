"""Strict reading and deterministic writing of safetensors and JSON, the only two formats that Expunge loads.

safetensors itself accepts duplicate header keys, NaN, names such as "../../x" or "", tensors of 200 dimensions and
files of 100,000 tensors; the header is therefore checked here before the library sees the data.
"""

from __future__ import annotations

import json
import math
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from expunge.erase_ops.formats.folders import replacing
from expunge.errors import AdapterFormatError, NonFiniteError

MAX_FILE_BYTES = 4 * 2**30
MAX_HEADER_BYTES = 8 * 2**20
MAX_TENSORS = 16_384
MAX_DIMENSIONS = 5
MAX_NAME = 512
MAX_JSON_BYTES = 8 * 2**20

WRITTEN = 1 << 20  # elements that are copied at a time when a file is written in blocks

_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
}
_DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "I16", "I8", "U8", "BOOL")  # a tuple: a list may be looked up
_PICKLES = frozenset({".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle"})
_PICKLE_MAGIC = (b"PK\x03\x04", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")


@dataclass(frozen=True)
class TensorFile:
    """What a safetensors file holds: its tensors by name, on the CPU, and its metadata."""

    tensors: dict[str, Tensor]
    metadata: dict[str, str]


@dataclass(frozen=True)
class TensorEntry:
    """What a file's header says of a tensor: its dtype by safetensors' name, and its shape."""

    dtype: str
    shape: tuple[int, ...]


# ---------------------------------------------------------------------------------------------------------- reading


def read_tensors(path: Path) -> TensorFile:
    """Reads a safetensors file after checking its header.

    Args:
        path: the file.

    Returns:
        The tensors in the file's dtypes (names, shapes and finiteness of values are the caller's to judge, see
        `check_weights`) and the metadata.

    Raises:
        AdapterFormatError: if it is not a regular file, is pickled, malformed, truncated or beyond the limits.
    """
    refuse_pickle(path)
    return parse_tensors(read_bytes(path, MAX_FILE_BYTES), path)


def parse_tensors(data: bytes, path: Path) -> TensorFile:
    """Parses the content of a safetensors file, see `read_tensors`; `path` is for errors only."""
    if data.startswith(_PICKLE_MAGIC):
        _refuse(path, "a safetensors file", "pickled data under another name", _PICKLE_FIX)
    header = _parse_header(path, data)
    metadata = header.pop("__metadata__", {})
    _check_header(path, header, metadata)
    try:
        tensors = load_safetensors(data)
    except (SafetensorError, ValueError, RuntimeError, OverflowError) as error:
        raise AdapterFormatError(
            str(path), expected="a well-formed safetensors file", found=str(error), fix=_DAMAGED_FIX
        ) from error
    # safetensors gives them in another order each time; what is computed from them should not depend on that.
    return TensorFile(dict(sorted(tensors.items())), metadata)


def read_header(path: Path) -> tuple[dict[str, TensorEntry], dict[str, str]]:
    """Reads and checks a safetensors file's header alone: its tensors' entries, and its metadata.

    For files that are too large to be held twice; the data itself is then read lazily.

    Raises:
        AdapterFormatError: if it is not a regular file, is pickled, malformed or truncated.
    """
    refuse_pickle(path)
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            _refuse(path, "a regular file", "a folder, device, pipe or socket", "Pass the path of a file.")
        with open(path, "rb") as file:
            start = file.read(8)
            length = min(int.from_bytes(start, "little"), MAX_HEADER_BYTES)
            head = start + file.read(length)
    except (OSError, ValueError) as error:
        raise AdapterFormatError(
            str(path), expected="a readable file", found=str(error), fix="Check the path and its permissions."
        ) from error
    if head.startswith(_PICKLE_MAGIC):
        _refuse(path, "a safetensors file", "pickled data under another name", _PICKLE_FIX)
    header = _parse_header(path, head)
    metadata = header.pop("__metadata__", {})
    _check_header(path, header, metadata)
    entries = {name: TensorEntry(entry["dtype"], tuple(entry["shape"])) for name, entry in header.items()}
    return entries, metadata


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object strictly: UTF-8, no duplicate keys, no NaN or infinity.

    Raises:
        AdapterFormatError: if the file is missing, too large, or not such an object.
    """
    value = parse_json(read_bytes(path, MAX_JSON_BYTES), str(path))
    if not isinstance(value, dict):
        _refuse(path, "a JSON object", type(value).__name__, _DAMAGED_FIX)
    return value


def parse_json(data: bytes | str, subject: str) -> Any:
    """Parses JSON strictly, see `read_json`.

    Raises:
        AdapterFormatError: naming `subject`.
    """
    try:
        text = data.decode("utf-8") if isinstance(data, bytes) else data
        return json.loads(text, object_pairs_hook=_unique_keys, parse_float=_finite_float, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        raise AdapterFormatError(
            subject, expected="strict JSON in UTF-8", found=_shorten(str(error)), fix=_DAMAGED_FIX
        ) from error


def read_bytes(path: Path, limit: int) -> bytes:
    """The content of a regular file of at most `limit` bytes.

    Raises:
        AdapterFormatError: if there is no such file, it is not a regular file, is too large or cannot be read.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            _refuse(path, "a regular file", "a folder, device, pipe or socket", "Pass the path of a file.")
        if status.st_size > limit:
            _refuse(path, f"at most {limit} bytes", f"{status.st_size} bytes", "This is not an adapter file.")
        return path.read_bytes()
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the path
        raise AdapterFormatError(
            str(path), expected="a readable file", found=str(error), fix="Check the path and its permissions."
        ) from error


def refuse_pickle(path: Path) -> None:
    """Refuses a file by its pickle suffix, unread.

    Raises:
        AdapterFormatError: for `.bin`, `.pt`, `.pth`, `.ckpt`, `.pkl` and `.pickle`.
    """
    if path.suffix.lower() in _PICKLES:
        _refuse(path, "a .safetensors file", f"a pickled file ({path.suffix})", _PICKLE_FIX)


def check_weights(path: str, tensors: Mapping[str, Tensor]) -> None:
    """Checks that tensors which are to be used as weights are finite floating point.

    Raises:
        AdapterFormatError: for a dtype other than float16, bfloat16 or float32.
        NonFiniteError: for NaN or infinity.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            _refuse(path, f"{name!r} in float32, float16 or bfloat16", str(tensor.dtype), "Convert the file's weights.")
        if not bool(torch.isfinite(tensor).all()):
            bad = int((~torch.isfinite(tensor)).sum())
            raise NonFiniteError(
                path,
                expected=f"finite values in {name!r}",
                found=f"{bad} of {tensor.numel()} are NaN or infinite",
                fix="The adapter is broken (a diverged training?); do not use it.",
            )


# ---------------------------------------------------------------------------------------------------------- writing


def tensor_bytes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> bytes:
    """Serialises tensors as safetensors; equal content gives equal bytes.

    Args:
        tensors: by name, on any device.
        metadata: strings; `{"format": "pt"}` if left out.

    Returns:
        The file's content.
    """
    plain = {name: tensors[name].detach().cpu().contiguous().clone() for name in sorted(tensors)}
    meta = dict(metadata or {"format": "pt"})
    data = save_safetensors(plain, meta)
    # The library writes the metadata in the order of a randomly seeded hash map.
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"] = {key: meta[key] for key in sorted(meta)}
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts on a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + data[8 + length :]


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Writes a safetensors file a block at a time, beside its place, and renames it into it.

    For tensors that are too large to be held twice; equal content gives equal bytes. Views (a transpose, say) are
    written in the order of their shape without a copy of the whole.

    Args:
        path: the file; its folder must exist.
        tensors: by name, on any device.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name in sorted(tensors):
        tensor = tensors[name]
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with replacing(path) as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in sorted(tensors):
            for block in _blocks(tensors[name].detach()):
                file.write(block.cpu().contiguous().view(torch.uint8).numpy().tobytes())


def _blocks(tensor: Tensor) -> Iterator[Tensor]:
    """A tensor in pieces along its first dimension, each a vector of some megabytes at most."""
    if tensor.ndim == 0 or tensor.numel() == 0:
        yield tensor.reshape(-1)
        return
    rows = max(1, WRITTEN * tensor.shape[0] // tensor.numel())
    for first in range(0, tensor.shape[0], rows):
        yield tensor[first : first + rows].reshape(-1)


def json_bytes(value: Mapping[str, Any]) -> bytes:
    """Serialises an object as indented JSON with sorted keys; NaN and infinity are refused with ValueError."""
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n").encode()


# ---------------------------------------------------------------------------------------------------------- details

_DAMAGED_FIX = "The file is damaged or not what its name says: download or export it again."
_PICKLE_FIX = "Pickled files can run code and are never loaded; convert it to safetensors where you trust it."


def _parse_header(path: Path, data: bytes) -> dict[str, Any]:
    if len(data) < 8:
        _refuse(path, "a safetensors file", f"{len(data)} bytes", _DAMAGED_FIX)
    length = int.from_bytes(data[:8], "little")
    if length > min(MAX_HEADER_BYTES, len(data) - 8):
        found = f"{length} bytes (file: {len(data)})"
        _refuse(path, f"a header inside the file of at most {MAX_HEADER_BYTES} bytes", found, _DAMAGED_FIX)
    header = parse_json(data[8 : 8 + length], f"{path} (header)")
    if not isinstance(header, dict):
        _refuse(path, "a JSON object as header", type(header).__name__, _DAMAGED_FIX)
    return header


def _check_header(path: Path, header: dict[str, Any], metadata: Any) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        _refuse(path, "metadata of strings", _shorten(repr(metadata)), _DAMAGED_FIX)
    if not header:
        _refuse(path, "at least one tensor", "none", "The file holds no weights: export the adapter again.")
    if len(header) > MAX_TENSORS:
        _refuse(path, f"at most {MAX_TENSORS} tensors", str(len(header)), "This is not an adapter file.")
    for name, entry in header.items():
        if not 0 < len(name) <= MAX_NAME or not name.isprintable():
            _refuse(path, "printable tensor names", _shorten(repr(name)), _DAMAGED_FIX)
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            _refuse(path, f"dtype, shape and data_offsets for {name!r}", _shorten(repr(entry)), _DAMAGED_FIX)
        if entry["dtype"] not in _DTYPES:
            found = _shorten(repr(entry["dtype"]))
            _refuse(path, f"one of {', '.join(_DTYPES)} for {name!r}", found, "Convert the file's weights.")
        shape = entry["shape"]
        if not isinstance(shape, list) or len(shape) > MAX_DIMENSIONS or not all(type(n) is int for n in shape):
            _refuse(path, f"at most {MAX_DIMENSIONS} dimensions for {name!r}", _shorten(repr(shape)), _DAMAGED_FIX)


def _unique_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1}) if len(keys) < 1000 else ["(long list)"]
        raise ValueError(f"duplicate keys {twice[:5]}")
    return result


def _finite_float(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:20]} is out of range")
    return value


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _shorten(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + "..."


def _refuse(path: Path | str, expected: str, found: str, fix: str) -> NoReturn:
    raise AdapterFormatError(str(path), expected=expected, found=found, fix=fix)
