"""fused_linear_loss on its torch path: against whole logits, in every chunking; what it allocates; bad input."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from expunge.errors import InvalidInputError, UnsupportedOperationError
from expunge.kernels.fused_linear_chunks import chunk_sizes
from expunge.kernels.fused_linear_loss import fused_linear_loss, fused_linear_loss_reference
from expunge.kernels.fused_linear_op import linear_loss
from expunge.kernels.loss_gate import GatedLoss
from expunge.kernels.testing.compare import assert_close, relative_error
from expunge.kernels.testing.recorder import Recorder

KINDS = ("cross entropy", "KL")


def problem(kind: str, rows: int, words: int, width: int, *, bias: bool = False, seed: int = 0) -> dict[str, Any]:
    """Arguments in float64: states, head, and labels of which every fifth is ignored, or a frozen model's states."""
    make = torch.Generator().manual_seed(seed)
    hidden, positive, neutral = (torch.randn(rows, width, generator=make, dtype=torch.float64) for _ in range(3))
    weight = torch.randn(words, width, generator=make, dtype=torch.float64)
    given: dict[str, Any] = {"hidden": hidden, "weight": weight}
    if bias:
        given["bias"] = torch.randn(words, generator=make, dtype=torch.float64)
    if kind == "KL":
        return given | {"positive": positive, "neutral": neutral, "eta": 0.7}
    labels = torch.randint(0, words, (rows,), generator=make)
    labels[2::5] = -100
    return given | {"labels": labels, "token_weights": torch.randn(rows, generator=make, dtype=torch.float64)}


def doubles(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def whole(given: dict[str, Any], threshold: float | Tensor, window: int = 1, mean: bool = True) -> GatedLoss:
    """The reference, with all logits at once, in float64."""
    given = doubles(given)
    if "labels" not in given:
        named = [given.pop(name, None) for name in ("target", "positive", "neutral")]
        given["teachers"] = tuple(named[:1] if named[1] is None else (named[2], *named[1:]))
    args = given.pop("hidden"), given.pop("weight"), given.pop("bias", None)
    return fused_linear_loss_reference(
        *args, torch.as_tensor(threshold, dtype=torch.float64), window, mean=mean, **given
    )


def leaves(given: dict[str, Any], head: bool) -> list[Tensor]:
    """Turns on the gradients of the states, and of the head if it trains."""
    names = ("hidden", "weight", "bias") if head else ("hidden",)
    return [given[name].requires_grad_() for name in names if name in given]


def assert_same_gradients(found: Tensor, expected: Tensor, parameters: list[Tensor]) -> None:
    pairs = zip(torch.autograd.grad(found, parameters), torch.autograd.grad(expected, parameters), strict=True)
    for number, (one, other) in enumerate(pairs):
        assert_close(f"gradient {number}", one, other, 1e-10)


@given(
    kind=st.sampled_from(KINDS),
    rows=st.integers(1, 13),
    words=st.integers(2, 21),
    window=st.integers(1, 7),
    chunk_rows=st.none() | st.integers(1, 9),
    chunk_words=st.none() | st.integers(1, 9),
    bias=st.booleans(),
    head=st.booleans(),
    quantile=st.floats(-0.1, 1),
    mean=st.booleans(),
    seed=st.integers(0, 99),
)
def test_equals_whole_logits_in_every_chunking(
    kind: str,
    rows: int,
    words: int,
    window: int,
    chunk_rows: int | None,
    chunk_words: int | None,
    bias: bool,
    head: bool,
    quantile: float,
    mean: bool,
    seed: int,
) -> None:
    given = problem(kind, rows, words, 5, bias=bias, seed=seed)
    ordered = whole(given, 0.0, window).group_losses.sort().values
    threshold = ordered[int(quantile * (len(ordered) - 1))].item() + 1e-6 if quantile >= 0 else -math.inf
    parameters = leaves(given, head)
    expected = whole(given, threshold, window, mean)
    words_of_gate = {"granularity": "window", "window": window, "reduction": "kept" if mean else "sum"}
    chunks = {"chunk_rows": chunk_rows, "chunk_words": chunk_words}
    out = fused_linear_loss(**given, threshold=threshold, **words_of_gate, **chunks)
    assert torch.equal(out.kept, expected.kept)
    assert_close("group losses", out.group_losses, expected.group_losses, 1e-11)
    assert_close("loss", out.loss, expected.loss, 1e-11)
    assert_same_gradients(out.loss * 2.5, expected.loss * 2.5, parameters)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_dtypes(kind: str, dtype: torch.dtype) -> None:
    given = problem(kind, 21, 4500, 16, bias=True)
    given = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}
    exact = doubles(given)
    parameters, exact_parameters = leaves(given, True), leaves(exact, True)
    expected = whole(exact, 1.0)
    out = fused_linear_loss(**given, threshold=1.0, chunk_rows=8)
    assert torch.equal(out.kept, expected.kept)
    assert_close("loss", out.loss, expected.loss)
    gradients = torch.autograd.grad(out.loss, parameters)
    for name, one, other in zip("hwb", gradients, torch.autograd.grad(expected.loss, exact_parameters), strict=True):
        assert one.dtype == dtype
        assert_close(name, one, other)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("window", [1, 16, 100])
def test_no_tensor_of_rows_times_words_is_ever_allocated(kind: str, head: bool, window: int) -> None:
    given = problem(kind, 100, 64, 12)  # the head itself, [64, 12], is smaller than 100 x 64
    parameters = leaves(given, head)
    with Recorder() as naive:
        torch.autograd.grad(whole(given, 1.0, window).loss, parameters)
    assert naive.largest >= 100 * 64
    for rows in (1, 2, 30, 100):
        part = {k: v[:rows] if isinstance(v, Tensor) and k != "weight" else v for k, v in given.items()}
        part["hidden"] = part["hidden"].detach().requires_grad_()
        with Recorder() as ours:
            out = fused_linear_loss(**part, threshold=1.0, granularity="window", window=window)
            out.loss.backward()
        if rows > 12 or not head:  # the gradient of a head that trains has 64 x 12 elements
            assert ours.largest < rows * 64


@pytest.mark.parametrize(
    ("rows", "words", "chunk_rows", "chunk_words", "window", "expected"),
    [
        (4096, 49152, None, None, 1, (128, 49152)),
        (4096, 49152, 100, 1000, 12, (96, 1000)),  # whole windows
        (4096, 49152, 100, None, 200, (100, 49152)),
        (100, 64, None, None, 1, (50, 64)),  # never all rows with all words
        (100, 64, None, None, 48, (96, 64)),
        (96, 64, 500, None, 48, (48, 64)),
        (100, 64, None, None, 60, (60, 64)),
        (100, 64, None, None, 100, (100, 32)),
        (1, 65, None, None, 1, (1, 33)),
    ],
)
def test_chunk_sizes(
    rows: int, words: int, chunk_rows: int | None, chunk_words: int | None, window: int, expected: tuple[int, int]
) -> None:
    assert chunk_sizes(rows, words, chunk_rows, chunk_words, window) == expected


def test_windows_longer_than_a_chunk_are_known_before_the_head_learns_from_them() -> None:
    given = problem("cross entropy", 12, 9, 4)
    given.pop("token_weights")
    parameters = leaves(given, True)
    given["hidden"].data[6:] *= 30  # the second window is far above the threshold, and far from flat
    expected = whole(given, 30.0, 6)
    assert expected.kept.tolist() == [0, 1]
    out = fused_linear_loss(**given, threshold=30.0, granularity="window", window=6, chunk_rows=4)
    assert_same_gradients(out.loss, expected.loss, parameters)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: str) -> None:
    given = problem(kind, 5, 7, 3, bias=True)
    if kind == "cross entropy":
        given["token_weights"] = torch.tensor([1.0, -2.0, 1.0, 0.5, 0.0], dtype=torch.float64)
    names = ("hidden", "weight", "bias") if kind == "cross entropy" else ("hidden",)  # the teacher has the same head

    def loss(*tensors: Tensor) -> Tensor:
        return fused_linear_loss(**given | dict(zip(names, tensors, strict=True)), threshold=0.31).loss

    assert torch.autograd.gradcheck(loss, leaves(given, len(names) > 1))


def test_equals_torch_cross_entropy_of_a_model_batch() -> None:
    hidden, weight = torch.randn(2, 7, 6), torch.randn(11, 6)
    labels = torch.randint(0, 11, (2, 7))
    labels[:, -2:] = -100
    expected = F.cross_entropy((hidden @ weight.T).flatten(0, 1), labels.flatten())
    torch.testing.assert_close(fused_linear_loss(hidden, weight, labels=labels).loss, expected)


def test_a_negative_weight_climbs_only_below_its_threshold() -> None:
    given = problem("cross entropy", 20, 9, 4)
    given["token_weights"] = -torch.ones(20)
    losses = -fused_linear_loss(**given).group_losses
    middle = losses[given["labels"] != -100].median().item()
    kept = fused_linear_loss(**given, threshold=-middle).kept
    assert torch.equal(kept.bool(), (losses < middle) & (given["labels"] != -100))


def test_a_plain_target_is_distillation_and_the_same_teacher_costs_nothing() -> None:
    hidden, weight = torch.randn(6, 4), torch.randn(9, 4)
    out = fused_linear_loss(hidden.requires_grad_(), weight, target=hidden.detach(), threshold=0.0)
    (grad,) = torch.autograd.grad(out.loss, hidden)
    assert out.group_losses.tolist() == [0.0] * 6
    assert not grad.any()
    other = torch.randn(6, 4)
    expected = F.kl_div((hidden @ weight.T).log_softmax(1), (other @ weight.T).softmax(1), reduction="batchmean")
    torch.testing.assert_close(fused_linear_loss(hidden, weight, target=other).loss, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_words", [None, 4])
def test_banned_words(kind: str, chunk_words: int | None) -> None:
    given = problem(kind, 6, 9, 4, bias=True)
    given["bias"][:4] = -math.inf
    if kind == "cross entropy":
        given["labels"].clamp_(min=5)
    else:  # -inf less -inf is NaN in logits, but not in states
        given = {"target": given.pop("positive"), **given}
        del given["neutral"]
    parameters = leaves(given, True)
    expected = whole(given, -math.inf)
    out = fused_linear_loss(**given, chunk_words=chunk_words)
    assert_same_gradients(out.loss, expected.loss, parameters)


@pytest.mark.parametrize("head", [False, True])
def test_ignored_rows_may_hold_anything_and_others_are_loud(head: bool) -> None:
    given = problem("cross entropy", 10, 9, 4)
    parameters = leaves(given, head)
    given["hidden"].data[2] = math.nan  # an ignored row
    out = fused_linear_loss(**given)
    assert all(torch.isfinite(one).all() for one in (out.loss, *torch.autograd.grad(out.loss, parameters)))
    given["hidden"].data[3] = math.nan
    out = fused_linear_loss(**given, threshold=2.0)
    assert math.isnan(out.loss.item())
    assert out.kept[3] == 1
    assert torch.autograd.grad(out.loss, parameters)[-1].isnan().any()


@pytest.mark.parametrize("kind", KINDS)
def test_everything_gated_off_and_nothing_there(kind: str) -> None:
    given = problem(kind, 10, 9, 4, bias=True)
    parameters = leaves(given, True)
    out = fused_linear_loss(**given, threshold=math.inf)
    assert out.loss.item() == 0.0
    assert not any(one.any() for one in torch.autograd.grad(out.loss, parameters))
    empty = {k: v[:0] if isinstance(v, Tensor) and k not in ("weight", "bias") else v for k, v in given.items()}
    out = fused_linear_loss(**empty, granularity="window", window=3)
    assert out.loss.item() == 0.0
    assert not any(one.any() for one in torch.autograd.grad(out.loss, parameters))


def test_strided_states_and_head_are_honoured() -> None:
    hidden, weight = torch.randn(4, 2, 5, dtype=torch.float64), torch.randn(4, 9, dtype=torch.float64)
    labels = torch.randint(0, 9, (2, 4))
    view = hidden.transpose(0, 1)[..., ::2][..., :2]
    head = weight[::2].T
    expected = fused_linear_loss(view.contiguous(), head.contiguous(), labels=labels)
    torch.testing.assert_close(fused_linear_loss(view, head, labels=labels), expected)


def test_under_autocast_products_stay_in_float32() -> None:
    given = {k: v.float() if isinstance(v, Tensor) and k != "labels" else v for k, v in problem("KL", 9, 7, 4).items()}
    with torch.autocast("cpu", torch.bfloat16):
        inside = fused_linear_loss(**given)
    assert torch.equal(inside.loss, fused_linear_loss(**given).loss)


def test_a_second_derivative_is_refused() -> None:
    given = problem("KL", 4, 5, 3)
    parameters = leaves(given, False)
    (grad,) = torch.autograd.grad(fused_linear_loss(**given).loss ** 2, parameters, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_the_custom_op_passes_opcheck(kind: str) -> None:
    given = problem(kind, 7, 9, 4, bias=True)
    parameters = leaves(given, True)
    labels, weights = given.get("labels"), given.get("token_weights")
    valid = None if labels is None else labels != -100
    labels = None if valid is None else labels.clamp_min(0)
    teacher = None if kind == "cross entropy" else given["neutral"]
    threshold = torch.tensor(1.0, dtype=torch.float64)
    arguments = (*parameters, labels, valid, teacher, weights, threshold, 2, True, [True, True, True], 4, None)
    torch.library.opcheck(linear_loss, arguments)


def test_compiled_without_breaks_and_once_for_all_thresholds() -> None:
    counter = CompileCounter()
    given = problem("cross entropy", 12, 9, 4)
    parameters = leaves(given, True)

    @torch.compile(backend=counter, fullgraph=True)
    def step(hidden: Tensor, weight: Tensor, labels: Tensor, token_weights: Tensor, threshold: Tensor) -> Tensor:
        return fused_linear_loss(hidden, weight, labels=labels, token_weights=token_weights, threshold=threshold).loss

    for threshold in (-1.0, 0.5, 2.0, math.inf):
        loss = step(**given, threshold=torch.tensor(threshold))
        expected = whole(given, threshold).loss
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(torch.autograd.grad(loss, parameters), torch.autograd.grad(expected, parameters))
    assert counter.frame_count == 1


def test_a_label_that_is_no_word_is_loud_where_it_cannot_be_raised() -> None:
    step = torch.compile(fused_linear_loss, backend="eager", fullgraph=True)
    hidden, weight = torch.randn(3, 4), torch.randn(5, 4)
    assert math.isnan(step(hidden, weight, labels=torch.tensor([0, 5, 2])).loss.item())
    assert math.isfinite(step(hidden, weight, labels=torch.tensor([0, -100, 2])).loss.item())


def test_float64_has_no_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EXPUNGE_KERNELS", "triton")
    with pytest.raises(UnsupportedOperationError, match="fused_linear_loss"):
        fused_linear_loss(**problem("KL", 4, 5, 3))


def test_memory_is_a_chunks_and_not_the_rows() -> None:
    given = problem("KL", 64, 50, 4)
    with Recorder() as record:
        fused_linear_loss(**given, chunk_rows=8)
    assert record.largest == 8 * 50
    assert relative_error(fused_linear_loss(**given, chunk_rows=8).loss, whole(given, -math.inf).loss) < 1e-12


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"labels": None}, "labels, target: expected .* found neither"),
        ({"target": torch.ones(4, 3)}, "found both"),
        ({"weight": torch.ones(5, 2)}, r"weight: expected \[V, 3\]"),
        ({"weight": torch.ones(0, 3)}, "at least one word"),
        ({"bias": torch.ones(4)}, r"bias: expected \[5\]"),
        ({"labels": torch.zeros(3, dtype=torch.int64)}, r"labels: expected \[4\]"),
        ({"labels": torch.zeros(4)}, "labels: expected integers"),
        ({"labels": torch.tensor([0, 1, 5, -100])}, "labels: expected 0 to 4, or -100 .* found 5"),
        ({"labels": torch.tensor([0, 1, -1, 0])}, "found -1"),
        ({"token_weights": torch.ones(5)}, "token_weights"),
        ({"granularity": "element"}, "granularity"),
        ({"chunk_rows": 0}, "chunk_rows: expected at least 1"),
        ({"chunk_words": -1}, "chunk_words"),
        ({"weight": torch.ones(5, 3, dtype=torch.int64)}, "weight: expected a floating-point tensor"),
        ({"weight": torch.ones(5, 3, device="meta")}, "weight: expected cpu"),
        ({"positive": torch.ones(4, 3)}, "positive, neutral"),
    ],
)
def test_bad_input_is_named(change: dict[str, Any], match: str) -> None:
    labels = torch.zeros(4, dtype=torch.int64)
    with pytest.raises(InvalidInputError, match=match):
        fused_linear_loss(**{"hidden": torch.ones(4, 3), "weight": torch.ones(5, 3), "labels": labels, **change})
