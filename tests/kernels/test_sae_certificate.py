"""sae_certificate: its bound is one, it proves nothing false, and it proves what is clear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.errors import InvalidInputError
from expunge.kernels.sae_certificate import sae_certificate
from expunge.kernels.sae_rank_count import sae_rank_count

Make = Callable[..., Any]


@given(
    k=st.integers(1, 12),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    whole=st.booleans(),
    seed=st.integers(0, 999),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_nothing_false_is_proved(make_sae: Make, k: int, dtype: torch.dtype, whole: bool, seed: int) -> None:
    sae = make_sae(9, 120, 6, dtype=dtype, whole=whole, seed=seed)
    shuffled = torch.randperm(120, generator=torch.Generator().manual_seed(seed))
    features, hot = shuffled[:10], shuffled[5:70]  # some of the hot ones are erased
    bound, certified = sae_certificate(sae.x, sae.w_enc, features, hot, k, **sae.biases)
    assert (bound.double() <= sae.scores.topk(k).values[:, -1]).all()
    acts, _ = sae_rank_count(sae.x, sae.w_enc, features, k, **sae.biases)
    assert not (certified & (acts > 0).any(1)).any()
    sharp, _ = sae_rank_count(sae.x, sae.w_enc, features, k, bound=bound, **sae.biases)
    assert torch.equal(sharp, acts)


def test_what_is_clear_is_proved() -> None:
    w_enc = torch.tensor([[1.0, 0, 0], [2, 0, 0], [3, 0, 0], [-1, 0, 0]])
    x = torch.tensor([[1.0, 5.0, 5.0], [-1.0, 5.0, 5.0]])
    features, hot = torch.tensor([0]), torch.tensor([1, 2])
    bound, certified = sae_certificate(x.view(2, 1, 3), w_enc, features, hot, 2)
    assert certified.tolist() == [[True], [True]] and bound.shape == (2, 1)
    assert 1.99 < bound[0] < 2  # the second best, less a margin
    # Ids that are erased prove nothing, though they are given as hot.
    _, certified = sae_certificate(x, w_enc, features, torch.tensor([0, 1, 2]), 3)
    assert certified.tolist() == [False, True]


def test_a_token_with_nan_is_not_certified(make_sae: Make) -> None:
    sae = make_sae(3, 80, 4)
    sae.x[1, 0] = torch.nan
    bound, certified = sae_certificate(sae.x, sae.w_enc, torch.tensor([3]), torch.arange(10, 60), 2)
    assert not certified[1] and not bound.isnan().any()


def test_no_tokens(make_sae: Make) -> None:
    sae = make_sae(3, 80, 4)
    bound, certified = sae_certificate(sae.x[:0], sae.w_enc, torch.tensor([3]), torch.arange(10, 60), 2)
    assert bound.shape == certified.shape == (0,)


BAD: dict[str, dict[str, Any]] = {
    "few hot features": {"hot": torch.tensor([1, 2])},
    "hot features twice": {"hot": torch.tensor([1, 2, 2, 3])},
    "ids beyond": {"features": torch.tensor([40])},
    "width": {"x": torch.ones(2, 5)},
    "k": {"k": 0},
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_does_not_fit(name: str) -> None:
    good = {"x": torch.ones(2, 4), "w_enc": torch.ones(40, 4), "features": torch.tensor([1]), "hot": torch.arange(9)}
    with pytest.raises(InvalidInputError, match="sae_certificate"):
        sae_certificate(**(good | {"k": 3} | BAD[name]))
