"""The Triton kernels of facilitated_transport in the interpreter, against float64 and against Python's sets."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from expunge.kernels.facilitated_transport import Permeability, TokenIds, facilitated_transport, padded_ids
from expunge.kernels.gpu import facilitated_transport as gpu
from expunge.kernels.testing.compare import assert_close

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
pytestmark = pytest.mark.usefixtures("triton_path")


def cosines64(states: Tensor, concepts: Tensor) -> Tensor:
    """`[B, M]` float64: torch's own cosine of the best chunk."""
    chunks = states.double().reshape(states.shape[0], -1, 1, concepts[0].numel())  # [B, k, 1, L*D]
    return torch.cosine_similarity(chunks, concepts.double().flatten(1), dim=-1).amax(1).clamp_min(0.0)


def make(
    rows: int, concepts: int, n: int, *, k: int = 1, shape: tuple[int, int] = (5, 7), dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    shared = torch.randn(shape)
    states = (torch.randn(rows, k * shape[0], shape[1]) + shared.repeat(k, 1)).to(dtype)
    owner = torch.arange(concepts) % n
    return {"states": states, "concept_states": torch.randn(concepts, *shape) + shared, "owner": owner} | {
        "threshold": torch.full((n,), 0.4)
    }


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("k", [1, 3])
def test_scores_are_cosines(dtype: torch.dtype, k: int) -> None:
    case = make(3, 11, 11, k=k, dtype=dtype)
    gates, scores, overlap = facilitated_transport(**case)
    expected = cosines64(case["states"], case["concept_states"])
    assert_close("scores", scores, expected)
    assert torch.equal(gates, torch.where(scores >= 0.4, scores, 0.0))
    assert 0 < (gates == 0).sum() < gates.numel()
    assert overlap is None


def test_features_beyond_one_slice_are_summed() -> None:
    case = make(2, 3, 3, shape=(37, 61))  # 2257: two slices, the second mostly empty
    assert_close("scores", facilitated_transport(**case).scores, cosines64(case["states"], case["concept_states"]))


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of a few elements, so that small shapes go through every loop."""
    for name, size in {"CONCEPTS": 2, "SLICE": 16, "ROWS": 2, "SPMS": 4, "PARTS": 2, "PROMPT": 4}.items():
        monkeypatch.setattr(gpu, name, size)


@pytest.mark.usefixtures("small_tiles")
def test_more_slices_concepts_spms_and_rows_than_a_tile() -> None:
    case = make(3, 7, 6, shape=(5, 9))  # 45 features: three slices, the last mostly empty
    best = cosines64(case["states"], case["concept_states"])
    expected = best[:, :6].clone()
    expected[:, 0] = torch.maximum(best[:, 0], best[:, 6])
    assert_close("scores", facilitated_transport(**case).scores, expected)


token_sets = st.sets(st.integers(0, 12), max_size=9)


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=6)
@given(
    prompts=st.lists(token_sets, min_size=1, max_size=3),
    concepts=st.lists(st.tuples(token_sets, st.integers(0, 2)), max_size=4),
)
def test_overlap_is_that_of_pythons_sets(prompts: list[set[int]], concepts: list[tuple[set[int], int]]) -> None:
    owner = torch.tensor([spm for _, spm in concepts], dtype=torch.int64)
    tokens = TokenIds(padded_ids(prompts), padded_ids(ids for ids, _ in concepts), owner)
    found = facilitated_transport(**make(len(prompts), 3, 3, shape=(1, 5)), tokens=tokens)
    for row, prompt in enumerate(prompts):
        for spm in range(3):
            shares = [len(ids & prompt) / len(ids) for ids, of in concepts if of == spm and ids]
            assert found.overlap is not None
            assert found.overlap[row, spm] == torch.tensor(max([0.0, *shares]))  # the same float32, not nearly
    assert found.overlap is not None
    assert (found.scores >= found.overlap).all()


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=6)
@given(rows=st.integers(2, 4), spms=st.integers(1, 5), seed=st.integers(0, 99))
def test_a_gate_depends_neither_on_the_batch_nor_on_the_spms_beside_it(rows: int, spms: int, seed: int) -> None:
    torch.manual_seed(seed)
    case = make(rows, spms, spms, shape=(3, 16))
    together = facilitated_transport(**case).scores
    last = {name: case[name][-1:] for name in ("states", "concept_states", "threshold")}
    alone = facilitated_transport(**last, owner=torch.tensor([0])).scores
    assert torch.equal(alone[0, 0], together[-1, -1])


def test_thresholds_are_compared_with_the_very_score() -> None:
    case = make(1, 2, 2)
    scores = facilitated_transport(**case).scores[0]
    at = facilitated_transport(**(case | {"threshold": scores})).gates[0]
    above = facilitated_transport(**(case | {"threshold": torch.nextafter(scores, torch.tensor(2.0))})).gates[0]
    assert torch.equal(at, scores)
    assert above.tolist() == [0.0, 0.0]


def test_zero_norms_give_zero() -> None:
    case = make(2, 2, 2)
    case["states"][0] = 0
    case["concept_states"][1] = 0
    scores = facilitated_transport(**case).scores
    assert scores[0].tolist() == [0.0, 0.0]
    assert scores[1, 1] == 0.0
    assert scores[1, 0] > 0


@pytest.mark.parametrize("rows", [0, 1])
def test_no_rows_no_concepts_no_tokens(rows: int) -> None:
    tokens = TokenIds(padded_ids([{1}] * rows), padded_ids([{1, 2}]), torch.tensor([1]))
    found = facilitated_transport(**make(rows, 0, 2), tokens=tokens)
    assert found.scores.tolist() == [[0.0, 0.5]] * rows
    none = facilitated_transport(**make(rows, 2, 2), tokens=tokens._replace(prompts=padded_ids([set()] * rows)))
    assert none.overlap is not None
    assert none.overlap.tolist() == [[0.0, 0.0]] * rows


def test_strides_are_honoured() -> None:
    case = make(3, 4, 4)
    expected = facilitated_transport(**case)
    odd = {
        "states": torch.stack([case["states"]] * 2, 1)[:, 0],
        "concept_states": case["concept_states"].mT.contiguous().mT,
        "owner": case["owner"].repeat_interleave(2)[::2],
        "threshold": torch.stack([case["threshold"]] * 2, 1)[:, 0],
    }
    assert not any(tensor.is_contiguous() for tensor in odd.values())
    assert torch.equal(facilitated_transport(**odd).gates, expected.gates)
    turned = {"states": case["states"].mT.contiguous().mT}
    assert torch.equal(facilitated_transport(**(case | turned)).gates, expected.gates)
    repeated = facilitated_transport(**(case | {"states": case["states"][:1].expand(3, -1, -1)}))
    assert torch.equal(repeated.gates, expected.gates[:1].expand(3, -1))


def test_two_launches_that_read_the_concepts_once(counts: Any) -> None:
    case = make(4, 20, 20, shape=(16, 64))
    facilitated_transport(**case)
    if counts is None:
        pytest.skip("on a GPU nobody counts")
    assert counts.launches == ["concept_sums_kernel", "transport_gates_kernel"]
    states, concepts = case["states"].nbytes, case["concept_states"].nbytes
    blocks = -(-20 // gpu.CONCEPTS)
    small = counts.read_asked - concepts - blocks * states  # partial sums, owners and thresholds
    assert 0 < small < 0.2 * (states + concepts)
    assert counts.read_unique < 1.1 * (states + concepts)


def operands(tokens: bool) -> tuple[Any, ...]:
    case = make(2, 3, 2)
    given = TokenIds(padded_ids([{1}, {2}]), padded_ids([{1}]), torch.tensor([1])) if tokens else (None,) * 3
    return (*case.values(), *given)


@pytest.mark.parametrize("tokens", [False, True])
def test_the_custom_op_is_a_proper_one(tokens: bool) -> None:
    torch.library.opcheck(gpu.facilitated_transport_op, operands(tokens))


@pytest.mark.parametrize("tokens", [False, True])
def test_the_custom_ops_cpu_kernel_is_the_reference(tokens: bool) -> None:
    given = operands(tokens)
    found, launched = gpu.facilitated_transport_op(*given), gpu.launch_facilitated_transport(*given)
    assert torch.allclose(found, launched, atol=1e-6)


@pytest.mark.slow
def test_it_compiles_without_breaks_and_once_for_all_gates() -> None:
    torch._dynamo.reset()
    graphs = CompileCounter()

    def run(states: Tensor, concept_states: Tensor, owner: Tensor, threshold: Tensor) -> Permeability:
        return facilitated_transport(states, concept_states, owner, threshold)

    compiled = torch.compile(run, backend=graphs, fullgraph=True)
    for seed in range(3):
        torch.manual_seed(seed)
        case = make(2, 3, 2)
        expected, found = facilitated_transport(**case), compiled(**case)
        assert torch.allclose(found.gates, expected.gates, atol=1e-6)
    assert graphs.frame_count == 1
