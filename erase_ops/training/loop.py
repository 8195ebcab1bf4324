"""The training loop that every method shares: accelerate, checkpoints, exact resume, progress.

A method gives its trained tensors and its losses; the loop does the rest. All randomness comes from the `Draws` that
the loop hands out: generators on the CPU, which the loop seeds and whose state it saves, so that a run that was cut off
goes on bit for bit as if it had not been.
"""

from __future__ import annotations

import atexit
import logging
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor
from tqdm.auto import tqdm

from expunge.erase_ops.formats.folders import write_folder
from expunge.erase_ops.formats.tensors import json_bytes
from expunge.erase_ops.training.checkpoint import (
    Checkpoint,
    find_checkpoint,
    load_checkpoint,
    restore_parameters,
    save_checkpoint,
)
from expunge.erase_ops.training.config import TrainingConfig
from expunge.erase_ops.training.draws import Draws, seeded_generator
from expunge.erase_ops.training.optim import build_optimizer, build_schedule
from expunge.errors import AdapterMismatchError, InvalidInputError, NonFiniteError

logger = logging.getLogger(__name__)

Callback = Callable[[int, dict[str, float]], None]
_GENERATOR = "random_generator"


class Method(Protocol):
    """What a training method gives the loop."""

    def parameters(self) -> dict[str, Tensor]:
        """The trained tensors by name: float32 leaves that require gradients."""
        ...

    def losses(self, draws: Draws) -> dict[str, Tensor]:
        """Scalars of one batch: "loss" is differentiated, the others are logged. Draws from `draws` alone.

        Without "loss" there is nothing to learn from the batch, in any process; a step of such batches alone leaves
        optimizer and schedule as they are.
        """
        ...

    def state_dict(self) -> dict[str, Tensor]:
        """Tensors besides the trained ones that the next call of `losses` depends on."""
        ...

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        ...


class Constraint(Protocol):
    """What trained tensors have to fulfil after every step."""

    def project_gradients(self) -> None:
        """Takes out of the gradients what would break the constraint; before they are clipped."""
        ...

    def restore(self) -> None:
        """Brings the trained tensors back onto the constraint; after the optimiser has moved them."""
        ...


def make_accelerator(config: TrainingConfig, device: torch.device) -> Accelerator:
    """An Accelerator that trains where the model is.

    Raises:
        InvalidInputError: if this process has already trained with another precision or device kind, which accelerate
            does not let it change.
    """
    try:
        return Accelerator(mixed_precision=config.mixed_precision, cpu=device.type == "cpu")
    except ValueError as error:
        raise InvalidInputError(
            "mixed_precision",
            expected="the precision and kind of device that this process started with",
            found=f"{config.mixed_precision!r} on {device.type} ({error})",
            fix="Train in a new process, or keep the precision and device.",
        ) from error


@dataclass(eq=False)
class TrainingLoop:
    """One run of a method.

    Args:
        method: what is trained.
        config: its settings.
        accelerator: from `make_accelerator`.
        output_dir: where checkpoints and the log of losses go; None writes nothing.
        progress: whether to show a progress bar.
        callback: called after every optimiser step with the number of steps done and the step's losses.
        validate: called with the number of steps done, every `validation_steps`.
        constraint: kept by the trained tensors in every step; None if there is none.
    """

    method: Method
    config: TrainingConfig
    accelerator: Accelerator
    output_dir: Path | None = None
    progress: bool = True
    callback: Callback | None = None
    validate: Callable[[int], object] | None = None
    constraint: Constraint | None = None
    history: list[dict[str, float]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._parameters = self.method.parameters()
        self._generator = seeded_generator(self.config.seed, 1 + self.accelerator.process_index)
        self._optimizer = build_optimizer(self._parameters.values(), self.config)
        self._schedule = build_schedule(self._optimizer, self.config)
        self._prepared = self.accelerator.prepare(self._optimizer)

    def run(self) -> list[dict[str, float]]:
        """Trains to the end.

        Returns:
            For each step its number, losses and learning rate.

        Raises:
            NonFiniteError: if a loss or a trained tensor stops being finite.
            AdapterFormatError: if the checkpoint to resume from is damaged.
            AdapterMismatchError: if it belongs to another model or other settings.
            InvalidInputError: if there is no such checkpoint.
        """
        start = self._resume()
        steps = range(start + 1, self.config.max_train_steps + 1)
        visible = self.progress and self.accelerator.is_main_process
        with tqdm(steps, initial=start, total=steps.stop - 1, desc="training", disable=not visible) as bar:
            for step in bar:
                metrics = self._step(step)
                self.history.append({"step": step, **metrics})
                bar.set_postfix({name: f"{value:.3g}" for name, value in metrics.items()}, refresh=False)
                self._after_step(step, metrics, bar)
        self._check_weights()
        self._write_log()
        if self.accelerator.num_processes > 1:
            atexit.register(_leave_process_group)
        return self.history

    def _step(self, step: int) -> dict[str, float]:
        """One optimiser step; returns the mean losses of its batches over all processes, and the learning rate."""
        batches = self.config.gradient_accumulation_steps
        sums: dict[str, float] = defaultdict(float)
        learnt = False
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        for batch in range(batches):
            draws = Draws(self._generator, self.config.seed, step, batch * processes + rank)
            with self.accelerator.autocast():
                losses = self.method.losses(draws)
            names, values = list(losses), torch.stack([loss.detach().float() for loss in losses.values()])
            for name, value in zip(names, values.tolist(), strict=True):  # the step's one wait for the device
                if not math.isfinite(value):
                    raise NonFiniteError(
                        f"{name} at step {step}",
                        expected="a finite loss",
                        found=str(value),
                        fix="Lower learning_rate, set max_grad_norm, or use mixed_precision='no'.",
                    )
                sums[name] += value / batches
            if "loss" in losses:
                self.accelerator.backward(losses["loss"] / batches)
                learnt = True
        rate = float(self._schedule.get_last_lr()[0])
        if learnt:
            self._update()
        if self.accelerator.num_processes > 1:
            mean = self.accelerator.reduce(torch.tensor(list(sums.values()), device=self.accelerator.device), "mean")
            sums = dict(zip(sums, mean.tolist(), strict=True))
        return {**sums, "learning_rate": rate}

    def _update(self) -> None:
        self._average_gradients()
        if self.constraint is not None:
            self.constraint.project_gradients()
        if self.config.max_grad_norm > 0:
            self.accelerator.clip_grad_norm_(list(self._parameters.values()), self.config.max_grad_norm)
        self._prepared.step()
        if not self._prepared.step_was_skipped:  # fp16's gradient scaler skips a step whose gradients overflowed
            self._schedule.step()
        if self.constraint is not None:
            self.constraint.restore()
        self._prepared.zero_grad()

    def _average_gradients(self) -> None:
        """Trained tensors are no module's parameters, so no DistributedDataParallel averages their gradients."""
        if self.accelerator.num_processes == 1:
            return
        gradients = [parameter.grad for parameter in self._parameters.values() if parameter.grad is not None]
        flat = self.accelerator.reduce(torch.cat([gradient.flatten() for gradient in gradients]), "mean")
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def _after_step(self, step: int, metrics: dict[str, float], bar: Any) -> None:
        config, last = self.config, step == self.config.max_train_steps
        if self.output_dir is not None and config.checkpointing_steps and step % config.checkpointing_steps == 0:
            self._save(step)
        if self.validate is not None and config.validation_steps and (last or step % config.validation_steps == 0):
            bar.set_description("drawing the validation grid")
            self.validate(step)
            bar.set_description("training")
        if self.callback is not None:
            self.callback(step, metrics)

    def _save(self, step: int) -> None:
        own = {_GENERATOR: self._generator.get_state()}
        own |= {f"method.{name}": tensor.detach().cpu() for name, tensor in self.method.state_dict().items()}
        ranks = gather_object([own]) if self.accelerator.num_processes > 1 else [own]
        if not self.accelerator.is_main_process:
            return
        assert self.output_dir is not None
        document: dict[str, Any] = {
            "config": self.config.to_dict(),
            "schedule": self._schedule.state_dict(),
            "scaler": self._scaler.state_dict() if self._scaler is not None else None,
            "history": self.history,
        }
        checkpoint = Checkpoint(step, self._parameters, self._optimizer.state_dict(), ranks, document)
        save_checkpoint(self.output_dir, checkpoint, self.config.checkpoints_total_limit)
        self._write_log()

    @property
    def _scaler(self) -> Any:
        """fp16's gradient scaler; None in other precisions."""
        return self._prepared.scaler

    def _write_log(self) -> None:
        if self.output_dir is not None and self.accelerator.is_main_process:
            write_folder(self.output_dir, {"training_log.json": json_bytes({"steps": self.history})})

    def _resume(self) -> int:
        """Restores the checkpoint that the config names; returns the number of steps done."""
        name = self.config.resume_from_checkpoint
        folder = None if name is None else find_checkpoint(name, self.output_dir)
        if folder is None:
            return 0
        saved = load_checkpoint(folder)
        self._check_settings(folder, saved)
        restore_parameters(folder, saved.parameters, self._parameters)
        self._optimizer.load_state_dict(saved.optimizer)
        self._schedule.load_state_dict(saved.document["schedule"])
        if self._scaler is not None and saved.document["scaler"] is not None:
            self._scaler.load_state_dict(saved.document["scaler"])
        own = dict(saved.ranks[self.accelerator.process_index])
        self._generator.set_state(own.pop(_GENERATOR))
        self.method.load_state_dict({name.removeprefix("method."): tensor for name, tensor in own.items()})
        self.history.extend(saved.document["history"])
        logger.info("Resumed from %s after step %d.", folder, saved.step)
        return saved.step

    def _check_settings(self, folder: Path, saved: Checkpoint) -> None:
        different = self.config.resume_differences(saved.document["config"])
        found = f"different {', '.join(different)}" if different else ""
        if len(saved.ranks) != self.accelerator.num_processes:
            found = f"{len(saved.ranks)} processes"
        if saved.step > self.config.max_train_steps:
            found = f"{saved.step} steps already done"
        if found:
            raise AdapterMismatchError(
                str(folder),
                expected=f"this run's settings, {self.accelerator.num_processes} processes and at most "
                f"{self.config.max_train_steps} steps",
                found=found,
                fix="Resume with the settings of the checkpoint, or start a new run without resume_from_checkpoint.",
            )

    def _check_weights(self) -> None:
        broken = [name for name, tensor in self._parameters.items() if not bool(torch.isfinite(tensor).all())]
        if broken:
            raise NonFiniteError(
                f"trained tensors after step {self.config.max_train_steps}",
                expected="finite values",
                found=f"NaN or infinity in {_some(broken)}",
                fix="Lower learning_rate, set max_grad_norm, or use mixed_precision='no'.",
            )


def _leave_process_group() -> None:
    """Ends the communication between processes while the interpreter still runs.

    Gloo's threads, left to the interpreter's end, now and then abort a process that did all its work
    (https://github.com/pytorch/pytorch/issues/190489). Only after a run that went well: a process that fails must not
    wait here for others that still compute.
    """
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
