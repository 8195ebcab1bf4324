"""What the trainer promises, measured: the teacher's memory, spread samples, and runs that are killed and go on."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.erase_ops.training.loop import Callback
from expunge.erase_ops.training.student import ParameterStudent

SCRIPT = Path(__file__).with_name("train_spread.py")


def live_bytes() -> int:
    """Bytes of all tensors that are alive, each storage counted once."""
    gc.collect()
    storages = {}
    for item in gc.get_objects():
        if issubclass(type(item), Tensor):  # isinstance would wake lazy objects
            storage = item.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def teacher_bytes(module: nn.Module, selection: str, forward: Callable[[], Tensor]) -> tuple[int, int]:
    """Bytes alive beyond the plain module's once a student stands in it and the teacher has answered; the trained ones.

    Args:
        module: what is trained.
        selection: which of its parameters.
        forward: a forward of it.
    """
    before = live_bytes()
    with ParameterStudent.of(module, selection).installed() as student:
        with torch.no_grad(), student.teacher():
            output = forward()
        trained = sum(parameter.nbytes for parameter in student.parameters().values())
        return live_bytes() - before - output.nbytes, trained


def train_apart(
    model: Path, method: str, folder: Path, *, processes: int = 1, accumulation: int = 1, kill: int | None = None
) -> dict[str, Tensor] | None:
    """Trains in processes of their own (`train_spread.py`), and gives weights and gradients; None for a killed run.

    Args:
        model: folder of a pipeline.
        method: its name in `METHODS`.
        folder: where checkpoints are kept; a run goes on from the last one there.
        processes: how many share a step's samples.
        accumulation: batches that each of them accumulates.
        kill: the step after which the process is killed.
    """
    folder.mkdir(parents=True, exist_ok=True)
    target = folder / "trained.safetensors"
    launcher = [] if processes == 1 else ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, "-P", *launcher, str(SCRIPT), str(model), method, str(target), "--folder", str(folder)]
    command += ["--accumulation", str(accumulation), *([] if kill is None else ["--kill", str(kill)])]
    done = subprocess.run(command, timeout=900, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=kill is None)
    if kill is not None and done.returncode == 0:
        raise AssertionError(f"the run was to be killed after step {kill}, and ended by itself")
    return None if kill is not None else load_file(target)


def spread_gaps(
    model: Path, method: str, spreads: Iterable[tuple[int, int]], folder: Path
) -> list[tuple[float, float]]:
    """Of runs with (processes, accumulated batches): how far their gradients and weights are from those of one process
    with one batch, each over the norm of what it is compared with; the gradients' worst step counts."""
    one = train_apart(model, method, folder / "one")
    assert one is not None
    steps = [name for name in one if name.startswith("gradient ")]
    weights = [name for name in one if name not in steps]
    gaps = []
    for processes, accumulation in spreads:
        place = folder / f"{processes}-{accumulation}"
        other = train_apart(model, method, place, processes=processes, accumulation=accumulation)
        assert other is not None and other.keys() == one.keys()
        gaps.append((max(_away(one, other, [step]) for step in steps), _away(one, other, weights)))
    return gaps


def _away(one: Mapping[str, Tensor], other: Mapping[str, Tensor], names: Sequence[str]) -> float:
    """|one - other| / |one| over the named tensors."""
    whole, away = (
        torch.cat([tensor.flatten().double() for tensor in tensors])
        for tensors in ([one[name] for name in names], [other[name].double() - one[name].double() for name in names])
    )
    assert float(whole.norm()) > 0
    return float(away.norm() / whole.norm())


class Killed(BaseException):
    """What no code that trains catches."""


def differing(
    run: Callable[[Path | None, Callback | None], Mapping[str, Tensor]], stops: Sequence[int], folder: Path
) -> list[int]:
    """The steps after which a run that is cut off and goes on ends with other weights than an undisturbed one.

    Args:
        run: trains, with a callback, and gives the weights; with a folder it keeps a checkpoint of every step there and
            goes on from the last.
        stops: the steps.
        folder: for checkpoints.
    """
    whole, found = run(None, None), []
    for stop in stops:

        def kill(step: int, metrics: dict[str, float], stop: int = stop) -> None:
            if step == stop:
                raise Killed

        with suppress(Killed):
            run(folder / f"stopped-{stop}", kill)
            raise AssertionError(f"the run was not cut off after step {stop}")
        resumed = run(folder / f"stopped-{stop}", None)
        same = whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)
        found += [] if same else [stop]
    return found
