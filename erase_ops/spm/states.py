"""Training states of SPM: latents from a partial denoising of the target prompts under the adapter being trained.

The SPM reference takes one state from each rollout and labels it with another grid's timestep, 33 to 42 steps too noisy
at its T = 30. Here a state after k steps carries the timestep that it is at, and one rollout may give several states:
each row's are taken after its own, distinct numbers of steps.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from expunge.erase_ops.spm.config import SPMTrainingConfig
from expunge.erase_ops.training.families import Conditioning, StableDiffusion
from expunge.erase_ops.training.sampling import NoiseGrid, partial_rollout

Predict = Callable[[Tensor, Tensor, Conditioning, Tensor | None], Tensor]


@dataclass(frozen=True, eq=False)
class TrainingState:
    """What one step trains on.

    Args:
        latents: `[B, C, h, w]` float32.
        timesteps: `[B]` int64, the timestep that each row is at.
        pairs: `[B]` int64 on the CPU, the prompt pair of each row.
        size: the family's size conditioning; None where it has none.
    """

    latents: Tensor
    timesteps: Tensor
    pairs: Tensor
    size: Tensor | None

    def rows(self, index: Tensor) -> TrainingState:
        """The rows `index` (int64 on the CPU), in that order."""
        on_device = index.to(self.latents.device)
        return TrainingState(self.latents[on_device], self.timesteps[on_device], self.pairs[index], self.size)


def guided_prediction(predict: Predict, guidance_scale: float) -> Predict:
    """Classifier-free guidance around `predict`, which is called once with the rows [negative, positive].

    Args:
        predict: `(latents, timesteps, conditioning, size) -> output`.
        guidance_scale: g in negative + g (positive - negative). At 1 the negative half is not computed.

    Returns:
        A function of the same arguments whose conditioning holds 2 B rows, the negative ones first.
    """

    def guided(latents: Tensor, timesteps: Tensor, conditioning: Conditioning, size: Tensor | None) -> Tensor:
        rows = len(latents)
        if guidance_scale == 1:
            return predict(latents, timesteps, conditioning.rows(range(rows, 2 * rows)), size)
        output = predict(torch.cat([latents] * 2), torch.cat([timesteps] * 2), conditioning, size)
        negative, positive = output.chunk(2)  # [2B, C, h, w] -> two of [B, C, h, w]
        return negative + guidance_scale * (positive - negative)

    return guided


def draw_stops(rows: int, states: int, fewest: int, grid_steps: int, generator: torch.Generator) -> Tensor:
    """`[rows, states]` int64: for each row distinct numbers of denoising steps in fewest..grid_steps-1, shuffled."""
    choices = grid_steps - fewest
    return torch.stack([torch.randperm(choices, generator=generator)[:states] for _ in range(rows)]) + fewest


def draw_resolution(resolution: int, dynamic: bool, generator: torch.Generator) -> int:
    """The side in pixels of a rollout's images: `resolution`, or a multiple of 64 from half of it up to it."""
    if not dynamic:
        return resolution
    lowest, highest = -(-resolution // 128), resolution // 64
    return 64 * int(torch.randint(lowest, highest + 1, (), generator=generator))


@dataclass(eq=False)
class StateSampler:
    """Gives one training state for each step and makes a new rollout when the last one is used up.

    Args:
        family: the model.
        grid: the timesteps of the rollout.
        targets: conditioning of the pairs' targets, one row a pair.
        unconditional: conditioning of the pairs' negative prompts, one row a pair.
        predict: the denoiser under the adapter; rows [negative, positive] or positive rows only.
        config: the training settings.
    """

    family: StableDiffusion
    grid: NoiseGrid
    targets: Conditioning
    unconditional: Conditioning
    predict: Predict
    config: SPMTrainingConfig
    _pending: list[TrainingState] = field(default_factory=list)

    def draw(self, generator: torch.Generator) -> TrainingState:
        """The next state."""
        if not self._pending:
            self._pending = self._roll_out(generator)
        return self._pending.pop(0)

    def _roll_out(self, generator: torch.Generator) -> list[TrainingState]:
        config = self.config
        resolution = draw_resolution(
            config.resolution or self.family.native_resolution, config.dynamic_resolution, generator
        )
        size = self.family.image_size(resolution, generator, dynamic_crops=config.dynamic_crops)
        pairs = torch.randint(len(self.targets), (config.batch_size,), generator=generator)
        stops = draw_stops(
            config.batch_size, config.states_per_rollout, config.min_denoising_steps, len(self.grid), generator
        )
        shape = (config.batch_size, *self.family.latent_shape(resolution))
        noise = torch.randn(shape, generator=generator).to(self.family.device)
        guided = guided_prediction(self.predict, config.rollout_guidance_scale)

        def predict(latents: Tensor, timesteps: Tensor, rows: Tensor) -> Tensor:
            chosen = pairs[rows]
            both = Conditioning.cat([self.unconditional.rows(chosen), self.targets.rows(chosen)])
            return guided(latents, timesteps, both, size)

        states = partial_rollout(predict, self.grid, noise, stops)  # [B, S, C, h, w]
        timesteps = self.grid.timesteps[stops].to(noise.device)  # [B, S]
        return [
            TrainingState(states[:, slot], timesteps[:, slot], pairs, size) for slot in range(config.states_per_rollout)
        ]

    def state_dict(self) -> dict[str, Tensor]:
        """The states that are still to be given out; empty when there are none."""
        if not self._pending:
            return {}
        first = self._pending[0]
        tensors = {
            "latents": torch.stack([state.latents for state in self._pending]),  # [S, B, C, h, w]
            "timesteps": torch.stack([state.timesteps for state in self._pending]),  # [S, B]
            "pairs": first.pairs,  # [B], the same for all states of a rollout
        }
        return tensors if first.size is None else tensors | {"size": first.size}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        device = self.family.device
        self._pending = [
            TrainingState(latents.to(device), timesteps.to(device), tensors["pairs"], tensors.get("size"))
            for latents, timesteps in zip(tensors.get("latents", ()), tensors.get("timesteps", ()), strict=True)
        ]
