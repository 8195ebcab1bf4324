"""facilitated_transport against torch's own cosine and sets of tokens, and the properties that gating rests on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels import facilitated_transport as reference
from expunge.kernels.facilitated_transport import TokenIds, concept_similarity, facilitated_transport, padded_ids

Sets = list[set[int]]


def gates_of(
    states: Tensor, concepts: Tensor, owner: list[int], n: int, threshold: Tensor | None = None, **kw: TokenIds
) -> Tensor:
    threshold = torch.zeros(n) if threshold is None else threshold
    return facilitated_transport(states, concepts, torch.tensor(owner, dtype=torch.int64), threshold, **kw).gates


def ids(prompts: Sets, concepts: Sets, owner: list[int]) -> TokenIds:
    return TokenIds(padded_ids(prompts), padded_ids(concepts), torch.tensor(owner, dtype=torch.int64))


token_sets = st.sets(st.integers(0, 5), max_size=4)


@given(
    owner=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    prompts=st.lists(token_sets, min_size=1, max_size=4),
    concepts=st.none() | st.lists(st.tuples(token_sets, st.integers(0, 2)), max_size=4),
    threshold=st.floats(0, 1, width=32),
    seed=st.integers(0, 99),
)
def test_gate_is_the_larger_of_cosine_and_overlap_or_zero(
    owner: list[int], prompts: Sets, concepts: list[tuple[set[int], int]] | None, threshold: float, seed: int
) -> None:
    torch.manual_seed(seed)
    shared = torch.randn(4, 5)  # real states share most of their padding: cosines near each other, mostly positive
    states, references = torch.randn(len(prompts), 4, 5) + shared, torch.randn(len(owner), 4, 5) + shared
    tokens = None if concepts is None else ids(prompts, [one for one, _ in concepts], [spm for _, spm in concepts])
    gates, scores, overlap = facilitated_transport(
        states, references, torch.tensor(owner), torch.full((3,), threshold), tokens
    )
    assert (overlap is None) == (concepts is None)
    for row, prompt in enumerate(prompts):
        for spm in range(3):
            cosines = [
                torch.cosine_similarity(states[row].flatten().double(), references[m].flatten().double(), dim=0).item()
                for m in range(len(owner))
                if owner[m] == spm
            ]
            shares = [len(one & prompt) / len(one) for one, of in concepts or () if of == spm and one]
            if overlap is not None:
                assert overlap[row, spm] == torch.tensor(max([0.0, *shares]))
            assert scores[row, spm].item() == pytest.approx(max([0.0, *cosines, *shares]), abs=1e-5)
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
    tokens = ids([{1, 7}], [{1, 2}], [1])
    assert gates_of(torch.ones(1, 2, 3), concepts, [0], 2, tokens=tokens).tolist()[0][1] == 0.5


def test_padded_ids_are_sets() -> None:
    assert padded_ids([{3, 1}, set(), [2, 2]]).tolist() == [[1, 3], [-1, -1], [2, -1]]
    assert padded_ids([]).shape == (0, 1)
    assert padded_ids([set()]).tolist() == [[-1]]


def test_overlap_is_the_same_a_few_prompts_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = ids([{1}, {2, 3}, set(), {1, 2}, {3}], [{1, 2}, {3}], [0, 1])
    expected = [[0.5, 0.0], [0.5, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]
    for comparisons in (1, 16, 2**22):
        monkeypatch.setattr(reference, "COMPARISONS", comparisons)
        assert reference.token_overlap_reference(tokens, 2).tolist() == expected


def test_no_rows_and_no_concepts() -> None:
    tokens = ids([{1}], [{1}, {2}], [0, 1])
    assert gates_of(torch.randn(1, 2, 3), torch.randn(0, 2, 3), [], 2, tokens=tokens).tolist() == [[1.0, 0.0]]
    none = ids([], [{1}], [0])
    found = facilitated_transport(torch.randn(0, 2, 3), torch.randn(2, 2, 3), torch.tensor([0, 1]), torch.ones(2), none)
    assert [part.shape for part in found if part is not None] == [(0, 2)] * 3


def test_gates_are_constants_for_autograd() -> None:
    states = torch.randn(1, 2, 3, requires_grad=True)
    assert not gates_of(states, torch.randn(1, 2, 3), [0], 1).requires_grad


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


@pytest.mark.parametrize(
    ("name", "wrong"),
    [
        ("owner", {"owner": torch.zeros(3, dtype=torch.int64)}),
        ("owner", {"owner": torch.zeros(2)}),
        ("threshold", {"threshold": torch.zeros(2, dtype=torch.float64)}),
        ("concept_states", {"concept_states": torch.randn(2, 4, 8).half()}),
        ("tokens.prompts", {"tokens": ids([{1}], [{1}], [0])}),
        ("tokens.owner", {"tokens": ids([{1}, {2}], [{1}], [0, 1])}),
        ("tokens.concepts", {"tokens": TokenIds(padded_ids([{1}, {2}]), torch.zeros(1), torch.tensor([0]))}),
    ],
)
def test_tables_that_do_not_belong_together_are_refused(name: str, wrong: dict[str, Any]) -> None:
    right = {"concept_states": torch.randn(2, 4, 8), "owner": torch.tensor([0, 1]), "threshold": torch.zeros(2)}
    facilitated_transport(torch.randn(2, 4, 8), **right)
    with pytest.raises(InvalidInputError, match=f"^{name}: expected"):
        facilitated_transport(torch.randn(2, 4, 8), **(right | wrong))
