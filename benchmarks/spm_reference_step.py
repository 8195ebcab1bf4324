"""The losses of an SPM training step with every forward that the reference implementation makes.

The reference predicts through classifier-free guidance at scale 1: each call runs a negative half whose output is
thrown away. It asks for the positive and the neutral prompt in separate calls, and lays out twice as many anchors as
the guidance returns. The losses are those of Expunge's own step (a test holds both to the same values and gradients),
so that only the work differs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.erase_ops.spm.anchors import Anchors
from expunge.erase_ops.spm.objective import erasing_target, spm_loss
from expunge.erase_ops.spm.states import TrainingState
from expunge.erase_ops.spm.training import SPMTraining
from expunge.erase_ops.training.families import Conditioning


class ReferenceStep:
    """Stands in for a method's `losses_at`.

    Args:
        method: the method whose states, anchors and weights are used.
    """

    def __init__(self, method: SPMTraining) -> None:
        self.method = method

    def losses(self, generator: torch.Generator) -> dict[str, Tensor]:
        """As `SPMTraining.losses`, with the reference's forwards."""
        state = self.method.draw_state(generator)
        return self.losses_at(state, self.method.anchors.draw(state.pairs, generator))

    def losses_at(self, state: TrainingState, anchors: Anchors) -> dict[str, Tensor]:
        """As `SPMTraining.losses_at`, with the reference's forwards."""
        text, pairs = self.method.text, state.pairs
        negatives = text.negatives.rows(pairs)
        with torch.no_grad():
            positive = self._guided(0.0, state, Conditioning.cat([negatives, text.positives.rows(pairs)]))
            neutral = self._guided(0.0, state, Conditioning.cat([negatives, text.neutrals.rows(pairs)]))
        student = self._guided(1.0, state, Conditioning.cat([negatives, text.targets.rows(pairs)]))
        # Every anchor as often as it counts, behind as many that guidance will throw away.
        repeated = torch.arange(len(anchors.weights)).repeat_interleave(anchors.weights.long())
        conditioning = anchors.conditioning.rows(repeated)
        conditioning = Conditioning.cat([conditioning, conditioning])
        anchor_state = state.rows(anchors.state_rows[repeated])
        anchor_student = self._guided(1.0, anchor_state, conditioning)
        with torch.no_grad():
            anchor_teacher = self._guided(0.0, anchor_state, conditioning)
        loss = spm_loss(
            student,
            erasing_target(neutral, positive, self.method.guidance_scales[pairs].to(student.device)),
            anchor_student,
            anchor_teacher,
            torch.ones(len(repeated)),
            self.method.anchor_weights[pairs],
        )
        return {"loss": loss.total, "erase": loss.erase, "anchor": loss.anchor}

    def _guided(self, gate: float, state: TrainingState, conditioning: Conditioning) -> Tensor:
        """Guidance at scale 1: rows [negative, positive] in, the positive half out."""
        latents, timesteps = torch.cat([state.latents] * 2), torch.cat([state.timesteps] * 2)
        with self.method.attachment.force(gate):
            output = self.method.family.predict(latents, timesteps, conditioning, state.size)
        negative, positive = output.chunk(2)  # [2B, C, h, w] -> two of [B, C, h, w]
        return negative + 1.0 * (positive - negative)
