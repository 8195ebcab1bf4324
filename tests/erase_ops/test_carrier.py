"""One carrier by itself: arithmetic of every kind of layer, what it shares with its layer, where its factors live."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expunge.erase_ops.attach import fill_carrier
from expunge.erase_ops.carrier import (
    IDLE,
    Carrier,
    ErasedConv2d,
    ErasedLinear,
    Group,
    Running,
    check_carriable,
    make_carrier,
)
from expunge.erase_ops.entry import Settings
from expunge.erase_ops.merge import is_mergeable, merged_weight, plan
from expunge.erase_ops.spm import Concept, Factors, SPMAdapter
from expunge.errors import ErasureLostError, UnsupportedOperationError

LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(6, 5), (3, 4, 6)),
    "linear without bias": (lambda: nn.Linear(6, 5, bias=False), (3, 6)),
    "pointwise": (lambda: nn.Conv2d(6, 5, 1), (3, 6, 4, 4)),
    "square": (lambda: nn.Conv2d(6, 5, 3, padding=1), (3, 6, 4, 4)),
    "strided, dilated": (lambda: nn.Conv2d(6, 5, (3, 2), stride=(2, 1), padding=(2, 1), dilation=2), (3, 6, 7, 7)),
    "same": (lambda: nn.Conv2d(6, 5, 3, padding="same"), (3, 6, 4, 4)),
    "reflect": (lambda: nn.Conv2d(6, 5, 3, padding=1, padding_mode="reflect"), (3, 6, 4, 4)),
    "circular": (lambda: nn.Conv2d(6, 5, (3, 1), padding=(2, 0), padding_mode="circular"), (3, 6, 4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, padding=1, groups=2), (3, 6, 4, 4)),
}


def factors_for(layer: Any, rank: int, alpha: float = 1.0) -> Factors:
    if isinstance(layer, nn.Conv2d):
        down = torch.randn(rank, layer.in_channels, *layer.kernel_size)
        return Factors(down, torch.randn(layer.out_channels, rank, 1, 1), alpha)
    return Factors(torch.randn(rank, layer.in_features), torch.randn(layer.out_features, rank), alpha)


def carry(layer: nn.Module, *factors: Factors, multiplier: float = 1.0, **settings: Any) -> Carrier:
    adapters = [SPMAdapter({"layer": one}, [Concept("cat")]) for one in factors]
    carrier = make_carrier(layer, Group(), Running(), 0, "layer")
    return fill_carrier(carrier, adapters, Settings(multiplier=(multiplier,) * len(factors), **settings))


def expected(layer: Any, x: Tensor, factors: tuple[Factors, ...], gates: Tensor, multiplier: float) -> Tensor:
    """Row by row: the layer, plus each SPM's delta as a layer of its own (dense, ungrouped, without bias)."""
    rows = []
    for row, gate in zip(x.split(1), gates, strict=True):
        out = layer(row)
        for g, one in zip(gate, factors, strict=True):
            delta = copy.deepcopy(layer)
            delta.bias, delta.groups = None, 1
            delta.weight = nn.Parameter(one.delta() * multiplier)
            out = out + g * delta(row)
        rows.append(out)
    return torch.cat(rows)


@pytest.mark.parametrize("name", LAYERS)
@torch.no_grad()
def test_every_layer_in_every_way(name: str) -> None:
    make, shape = LAYERS[name]
    layer, x = make(), torch.randn(shape)
    factors = (factors_for(layer, 2, alpha=0.5), factors_for(layer, 1))
    carrier = carry(layer, *factors, multiplier=1.5)
    gates = torch.rand(3, 2)
    carrier.running.work = plan([carrier], gates, [0, 1], merge=False, dtype=torch.float32).work
    torch.testing.assert_close(carrier(x), expected(layer, x, factors, gates, 1.5), atol=1e-5, rtol=1e-5)
    carrier.running.work = plan([carrier], gates[:1], [0, 1], merge=True, dtype=torch.float32).work
    assert (carrier.running.work[0].weight is None) is (name == "grouped"), (
        "only a grouped convolution cannot be merged"
    )
    torch.testing.assert_close(
        carrier(x), expected(layer, x, factors, gates[:1].expand(3, 2), 1.5), atol=1e-5, rtol=1e-5
    )
    carrier.running.work = plan([carrier], torch.tensor([[0.0, 0.3]]), [1], merge=False, dtype=torch.float32).work
    assert carrier.running.work[0].lowrank is not None and len(carrier.running.work[0].lowrank[0]) == 1, (
        "SPM 0 was dropped"
    )
    torch.testing.assert_close(
        carrier(x), expected(layer, x, factors, torch.tensor([[0.0, 0.3]]).expand(3, 2), 1.5), atol=1e-5, rtol=1e-5
    )
    carrier.running.work = [IDLE]
    assert torch.equal(carrier(x), layer(x))


@pytest.mark.parametrize("rank", [1, 2])
@torch.no_grad()
def test_official_sums_factors(rank: int) -> None:
    layer, x = nn.Linear(6, 5), torch.randn(2, 3, 6)
    a, b = factors_for(layer, rank, alpha=rank), factors_for(layer, rank, alpha=rank)
    carrier = carry(layer, a, b, combine="official")
    g, h = 0.25, 0.5
    delta = (g * a.up + h * b.up) @ (g * a.down + h * b.down)
    for merge in (False, True):
        carrier.running.work = plan([carrier], torch.tensor([[g, h]]), [0, 1], merge=merge, dtype=torch.float32).work
        torch.testing.assert_close(carrier(x), layer(x) + x @ delta.T, atol=1e-5, rtol=1e-5)


def test_no_work_no_output() -> None:
    carrier = carry(nn.Linear(3, 2), factors_for(nn.Linear(3, 2), 1))
    with pytest.raises(ErasureLostError, match="layer"):
        carrier(torch.randn(1, 3))


def test_work_belongs_to_a_thread() -> None:
    carrier = carry(nn.Linear(3, 2), factors_for(nn.Linear(3, 2), 1))
    carrier.running.work = [IDLE]
    raised: list[Exception] = []

    def run() -> None:
        try:
            carrier(torch.randn(1, 3))
        except ErasureLostError as error:
            raised.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert len(raised) == 1
    carrier(torch.randn(1, 3))
    with pytest.raises(ErasureLostError):
        copy.deepcopy(carrier)(torch.randn(1, 3))


def test_parameters_and_hooks_are_the_layers_own() -> None:
    layer = nn.Linear(3, 2)
    handle = layer.register_forward_hook(lambda module, args, output: output * 0)
    carrier = carry(layer, factors_for(layer, 1))
    carrier.running.work = [IDLE]
    assert carrier.weight is layer.weight and carrier.bias is layer.bias
    assert not carrier(torch.randn(1, 3)).any()
    handle.remove()
    assert carrier(torch.randn(1, 3)).any()
    carrier.load_state_dict({name: tensor + 1 for name, tensor in layer.state_dict().items()}, assign=True)
    assert carrier.weight is layer.weight
    carrier.to(torch.float64)
    assert layer.weight.dtype == torch.float64


def test_factors_are_buffers_outside_the_state_dict() -> None:
    layer = nn.Linear(3, 2)
    carrier = carry(layer, factors_for(layer, 2))
    assert list(carrier.state_dict()) == list(layer.state_dict())
    assert {name: tuple(buffer.shape) for name, buffer in carrier.named_buffers()} == {
        "erasure_down": (2, 3),
        "erasure_up": (2, 2),
    }
    assert not dict(layer.named_buffers())
    assert "erasure_columns=2" in repr(carrier)


def test_factors_keep_float32_and_follow_the_device() -> None:
    layer = nn.Linear(3, 2)
    carrier = carry(layer, factors_for(layer, 1))
    down = carrier.get_buffer("erasure_down")
    before = down.clone()
    carrier.half().to(torch.float8_e4m3fn).float()
    assert carrier.get_buffer("erasure_down") is down and torch.equal(down, before)
    carrier.to("meta")
    assert carrier.get_buffer("erasure_down").device.type == "meta" and carrier.weight.device.type == "meta"


def test_trainable_factors_are_the_very_tensors() -> None:
    layer = nn.Conv2d(3, 2, 3)
    factors = factors_for(layer, 2, alpha=1.0)
    factors.down.requires_grad_()
    factors.up.requires_grad_()
    carrier = carry(layer, factors, trainable=True)
    assert carrier.get_buffer("erasure_down_0") is factors.down
    carrier.float().to("cpu")
    assert carrier.get_buffer("erasure_up_0") is factors.up
    x = torch.randn(2, 3, 5, 5, requires_grad=True)
    gates = torch.tensor([[0.5], [0.0]], requires_grad=True)
    carrier.running.work = plan([carrier], gates, None, merge=False, dtype=torch.float32).work
    carrier(x).square().sum().backward()
    assert all(tensor.grad is not None and tensor.grad.any() for tensor in (factors.down, factors.up, gates, x))
    weight = copy.deepcopy(layer)
    weight.weight.data += 0.5 * factors.delta().detach()
    torch.testing.assert_close(carrier(x)[0], weight(x)[0], atol=1e-5, rtol=1e-5)


def test_hosts_that_build_by_type_get_a_plain_layer() -> None:
    # PEFT's LoRA for a convolution makes its own layers as type(base_layer)(...).
    assert type(ErasedConv2d(3, 2, kernel_size=1)) is nn.Conv2d
    assert type(ErasedLinear(3, 2)) is nn.Linear


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_merging_rounds_once(dtype: torch.dtype) -> None:
    weight, down, up = torch.randn(8, 6).to(dtype), torch.randn(3, 6), torch.randn(8, 3)
    before = weight.clone()
    exact = weight.double() + (up * 0.5).double() @ down.double()
    merged = merged_weight(weight, down, up, torch.full((3,), 0.5))
    assert merged.dtype == dtype and torch.equal(weight, before)
    assert (merged.double() - exact).abs().max() <= exact.abs().max() * max(torch.finfo(dtype).eps, 1e-6)


def test_what_cannot_be_merged_now() -> None:
    layer = nn.Linear(3, 2)
    carrier = carry(layer, factors_for(layer, 1))
    cpu = torch.device("cpu")
    assert is_mergeable(carrier, cpu)
    assert not is_mergeable(carrier, torch.device("meta"))
    carrier.to(torch.float8_e4m3fn)
    assert not is_mergeable(carrier, cpu), "float8 is a storage format"


def test_layers_that_compute_something_else_are_refused() -> None:
    class Scaled(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    integer = nn.Linear(2, 2)
    integer.weight = nn.Parameter(torch.ones(2, 2, dtype=torch.int8), requires_grad=False)
    parametrised = nn.utils.parametrizations.weight_norm(nn.Linear(2, 2))
    for layer in (Scaled(2, 2), nn.Conv1d(2, 2, 1), integer, parametrised):
        with pytest.raises(UnsupportedOperationError, match=r"some\.path"):
            check_carriable("some.path", layer)
    check_carriable("some.path", nn.Conv2d(2, 2, 1))
