"""Whitening: states of equal variance in, and an autoencoder of the states as they were out."""

from __future__ import annotations

import torch

from expunge.erase_ops.sae.config import SAEConfig
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.erase_ops.sae.whitening import Whitening


def states(count: int = 4000, d: int = 12) -> torch.Tensor:
    """Tokens whose directions differ in variance by six orders of magnitude."""
    generator = torch.Generator().manual_seed(0)
    turn = torch.linalg.qr(torch.randn(d, d, generator=generator)).Q
    return torch.randn(count, d, generator=generator) * torch.logspace(-1, 2, d) @ turn + 5


def test_every_direction_that_is_not_tiny_has_variance_one() -> None:
    x = states()
    z = Whitening.of(x).apply(x)
    torch.testing.assert_close(z.mean(0), torch.zeros(12), atol=1e-3, rtol=0)
    variances = torch.linalg.eigvalsh(torch.cov(z.T))
    # A direction of variance e comes out at e / (e + s): small ones shrink instead of blowing their noise up.
    e = torch.linalg.eigvalsh(torch.cov(x.double().T))
    torch.testing.assert_close(variances.double(), e / (e + 1e-3 * e.mean()), atol=2e-3, rtol=0)


def test_the_folded_autoencoder_is_the_same_one() -> None:
    x, generator = states(200), torch.Generator().manual_seed(1)
    whitening = Whitening.of(states())
    config = SAEConfig(d_in=12, width=40, k=4)
    of_z = SparseAutoencoder.random(config, generator, torch.randn(12, generator=generator))
    of_z.b_enc.copy_(0.1 * torch.randn(40, generator=generator))
    of_x = whitening.fold(of_z)
    values, ids = of_z.encode(whitening.apply(x))
    again, same = of_x.encode(x)
    assert torch.equal(ids, same)
    torch.testing.assert_close(again, values, atol=1e-3, rtol=1e-4)
    expected = whitening.mean + of_z.decode(values, ids) @ whitening.inverse
    torch.testing.assert_close(of_x.decode(again, same), expected, atol=1e-2, rtol=1e-4)
