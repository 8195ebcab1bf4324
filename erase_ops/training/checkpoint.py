"""Checkpoints from which a run goes on bit for bit: safetensors for tensors, JSON for the rest, nothing pickled.

checkpoint-000100/
    parameters.safetensors   the trained float32 tensors
    optimizer.safetensors    the optimiser's tensors, "index.name"
    rank-0.safetensors       of each process: its random generator and what the method still holds
    state.json               step, settings, schedule, the optimiser's numbers, losses so far
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.erase_ops.formats.folders import locate, write_folder
from expunge.erase_ops.formats.tensors import check_weights, json_bytes, read_json, read_tensors, tensor_bytes
from expunge.errors import AdapterFormatError, AdapterMismatchError, InvalidInputError

logger = logging.getLogger(__name__)

FORMAT = 1
_NAME = re.compile(r"checkpoint-(\d+)")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """Everything that a run needs to go on.

    Args:
        step: optimiser steps done.
        parameters: the trained tensors by name.
        optimizer: the optimiser's `state_dict`.
        ranks: of each process, its random generator's and its method's tensors.
        document: the rest, in JSON's types.
    """

    step: int
    parameters: dict[str, Tensor]
    optimizer: dict[str, Any]
    ranks: list[dict[str, Tensor]]
    document: dict[str, Any]


def save_checkpoint(output_dir: Path, checkpoint: Checkpoint, total_limit: int | None = None) -> Path:
    """Writes `checkpoint-STEP` completely or not at all, then removes the oldest beyond `total_limit`.

    Returns:
        The checkpoint's folder.
    """
    tensors, numbers = _split_optimizer(checkpoint.optimizer)
    document = checkpoint.document | {"format": FORMAT, "step": checkpoint.step, "optimizer": numbers}
    files = {
        "parameters.safetensors": tensor_bytes(checkpoint.parameters),
        "state.json": json_bytes(document | {"ranks": len(checkpoint.ranks)}),
    }
    if tensors:
        files["optimizer.safetensors"] = tensor_bytes(tensors)
    for rank, state in enumerate(checkpoint.ranks):
        files[f"rank-{rank}.safetensors"] = tensor_bytes(state)
    folder = output_dir / f"checkpoint-{checkpoint.step:06d}"
    write_folder(folder, files)
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[:-total_limit]:
            shutil.rmtree(old)
    return folder


def load_checkpoint(folder: Path) -> Checkpoint:
    """Reads what `save_checkpoint` wrote.

    Raises:
        AdapterFormatError: if a file is missing, damaged or of another version.
        NonFiniteError: if a trained tensor is not finite.
    """
    document = read_json(_file(folder, "state.json"))
    try:
        version, step, count = document.pop("format"), int(document.pop("step")), int(document.pop("ranks"))
        numbers = document.pop("optimizer")
        groups, scalars, has_tensors = numbers["param_groups"], numbers["state"], numbers["tensors"]
    except (KeyError, TypeError, ValueError) as error:
        raise _damaged(folder, f"state.json without {error}") from error
    if version != FORMAT:
        raise _damaged(folder, f"format {version!r}", expected=f"a checkpoint of format {FORMAT}")
    parameters = read_tensors(_file(folder, "parameters.safetensors")).tensors
    check_weights(str(folder / "parameters.safetensors"), parameters)
    tensors = read_tensors(_file(folder, "optimizer.safetensors")).tensors if has_tensors else {}
    ranks = [read_tensors(_file(folder, f"rank-{rank}.safetensors")).tensors for rank in range(count)]
    optimizer = {"state": _join_state(scalars, tensors), "param_groups": groups}
    return Checkpoint(step, parameters, optimizer, ranks, document)


def restore_parameters(folder: Path, saved: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> None:
    """Copies the saved tensors into the trained ones.

    Raises:
        AdapterMismatchError: if names or shapes differ; nothing is copied then.
    """
    different = sorted(saved.keys() ^ parameters.keys())
    different += [name for name in saved.keys() & parameters.keys() if saved[name].shape != parameters[name].shape]
    if different:
        raise AdapterMismatchError(
            str(folder),
            expected=f"the {len(parameters)} tensors that this run trains",
            found=f"{len(saved)} tensors, different: {different[:5]}",
            fix="Resume with the model and settings that the checkpoint was made with.",
        )
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(saved[name])


def list_checkpoints(output_dir: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    if not output_dir.is_dir():
        return []
    found = [(int(match[1]), entry) for entry in output_dir.iterdir() if (match := _NAME.fullmatch(entry.name))]
    return [entry for _, entry in sorted(found) if entry.is_dir() and locate(entry, "state.json") is not None]


def find_checkpoint(name: str, output_dir: Path | None) -> Path | None:
    """The checkpoint that `resume_from_checkpoint` names; None for "latest" where there is none yet.

    Raises:
        InvalidInputError: if there is no such folder, or "latest" is asked for without an output folder.
    """
    if name == "latest" and output_dir is not None:
        found = list_checkpoints(output_dir)
        if not found:
            logger.warning("No checkpoint in %s: starting a new run.", output_dir)
        return found[-1] if found else None
    folder = Path(name)
    if name != "latest" and not folder.is_dir() and output_dir is not None:
        folder = output_dir / name  # as the diffusers scripts take it: the folder's name alone
    if name == "latest" or not folder.is_dir():
        raise InvalidInputError(
            "resume_from_checkpoint",
            expected='a checkpoint folder, or "latest" with an output folder',
            found=repr(name),
            fix="Correct the path, or pass output_dir.",
        )
    return folder


def _file(folder: Path, name: str) -> Path:
    path = locate(folder, name)
    if path is None:
        raise _damaged(folder, f"no {name}")
    return path


def _damaged(folder: Path, found: str, expected: str = "a complete checkpoint") -> AdapterFormatError:
    return AdapterFormatError(
        str(folder), expected=expected, found=found, fix="Resume from another checkpoint, or start a new run."
    )


def _split_optimizer(state: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """A `state_dict`'s tensors, keyed "index.name", and the rest in JSON's types."""
    tensors: dict[str, Tensor] = {}
    scalars: dict[str, dict[str, Any]] = {}
    for index, values in state["state"].items():
        scalars[str(index)] = {name: value for name, value in values.items() if not isinstance(value, Tensor)}
        tensors |= {f"{index}.{name}": value for name, value in values.items() if isinstance(value, Tensor)}
    groups = [dict(group) for group in state["param_groups"]]
    return tensors, {"state": scalars, "param_groups": groups, "tensors": bool(tensors)}


def _join_state(scalars: Mapping[str, Mapping[str, Any]], tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Any]]:
    joined: dict[int, dict[str, Any]] = {int(index): dict(values) for index, values in scalars.items()}
    for key, tensor in tensors.items():
        index, name = key.split(".", 1)
        joined.setdefault(int(index), {})[name] = tensor
    return joined
