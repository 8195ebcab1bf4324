"""The method that the training loop runs: one window of one rollout is one step.

A rollout draws a picture for a pair, and for some retain prompts, from the frozen model. Its windows are then learnt
from in order: the student sees the prompt and all tokens before, so that a gradient goes through the whole prefix, and
the teacher the same tokens. Model calls for a picture of T tokens and K windows: T to draw it, then for each window one
of the student and two of the teacher (one each more with retain prompts); the published scripts make 4 T.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from expunge.erase_ops.ear.config import EARConfig
from expunge.erase_ops.ear.objective import Gate, Teacher, WindowLoss, erase_loss, group_losses, quantile, retain_loss
from expunge.erase_ops.ear.streams import (
    STREAMS,
    EncodedPairs,
    Rollout,
    draw_rollout,
    window_states,
    with_unconditional,
)
from expunge.erase_ops.janus.family import JanusFamily
from expunge.erase_ops.training.draws import Draws, seeded_generator
from expunge.erase_ops.training.student import Student


class EARTraining:
    """See the module's docstring.

    Args:
        family: the model.
        student: its trained weights.
        text: the encoded prompts.
        config: the settings.
    """

    def __init__(self, family: JanusFamily, student: Student, text: EncodedPairs, config: EARConfig) -> None:
        self.family, self.student, self.text, self.config = family, student, text, config
        self.windows = config.windows(family.image_tokens)
        self.begun = 0  # pairs that rollouts have been begun for
        self.rollout: Rollout | None = None
        self.left_out = left_out(config.random_skip, config.steps(family.image_tokens), config.seed)

    def parameters(self) -> dict[str, Tensor]:
        """The student's."""
        return self.student.parameters()

    def losses(self, draws: Draws) -> dict[str, Tensor]:
        """The losses of the next window: "loss", its parts "erase" and "retain", and the share that was "kept".

        A window that is skipped has no "loss": the loop then leaves the optimizer alone.
        """
        generator = draws.stream
        if self.rollout is None or self.rollout.window == self.windows:
            self.rollout = self._next_rollout(generator)
        rollout, config = self.rollout, self.config
        start = rollout.window * config.window
        stop = min(start + config.window, self.family.image_tokens)
        rollout.window += 1
        erase = self.erase_window(rollout, start, stop)
        named = {"erase": erase.loss, "kept": torch.tensor(erase.kept)}
        total = erase.loss
        if len(rollout.retained):
            named["retain"] = self._retain_window(rollout, start, stop)
            total = total + config.retain_weight * named["retain"]
        skipped = erase.kept == 0 or bool(self.left_out[self._number(rollout)])
        named["skipped"] = torch.tensor(float(skipped))
        return named if skipped else {"loss": total, **named}

    def erase_window(self, rollout: Rollout, start: int, stop: int) -> WindowLoss:
        """The erasing loss of the image tokens `start` to `stop - 1`."""
        config = self.config
        teacher = self._teacher(rollout, start, stop)
        with self.student.student():
            student = self._states(rollout, "positive", start, stop)
        gate = Gate(config.granularity, rollout.threshold)
        return erase_loss(self.family, student, teacher, config.eta, gate, config.space)

    def _retain_window(self, rollout: Rollout, start: int, stop: int) -> Tensor:
        assert self.text.retain is not None
        prompts, tokens = self.text.retain.rows(rollout.retained), rollout.tokens["retain"]
        arguments = (self.family, prompts, tokens, start, stop, self.config.prefix_mode)
        with torch.no_grad(), self.student.teacher():
            teacher = window_states(*arguments)
        with self.student.student():
            student = window_states(*arguments)
        return retain_loss(self.family, student, teacher, self.config.space)

    def _teacher(self, rollout: Rollout, start: int, stop: int) -> Teacher:
        with torch.no_grad(), self.student.teacher():
            states = {name: self._states(rollout, name, start, stop) for name in STREAMS[: 2 if self._aligned else 3]}
        return Teacher(states["target"], states["positive"], states.get("neutral", states["target"]))

    @property
    def _aligned(self) -> bool:
        return self.config.prefix_mode == "aligned"

    def _states(self, rollout: Rollout, stream: str, start: int, stop: int) -> Tensor:
        """`[2 B, stop - start, D]`: a stream's pictures, then their unconditional rows."""
        originals = self.text.originals.rows(rollout.pairs)
        prompts = originals if stream == "positive" else self.text.modified.rows(rollout.pairs)
        # The unconditional rows see the tokens of c+ in every stream, as their target is the model itself.
        tokens = torch.cat([rollout.tokens[stream], rollout.tokens["positive"]])
        rows = with_unconditional(self.family, prompts, originals)
        return window_states(self.family, rows, tokens, start, stop, self.config.prefix_mode)

    def _number(self, rollout: Rollout) -> int:
        """Of the window that was begun last, counted from 0 over the whole training."""
        begun = math.ceil(self.begun / self.config.batch_size) - 1
        return (begun * self.windows + rollout.window - 1) % len(self.left_out)

    # Rollouts

    def _next_rollout(self, generator: torch.Generator) -> Rollout:
        config, count = self.config, len(self.text.originals)
        pairs = torch.arange(self.begun, self.begun + config.batch_size) % count
        self.begun += config.batch_size
        retained = torch.zeros(0, dtype=torch.int64)
        if config.retain and config.retain_weight:
            retained = torch.randint(len(config.retain), (config.retain_per_rollout,), generator=generator)
        with self.student.teacher():
            rollout = draw_rollout(
                self.family, self.text, pairs, retained, config.prefix_mode, config.sampling, generator
            )
        rollout.threshold = self._threshold(rollout)
        return rollout

    def _threshold(self, rollout: Rollout) -> float:
        """The configured one, or the quantile of what the student has still to learn from this rollout."""
        config = self.config
        if config.threshold_quantile is None:
            return config.threshold
        whole = (0, self.family.image_tokens)
        with torch.no_grad():
            teacher = self._teacher(rollout, *whole)
            with self.student.student():
                student = self._states(rollout, "positive", *whole)
            arguments = (self.family, student, teacher, config.eta, config.granularity, config.space, config.window)
            return quantile(group_losses(*arguments), config.threshold_quantile)

    # Checkpoints

    def state_dict(self) -> dict[str, Tensor]:
        """The rollout that windows are still to be taken of."""
        tensors = {"begun": torch.tensor(self.begun)}
        if self.rollout is None:
            return tensors
        rollout = self.rollout
        tensors |= {f"tokens.{name}": tokens for name, tokens in rollout.tokens.items()}
        return tensors | {
            "pairs": rollout.pairs,
            "retained": rollout.retained,
            "window": torch.tensor(rollout.window),
            "threshold": torch.tensor(rollout.threshold, dtype=torch.float64),
        }

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.begun = int(tensors["begun"])
        if "pairs" not in tensors:
            return
        tokens = {
            name.removeprefix("tokens."): value.to(self.family.device)
            for name, value in tensors.items()
            if name.startswith("tokens.")
        }
        self.rollout = Rollout(
            tensors["pairs"], tensors["retained"], tokens, float(tensors["threshold"]), int(tensors["window"])
        )


def left_out(share: float, steps: int, seed: int) -> Tensor:
    """`[steps]` bool: the windows that are skipped whatever they cost, exactly `share` of them, rounded."""
    skipped = torch.zeros(steps, dtype=torch.bool)
    skipped[torch.randperm(steps, generator=seeded_generator(seed, 0, 1))[: round(share * steps)]] = True
    return skipped
