"""The objective of SPM training (arXiv 2312.16145, section 3): erasing loss and latent anchoring, as pure functions.

With T the frozen denoiser, S the same denoiser under the adapter, x a partially denoised latent of timestep t, and the
prompts c (target), p (positive, usually c), n (neutral) and a (anchors):

    (1)  y       = T(x, n) - eta (T(x, p) - T(x, n))              what the adapted denoiser should say instead
    (2)  L_erase = mean |S(x, c) - y|^2
    (3)  L_anc   = sum_a w_a mean |S(x, a) - T(x, a)|^2 / sum_a w_a
    (4)  L       = L_erase + lambda L_anc

(1) is linear, so it means the same whether the denoiser predicts noise, velocity or clean latents, as long as all terms
share x and t; the losses are taken in the denoiser's own output space. Everything is float32.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class SPMLoss:
    """The scalars of one step: `total` is differentiable, `erase` and `anchor` are its unweighted parts."""

    total: Tensor
    erase: Tensor
    anchor: Tensor


def erasing_target(neutral: Tensor, positive: Tensor, guidance_scale: Tensor | float) -> Tensor:
    """Eq. (1): what the adapted denoiser should predict for the target prompt.

    Args:
        neutral: `[B, ...]`, the frozen denoiser's output for the neutral prompt.
        positive: `[B, ...]`, its output for the positive prompt.
        guidance_scale: eta, a number or `[B]`.

    Returns:
        `[B, ...]` float32.
    """
    neutral, positive = neutral.float(), positive.float()
    if isinstance(guidance_scale, Tensor):
        guidance_scale = guidance_scale.view(-1, *[1] * (neutral.ndim - 1))  # [B] -> [B, 1, ...]
    return neutral - guidance_scale * (positive - neutral)


def row_errors(prediction: Tensor, target: Tensor) -> Tensor:
    """`[B]` float32: the mean squared error of each row. No gradient flows into `target`."""
    return (prediction.float() - target.detach().float()).square().flatten(1).mean(dim=1)


def erasing_loss(student: Tensor, target: Tensor) -> Tensor:
    """Eq. (2): scalar float32; `student` and `target` are `[B, ...]`."""
    return row_errors(student, target).mean()


def anchoring_loss(student: Tensor, teacher: Tensor, weights: Tensor) -> Tensor:
    """Eq. (3): how far the adapter moves the anchors.

    Args:
        student: `[A, ...]`, the adapted denoiser's output for the anchors.
        teacher: `[A, ...]`, the frozen denoiser's.
        weights: `[A]`, how often each anchor counts; their sum must be positive.

    Returns:
        Scalar float32.
    """
    weights = weights.to(student.device, torch.float32)
    return (row_errors(student, teacher) * weights).sum() / weights.sum()


def spm_loss(
    student: Tensor,
    target: Tensor,
    anchor_student: Tensor,
    anchor_teacher: Tensor,
    anchor_row_weights: Tensor,
    anchor_weight: Tensor | float,
) -> SPMLoss:
    """Eq. (4).

    Args:
        student: `[B, ...]`, the adapted denoiser's output for the target prompts.
        target: `[B, ...]`, eq. (1).
        anchor_student: `[A, ...]`; A = 0 leaves anchoring out.
        anchor_teacher: `[A, ...]`.
        anchor_row_weights: `[A]`, see `anchoring_loss`.
        anchor_weight: lambda, a number or `[B]` (its mean counts: the rows stand for draws of the same expectation).
    """
    erase = erasing_loss(student, target)
    if len(anchor_student) == 0:
        return SPMLoss(erase, erase.detach(), torch.zeros_like(erase.detach()))
    anchor = anchoring_loss(anchor_student, anchor_teacher, anchor_row_weights)
    weight = anchor_weight.float().mean() if isinstance(anchor_weight, Tensor) else anchor_weight
    return SPMLoss(erase + weight * anchor, erase.detach(), anchor.detach())
