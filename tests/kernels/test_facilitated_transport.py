"""facilitated_transport against torch's own cosine and sets of tokens, and the properties that gating rests on."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.facilitated_transport import concept_similarity, facilitated_transport


def gates_of(states: Tensor, concepts: Tensor, owner: list[int], n: int, **kw: Tensor) -> Tensor:
    kw.setdefault("threshold", torch.zeros(n))
    return facilitated_transport(states, concepts, torch.tensor(owner), n, **kw)[0]


@given(
    rows=st.integers(1, 4),
    owner=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    overlap=st.booleans(),
    threshold=st.floats(0, 1, width=32),
    seed=st.integers(0, 99),
)
def test_gate_is_the_larger_of_cosine_and_overlap_or_zero(
    rows: int, owner: list[int], overlap: bool, threshold: float, seed: int
) -> None:
    torch.manual_seed(seed)
    shared = torch.randn(4, 5)  # real states share most of their padding: cosines near each other, mostly positive
    states, concepts = torch.randn(rows, 4, 5) + shared, torch.randn(len(owner), 4, 5) + shared
    tokens = torch.rand(rows, 3) if overlap else None
    gates, scores = facilitated_transport(
        states, concepts, torch.tensor(owner), 3, token_overlap=tokens, threshold=torch.full((3,), threshold)
    )
    for row in range(rows):
        for spm in range(3):
            cosines = [
                torch.cosine_similarity(states[row].flatten().double(), concepts[m].flatten().double(), dim=0).item()
                for m in range(len(owner))
                if owner[m] == spm
            ]
            expected = max([0.0, *cosines, *([tokens[row, spm].item()] if tokens is not None else [])])
            assert scores[row, spm].item() == pytest.approx(expected, abs=1e-5)
            assert gates[row, spm] == (scores[row, spm] if scores[row, spm] >= threshold else 0.0)


@given(rows=st.integers(2, 5), seed=st.integers(0, 99))
def test_a_rows_gates_do_not_depend_on_its_batch(rows: int, seed: int) -> None:
    torch.manual_seed(seed)
    states, concepts = torch.randn(rows, 16, 32), torch.randn(9, 16, 32)
    owner = list(range(9))
    together = gates_of(states, concepts, owner, 9)
    for row in range(rows):
        assert torch.equal(gates_of(states[row : row + 1], concepts, owner, 9)[0], together[row])
    assert torch.equal(gates_of(states[:1].expand(rows, -1, -1), concepts, owner, 9), together[:1].expand(rows, -1))


def test_below_the_threshold_the_gate_is_exactly_zero_and_at_it_open() -> None:
    states = torch.tensor([[[1.0, 0.0]], [[1.0, 1.0]]])
    concepts = torch.tensor([[[1.0, 0.0]]])
    score = gates_of(states, concepts, [0], 1)[1]
    assert gates_of(states, concepts, [0], 1, threshold=score).flatten().tolist() == [1.0, score.item()]
    above = torch.nextafter(score, torch.tensor(2.0))
    assert gates_of(states, concepts, [0], 1, threshold=above).flatten().tolist() == [1.0, 0.0]


def test_the_concept_itself_scores_one_and_its_opposite_zero() -> None:
    concepts = torch.randn(1, 7, 32)
    gates = gates_of(torch.cat([concepts, -concepts, 3 * concepts]), concepts, [0], 1)
    assert gates.flatten().tolist() == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)


def test_an_spm_without_concept_states_is_gated_by_tokens_alone() -> None:
    concepts = torch.ones(1, 2, 3)
    overlap = torch.tensor([[0.0, 0.5]])
    assert gates_of(torch.ones(1, 2, 3), concepts, [0], 2, token_overlap=overlap).tolist()[0][1] == 0.5


def test_zero_states_give_no_nan() -> None:
    gates = gates_of(torch.zeros(1, 2, 3), torch.stack([torch.zeros(2, 3), torch.ones(2, 3)]), [0, 1], 2)
    assert gates.tolist() == [[0.0, 0.0]]


def test_long_states_score_as_their_best_chunk() -> None:
    concepts, other = torch.randn(1, 4, 8), torch.randn(1, 4, 8)
    long = torch.cat([other, concepts], 1)
    assert gates_of(long, concepts, [0], 1).item() == pytest.approx(1.0, abs=1e-6)
    assert gates_of(long, other, [0], 1).item() == pytest.approx(1.0, abs=1e-6)


def test_half_precision_states_are_compared_in_float32() -> None:
    states, concepts = torch.randn(2, 16, 32), torch.randn(1, 16, 32)
    gates = gates_of(states.bfloat16(), concepts, [0], 1)
    assert gates.dtype == torch.float32
    assert torch.equal(gates, gates_of(states.bfloat16().float(), concepts, [0], 1))


@pytest.mark.parametrize("shape", [(2, 4, 7), (2, 5, 8), (2, 8), (2, 0, 8)])
def test_states_of_another_encoder_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match="text states"):
        concept_similarity(torch.randn(shape), torch.randn(1, 4, 8), torch.zeros(1, dtype=torch.int64), 1)
