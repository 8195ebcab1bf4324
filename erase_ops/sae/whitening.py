"""Hidden states made equally wide in every direction while an autoencoder learns, and undone in its weights.

Formula, with mean m and covariance C = V diag(e) Vᵀ of a sample of tokens:

    z = (x - m) A              A = V diag(e + s)^(-1/2) Vᵀ, symmetric; s = `SHRINKAGE` times the mean of e
    W_enc = W_encᶻ A           W_dec = W_decᶻ A⁻¹           b_dec = m + b_decᶻ A⁻¹           b_enc = b_encᶻ

The autoencoder of z with the weights marked ᶻ, and the one of x with the others, choose the same features with the same
activations, and x̂ = m + ẑ A⁻¹. What is minimised is the error of z: a few directions of large variance (a position, the
end of the text) no longer outweigh the many small ones that tell words apart. Decoder rows have unit norm in z alone.

Shapes: x, z [*, d]; A [d, d]; W_enc, W_dec [h, d].
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.erase_ops.sae.model import SparseAutoencoder

SHRINKAGE = 1e-3


@dataclass(frozen=True, eq=False)
class Whitening:
    """The change of coordinates between hidden states and what an autoencoder is trained on.

    Args:
        mean: m `[d]`, float32.
        matrix: A `[d, d]`, float32.
        inverse: its inverse `[d, d]`, float32.
    """

    mean: Tensor
    matrix: Tensor
    inverse: Tensor

    @classmethod
    def of(cls, sample: Tensor) -> Whitening:
        """The whitening of a sample of tokens `[T, d]`, whose statistics are taken in float64."""
        x = sample.double()
        mean = x.mean(0)
        values, vectors = torch.linalg.eigh((x - mean).T @ (x - mean) / len(x))
        spread = values.clamp(min=0) + SHRINKAGE * values.mean()  # [d]
        matrix, inverse = ((vectors * spread**power) @ vectors.T for power in (-0.5, 0.5))
        return cls(mean.float(), matrix.float(), inverse.float())

    def apply(self, x: Tensor) -> Tensor:
        """z of x `[*, d]`."""
        return (x - self.mean) @ self.matrix

    @torch.no_grad()
    def fold(self, sae: SparseAutoencoder) -> SparseAutoencoder:
        """The autoencoder of x that an autoencoder of z, which subtracts b_dec from its input, is."""
        tensors = {
            "W_enc": sae.W_enc @ self.matrix,
            "b_enc": sae.b_enc.clone(),
            "W_dec": sae.W_dec @ self.inverse,
            "b_dec": self.mean + sae.b_dec @ self.inverse,
        }
        return SparseAutoencoder(sae.config, tensors, firing=sae.firing)
