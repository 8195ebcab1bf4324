"""sae_rank_count against a sort of all scores, on both paths: membership, counts, ties, bounds, gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expunge.errors import InvalidInputError
from expunge.kernels.sae_rank_count import sae_rank_count, sae_rank_count_reference
from expunge.kernels.sae_topk import sae_topk
from expunge.kernels.testing.compare import assert_close
from expunge.kernels.testing.recorder import Recorder

Make = Callable[..., Any]
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(17, 131, 40, 9, 20), (2, 70, 33, 33, 70), (1, 1, 1, 1, 1)], ids=str)
def test_what_topk_finds(make_sae: Make, path: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    sae, k = make_sae(*shape[:3], dtype=dtype), shape[3]
    features = torch.randperm(shape[1])[: shape[4]]
    acts, counts = sae_rank_count(sae.x, sae.w_enc, features, k, **sae.biases)
    scores = sae.scores
    values, indices = scores.topk(k)
    dense = torch.zeros_like(scores).scatter_(1, indices, values.relu())
    assert acts.dtype == torch.float32 and counts.dtype == torch.int32
    assert_close("acts", acts, dense[:, features])
    rank = (-scores).argsort(1).argsort(1)[:, features]
    assert torch.equal(counts, torch.where(scores[:, features] > 0, rank.clamp(max=k), k).int())


@given(
    tokens=st.integers(1, 4),
    features=st.integers(1, 90),
    erased=st.integers(1, 90),
    k=st.integers(1, 90),
    seed=st.integers(0, 99),
    triton=st.booleans(),
)
@settings(max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_ties_go_to_the_smaller_id(
    make_sae: Make,
    monkeypatch: pytest.MonkeyPatch,
    tokens: int,
    features: int,
    erased: int,
    k: int,
    seed: int,
    triton: bool,
) -> None:
    monkeypatch.setenv("EXPUNGE_KERNELS", "triton" if triton else "torch")
    k = min(k, features)
    sae = make_sae(tokens, features, 3, whole=True, seed=seed)
    chosen = torch.randperm(features, generator=torch.Generator().manual_seed(seed))[:erased]
    acts, counts = sae_rank_count(sae.x, sae.w_enc, chosen, k, **sae.biases)
    for token, row in enumerate(sae.scores.tolist()):
        order = sorted(range(features), key=lambda i, row=row: (-row[i], i))  # type: ignore[misc]
        for slot, feature in enumerate(chosen.tolist()):
            rank = min(order.index(feature), k) if row[feature] > 0 else k
            assert counts[token, slot] == rank
            assert acts[token, slot] == (row[feature] if rank < k else 0)
    wanted = sae_rank_count_reference(sae.x, sae.w_enc, chosen, k, sae.b_enc, sae.b_pre)
    assert torch.equal(acts, wanted[0]) and torch.equal(counts, wanted[1])


def test_many_tiles_and_tokens(make_sae: Make) -> None:
    sae = make_sae(530, 7001, 8, whole=True)
    features = torch.randperm(7001)[:300]
    acts, counts = sae_rank_count(sae.x, sae.w_enc, features, 60, **sae.biases)
    values, indices = sae_topk(sae.x, sae.w_enc, 60, **sae.biases)
    dense = torch.zeros(530, 7001).scatter_(1, indices, values)
    assert torch.equal(acts, dense[:, features]) and (acts != 0).sum() > 1000
    rank = torch.full((530, 7001), 60).scatter_(1, indices, torch.arange(60).expand(530, 60))
    assert torch.equal(counts, torch.where(acts > 0, rank[:, features], 60).int())


def test_a_probe_of_the_first_features_changes_nothing(
    make_sae: Make, triton_path: None, monkeypatch: pytest.MonkeyPatch, counts: Any
) -> None:
    monkeypatch.setattr("expunge.kernels.gpu.sae_rank_count.PROBE", 16)
    sae = make_sae(5, 300, 8, whole=True)
    features = torch.randperm(300)[:60]
    found = sae_rank_count(sae.x, sae.w_enc, features, 4, **sae.biases)
    wanted = sae_rank_count_reference(sae.x, sae.w_enc, features, 4, sae.b_enc, sae.b_pre)
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    if counts is not None:
        assert counts.launches == ["sae_score_kernel"] * 2 + ["sae_rank_count_kernel"]


def test_a_bound_leaves_out_what_is_below_it(make_sae: Make, path: str) -> None:
    sae = make_sae(8, 200, 8)
    features = torch.randperm(200)[:50]
    acts, counts = sae_rank_count(sae.x, sae.w_enc, features, 10, **sae.biases)
    bound = sae.scores.topk(10).values[:, -1].float() - 1e-3  # true: nothing changes
    sharp = sae_rank_count(sae.x, sae.w_enc, features, 10, bound=bound, **sae.biases)
    assert torch.equal(sharp[0], acts) and torch.equal(sharp[1] < 10, counts < 10)
    bound[::2] = torch.inf
    none = sae_rank_count(sae.x, sae.w_enc, features, 10, bound=bound, **sae.biases)
    assert (none[0][::2] == 0).all() and (none[1][::2] == 10).all()
    assert torch.equal(none[0][1::2], acts[1::2])


def test_tokens_without_candidates_read_nothing_of_the_encoder(make_sae: Make, triton_path: None, counts: Any) -> None:
    sae = make_sae(16, 320, 8)
    bound = torch.full((16,), torch.inf)
    acts, _ = sae_rank_count(sae.x, sae.w_enc, torch.tensor([3]), 4, bound=bound, **sae.biases)
    assert (acts == 0).all()
    if counts is not None:  # only the scores of the one feature: its tile's dot
        assert counts.read_asked < sae.w_enc.nbytes


def test_bytes_are_those_of_the_formula(
    make_sae: Make, triton_path: None, monkeypatch: pytest.MonkeyPatch, counts: Any
) -> None:
    from expunge.kernels.gpu.sae_rank_count import rank_count_bytes

    if counts is None:
        pytest.skip("bytes are counted by the interpreter's guard")
    monkeypatch.setattr("expunge.kernels.gpu.sae_rank_count.PROBE", 16)
    sae = make_sae(20, 300, 40, dtype=torch.float16)
    features = torch.arange(100, 130)
    sae_rank_count(sae.x, sae.w_enc, features, 4, b_enc=sae.b_enc)
    own = sae.x.double() @ sae.w_enc.double().mT + sae.b_enc.double()
    floor = own[:, :16].topk(4).values[:, -1:]
    candidates = int((own[:, features] >= floor).logical_and(own[:, features] > 0).sum(1).clamp(max=4).sum())
    given = {"probe": 16, "tile": {"BT": 16, "BN": 32}, "item": 2}
    asked, least = rank_count_bytes(20, 300, 40, 30, candidates, **given)
    unbeaten, _ = rank_count_bytes(20, 300, 40, 30, 0, **given)
    assert unbeaten + 10 * 8 * candidates <= counts.asked <= asked
    assert counts.unique >= least


def test_leading_dimensions_and_strides(make_sae: Make, path: str) -> None:
    sae = make_sae(12, 66, 24, whole=True)
    features = torch.tensor([60, 2, 33])
    wanted = sae_rank_count(sae.x, sae.w_enc, features, 20, **sae.biases)
    assert (wanted[0] > 0).any()
    shaped = sae_rank_count(sae.x.view(2, 6, 24), sae.w_enc, features, 20, **sae.biases)
    turned = sae_rank_count(sae.x.T.contiguous().T, sae.w_enc.T.contiguous().T, features, 20, **sae.biases)
    for i in range(2):
        assert torch.equal(shaped[i].view(12, 3), wanted[i]) and torch.equal(turned[i], wanted[i])


def test_no_tokens_and_no_features(make_sae: Make, path: str) -> None:
    sae = make_sae(5, 40, 8)
    acts, counts = sae_rank_count(sae.x[:0].view(0, 3, 8), sae.w_enc, torch.tensor([1, 2]), 4)
    assert acts.shape == counts.shape == (0, 3, 2)
    acts, counts = sae_rank_count(sae.x, sae.w_enc, torch.tensor([], dtype=torch.int64), 4)
    assert acts.shape == counts.shape == (5, 0)


def test_zero_rows(make_sae: Make, path: str) -> None:
    sae = make_sae(3, 40, 8)
    features = torch.arange(0, 40, 3)
    acts, _ = sae_rank_count(torch.zeros(3, 8), sae.w_enc, features, 5)
    assert (acts == 0).all()
    ones, counts = sae_rank_count(torch.zeros(3, 8), sae.w_enc, features, 5, b_enc=torch.ones(40))
    assert ones[0].tolist() == [1.0, 1.0] + [0.0] * 12 and counts[0, :3].tolist() == [0, 3, 5]


def test_nan_counts_as_infinity_and_stays_in_its_token(make_sae: Make, path: str) -> None:
    sae = make_sae(3, 900 if path == "torch" else 90, 8)
    features = torch.tensor([70, 1, 3])
    clean = sae_rank_count(sae.x, sae.w_enc, features, 4)[0]
    sae.x[1, 2] = torch.nan
    acts, counts = sae_rank_count(sae.x, sae.w_enc, features, 4)
    assert acts[1].tolist() == [0.0, torch.inf, torch.inf] and counts[1].tolist() == [4, 1, 3]
    assert torch.equal(acts[::2], clean[::2])


def test_autocast_changes_nothing(make_sae: Make, path: str) -> None:
    sae = make_sae(9, 60, 16)
    wanted = sae_rank_count(sae.x, sae.w_enc, torch.arange(30), 20)
    with torch.autocast("cpu", torch.bfloat16):
        got = sae_rank_count(sae.x, sae.w_enc, torch.arange(30), 20)
    assert torch.equal(got[0], wanted[0])


def test_gradients_are_those_of_the_reference(make_sae: Make, path: str) -> None:
    sae = make_sae(6, 50, 12)
    inputs = [part.requires_grad_() for part in (sae.x, sae.w_enc, sae.b_enc, sae.b_pre)]
    features, weights = torch.tensor([7, 0, 33, 49]), torch.randn(6, 4)
    acts = sae_rank_count(sae.x, sae.w_enc, features, 20, **sae.biases)[0]
    got = torch.autograd.grad((acts * weights).sum(), inputs)
    double = [part.detach().double().requires_grad_() for part in inputs]
    acts = sae_rank_count_reference(double[0], double[1], features, 20, double[2], double[3])[0]
    wanted = torch.autograd.grad((acts * weights).sum(), double)
    for name, mine, theirs in zip(("x", "w_enc", "b_enc", "b_pre"), got, wanted, strict=True):
        assert theirs.abs().sum() > 0
        assert_close(name, mine, theirs)


def test_gradcheck(make_sae: Make) -> None:
    sae = make_sae(4, 20, 5, dtype=torch.float64)
    inputs = [part.requires_grad_() for part in (sae.x, sae.w_enc, sae.b_enc, sae.b_pre)]
    ids = torch.arange(0, 20, 2)
    torch.autograd.gradcheck(lambda x, w, b, p: sae_rank_count(x, w, ids, 9, b_enc=b, b_pre=p)[0], inputs)


def test_nothing_of_the_size_tokens_x_dictionary_is_allocated(make_sae: Make) -> None:
    sae = make_sae(77, 16384, 16)
    with Recorder() as record:
        sae_rank_count(sae.x, sae.w_enc, torch.arange(256), 16, **sae.biases)
    assert record.largest < 77 * 16384 / 4


def test_the_op_passes_opcheck(make_sae: Make, path: str) -> None:
    sae = make_sae(4, 40, 8)
    arguments = (sae.x.requires_grad_(), sae.w_enc.requires_grad_(), sae.b_enc, None, torch.arange(9), None, 3)
    torch.library.opcheck(torch.ops.expunge.sae_rank_count.default, (*arguments, torch.float32))


def test_compiles_in_one_graph_for_any_features(make_sae: Make) -> None:
    sae = make_sae(5, 600, 8)
    graphs: list[object] = []

    def keep(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph

    call = torch.compile(lambda x, f: sae_rank_count(x, sae.w_enc, f, 50, **sae.biases), fullgraph=True, backend=keep)
    for first in (0, 300):
        features = torch.arange(first, first + 40)
        for got, wanted in zip(
            call(sae.x, features), sae_rank_count(sae.x, sae.w_enc, features, 50, **sae.biases), strict=True
        ):
            assert torch.equal(got, wanted)
    assert len(graphs) == 1


BAD: dict[str, dict[str, Any]] = {
    "width": {"x": torch.ones(2, 5)},
    "k": {"k": 41},
    "ids beyond": {"features": torch.tensor([40])},
    "ids below": {"features": torch.tensor([-1])},
    "ids twice": {"features": torch.tensor([3, 3])},
    "ids of another type": {"features": torch.tensor([3], dtype=torch.int32)},
    "bound": {"bound": torch.ones(3)},
}


@pytest.mark.parametrize("name", BAD)
def test_refuses_what_does_not_fit(name: str) -> None:
    arguments = {"x": torch.ones(2, 4), "w_enc": torch.ones(40, 4), "features": torch.tensor([1]), "k": 3} | BAD[name]
    with pytest.raises(InvalidInputError, match="sae_rank_count"):
        sae_rank_count(**arguments)


def test_ids_are_looked_at_again_when_they_were_written_to() -> None:
    x, w_enc, features = torch.ones(2, 4), torch.ones(40, 4), torch.tensor([1, 2])
    sae_rank_count(x, w_enc, features, 3)
    features[0] = 2
    with pytest.raises(InvalidInputError, match="twice"):
        sae_rank_count(x, w_enc, features, 3)
