"""The Triton kernels of masked_mse in the interpreter: results, gates, gradients, strides, bytes, compilation."""

from __future__ import annotations

import math
import os
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from expunge.kernels.loss_gate import GatedLoss
from expunge.kernels.masked_mse import masked_mse, masked_mse_reference
from expunge.kernels.testing.compare import assert_close

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)

pytestmark = pytest.mark.usefixtures("triton_path")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
GRANULARITIES: tuple[dict[str, Any], ...] = (
    {"granularity": "token"},
    {"granularity": "window", "window": 4},
    {"granularity": "window", "window": 37},
    {"granularity": "element"},
)


def states(*shape: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Student, target, positive, neutral."""
    return [torch.randn(shape).to(dtype) for _ in range(4)]


def exact(tensors: list[Tensor], threshold: float, eta: float = 1.0, mean: bool = True, **words: Any) -> GatedLoss:
    """The reference in float64; its student is the first of `tensors`, which are float64 already."""
    student, target, *moved = tensors
    positive, neutral = moved or (None, None)
    limit = torch.as_tensor(threshold, dtype=torch.float64)
    element, window = words["granularity"] == "element", words.get("window", 1)
    return masked_mse_reference(student, target, positive, neutral, eta, limit, window, mean=mean, element=element)


def check(tensors: list[Tensor], threshold: float, eta: float = 1.0, mean: bool = True, **words: Any) -> GatedLoss:
    """Loss, gates and gradient against the reference."""
    doubles = [tensor.detach().double() for tensor in tensors]
    tensors[0].requires_grad_()
    doubles[0].requires_grad_()
    expected = exact(doubles, threshold, eta, mean, **words)
    reduction: Any = "kept" if mean else "sum"
    out = masked_mse(*tensors, eta=eta, threshold=threshold, reduction=reduction, **words)
    assert torch.equal(out.kept, expected.kept)
    assert_close("group losses", out.group_losses, expected.group_losses)
    assert_close("loss", out.loss, expected.loss)
    (grad,) = torch.autograd.grad(out.loss * 3, tensors[0])
    assert_close("gradient", grad, torch.autograd.grad(expected.loss * 3, doubles[0])[0])
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("words", GRANULARITIES, ids=str)
def test_against_the_reference(words: dict[str, Any], dtype: torch.dtype) -> None:
    tensors = states(3, 5, 21, dtype=dtype)
    middle = (
        exact([tensor.double() for tensor in tensors], -math.inf, 0.7, **words).group_losses.median().item() * 0.999
    )
    out = check(tensors, 3.0 if words["granularity"] == "element" else middle, 0.7, **words)
    assert out.kept.any()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=25)
@given(
    rows=st.integers(0, 9),
    width=st.integers(1, 40),
    words=st.sampled_from(GRANULARITIES),
    dtype=st.sampled_from(DTYPES),
    threshold=st.sampled_from([-math.inf, 0.0, 1.03, math.inf]),
    mean=st.booleans(),
    moved=st.booleans(),
    seed=st.integers(0, 99),
)
def test_every_shape(
    rows: int,
    width: int,
    words: dict[str, Any],
    dtype: torch.dtype,
    threshold: float,
    mean: bool,
    moved: bool,
    seed: int,
) -> None:
    torch.manual_seed(seed)
    tensors = states(rows, width, dtype=dtype)
    check(tensors if moved else tensors[:2], threshold, 0.5, mean, **words)


def test_each_tensor_has_strides_and_a_dtype_of_its_own() -> None:
    s = torch.randn(5, 2, 33)[:, :, 1::2].transpose(0, 1)
    t = torch.randn(16, 2, 5).permute(1, 2, 0).half()
    p = torch.randn(1, 5, 16).expand(2, -1, -1).bfloat16()
    n = torch.randn(2, 10, 16)[:, ::2]
    check([s, t, p, n], 4.0, 1.5, granularity="window", window=3)
    check([one.unsqueeze(1).expand(2, 2, 5, 16) for one in (s, t, p, n)], 1.0, granularity="token")


def test_bytes_are_four_reads_and_a_write(counts: Any) -> None:
    s, t, p, n = states(9, 1152, dtype=torch.bfloat16)
    out = masked_mse(s.requires_grad_(), t, p, n, granularity="window", window=3)
    assert counts.launches == ["masked_mse_fwd_kernel", "loss_gate_kernel"]
    assert counts.unique <= counts.asked <= 1.05 * 5 * s.nbytes
    before = counts.asked
    out.loss.backward()
    assert counts.launches[2:] == ["scale_rows_kernel"]
    assert counts.asked - before <= 1.05 * 2 * s.nbytes


def test_without_a_gradient_nothing_but_losses_is_written(counts: Any) -> None:
    s, t, p, n = states(9, 576)
    masked_mse(s, t, p, n)
    assert counts.written_asked <= 9 * 4 * 4 + 4
    assert counts.read_asked <= 1.05 * 4 * s.nbytes


def test_gated_off_rows_are_neither_read_nor_multiplied_in_backward(counts: Any) -> None:
    s, t = torch.zeros(4, 16), torch.zeros(4, 16)
    s[2, 3] = math.inf
    out = masked_mse(s.requires_grad_(), t, threshold=math.inf)
    before = counts.read_asked
    (grad,) = torch.autograd.grad(out.loss, s)
    assert not grad.any()
    assert counts.read_asked - before == 4 * 4 + 4  # factors and the loss's own gradient


def test_ties_and_thresholds_for_each_group() -> None:
    s, t = torch.full((3, 4), 2.0), torch.zeros(3, 4)
    limits = torch.tensor([4.0, 3.999, 4.001])
    assert masked_mse(s, t, threshold=limits).kept.tolist() == [0, 1, 0]
    assert masked_mse(s, t, threshold=4.0, granularity="element").kept.tolist() == [0, 0, 0]


@pytest.mark.parametrize("words", GRANULARITIES, ids=str)
def test_nan_is_silent_nowhere(words: dict[str, Any]) -> None:
    s, t, p, n = states(5, 7)
    s[1, 2] = math.nan
    assert math.isnan(masked_mse(s, t, p, n, threshold=1e3, **words).loss.item())
    s[1, 2] = 0.0
    s.requires_grad_()
    out = masked_mse(s, t, p, n, threshold=torch.tensor(math.nan), **words)
    assert math.isnan(out.loss.item())
    assert torch.autograd.grad(out.loss, s)[0].isnan().all()


def test_small_float16_gradients_do_not_vanish() -> None:
    s = (torch.randn(2, 4096) * 1e-3).half()
    out = masked_mse(s.requires_grad_(), torch.zeros_like(s))
    (grad,) = torch.autograd.grad(out.loss * 2.0**15, s)  # as a gradient scaler does
    assert_close("gradient", grad, s.detach().double() * 2 / 8192 * 2.0**15)


@pytest.mark.parametrize("words", GRANULARITIES[1:], ids=str)
def test_the_custom_op_passes_opcheck(words: dict[str, Any]) -> None:
    from expunge.kernels.gpu.masked_mse import masked_mse_op

    s, t, p, n = states(3, 2, 5)
    element, window = words["granularity"] == "element", min(words.get("window", 1), 6)
    torch.library.opcheck(masked_mse_op, (s.requires_grad_(), t, p, n, torch.tensor(1.0), 0.5, window, True, element))


def test_compiled_it_is_one_op_for_all_thresholds() -> None:
    counter = CompileCounter()

    @torch.compile(backend=counter, fullgraph=True)
    def step(s: Tensor, t: Tensor, p: Tensor, n: Tensor, threshold: Tensor) -> Tensor:
        return masked_mse(s, t, p, n, threshold=threshold).loss

    s, t, p, n = states(5, 3)
    s.requires_grad_()
    for threshold in (0.0, 0.5, 2.0, 1e9):
        loss, eager = step(s, t, p, n, torch.tensor(threshold)), masked_mse(s, t, p, n, threshold=threshold).loss
        torch.testing.assert_close(loss, eager)
        torch.testing.assert_close(torch.autograd.grad(loss, s), torch.autograd.grad(eager, s))
    assert counter.frame_count == 1
