"""attach and detach: everything is checked before anything is changed, and everything comes back."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor, nn

from expunge.erase_ops.attach import attach, attachment_of, detach
from expunge.erase_ops.carrier import Carrier
from expunge.erase_ops.entry import CallInfo
from expunge.erase_ops.sites import find_sites
from expunge.erase_ops.spm import Concept, Factors, SPMAdapter
from expunge.errors import (
    AdapterMismatchError,
    ExpungeError,
    InvalidInputError,
    NonFiniteError,
    UnsupportedOperationError,
)

MakeAdapter = Callable[..., SPMAdapter]


@torch.no_grad()
def predict(unet: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return unet(*inputs).sample


def snapshot(unet: nn.Module) -> list[Any]:
    """Identity of everything that attaching may touch."""
    modules = [(name, id(module), type(module)) for name, module in unet.named_modules()]
    parameters = [(name, id(parameter)) for name, parameter in unet.named_parameters()]
    buffers = [name for name, _ in unet.named_buffers()]
    return [modules, parameters, buffers, len(unet._forward_pre_hooks), len(unet._forward_hooks)]


def test_detach_brings_the_very_layers_back(
    unet: UNet2DConditionModel, random_adapter: MakeAdapter, inputs: tuple[Tensor, ...]
) -> None:
    before, base = snapshot(unet), predict(unet, inputs)
    attachment = attach(unet, [random_adapter(unet)], gate=1.0)
    assert attachment_of(unet) is attachment
    assert snapshot(unet)[1] == before[1], "the parameters are shared, not copied"
    assert not torch.equal(predict(unet, inputs), base)
    detach(unet)
    assert snapshot(unet) == before and attachment_of(unet) is None
    assert torch.equal(predict(unet, inputs), base)
    assert not any("forward" in module.__dict__ for module in unet.modules())
    detach(unet)
    assert snapshot(unet) == before


def test_only_the_adapters_sites_are_carried(unet: UNet2DConditionModel, random_adapter: MakeAdapter) -> None:
    adapters = [random_adapter(unet, coverage="cross_attention"), random_adapter(unet, coverage="feed_forward")]
    attach(unet, adapters, gate=1.0)
    carried = {name for name, module in unet.named_modules() if isinstance(module, Carrier)}
    assert carried == {*find_sites(unet, "cross_attention"), *find_sites(unet, "feed_forward")}


def test_sites_outside_the_transformers(
    unet: UNet2DConditionModel, random_adapter: MakeAdapter, inputs: tuple[Tensor, ...]
) -> None:
    # Foreign LoRA files reach everywhere: strided and padded convolutions, and layers whose input has no middle axis.
    paths = ["conv_in", "time_embedding.linear_1", "mid_block.resnets.0.conv1", "mid_block.resnets.0.time_emb_proj"]
    paths += ["down_blocks.0.downsamplers.0.conv", "up_blocks.0.upsamplers.0.conv", "conv_out"]
    adapter = random_adapter(unet, paths=paths, rank=2)
    baked = copy.deepcopy(unet)
    for path, factors in adapter.factors.items():
        weight = baked.get_submodule(path).weight
        weight.data += factors.delta().view_as(weight)
    attachment = attach(unet, [adapter], gate=1.0)
    expected = predict(baked, inputs)
    torch.testing.assert_close(predict(unet, inputs), expected, atol=1e-4, rtol=1e-4)
    with attachment.call(CallInfo(2)):
        torch.testing.assert_close(predict(unet, inputs), expected, atol=1e-4, rtol=1e-4)


def test_adapters_of_different_sites_and_ranks(
    unet: UNet2DConditionModel, random_adapter: MakeAdapter, inputs: tuple[Tensor, ...]
) -> None:
    adapters = [
        random_adapter(unet, seed=1, rank=1, coverage="cross_attention"),
        random_adapter(unet, seed=2, rank=3, alpha=1.5),
        random_adapter(unet, seed=3, rank=2, coverage="attention"),
    ]
    gates, multipliers = torch.tensor([0.5, 0.0, 0.8]), (2.0, 1.0, -1.0)
    baked = copy.deepcopy(unet)
    for adapter, gate, multiplier in zip(adapters, gates, multipliers, strict=True):
        for path, factors in adapter.factors.items():
            weight = baked.get_submodule(path).weight
            weight.data += gate * multiplier * factors.delta().view_as(weight)
    attachment = attach(unet, adapters, multiplier=multipliers, gate_threshold=0.0)
    with attachment.force(gates):
        torch.testing.assert_close(predict(unet, inputs), predict(baked, inputs), atol=1e-4, rtol=1e-4)


def test_attaching_again_replaces(
    unet: UNet2DConditionModel, random_adapter: MakeAdapter, inputs: tuple[Tensor, ...]
) -> None:
    before, base = snapshot(unet), predict(unet, inputs)
    first, second = random_adapter(unet, seed=1), random_adapter(unet, seed=2, coverage="attention")
    attach(unet, [second], gate=1.0)
    expected = predict(unet, inputs)
    attach(unet, [first], gate=1.0)
    attachment = attach(unet, [second], gate=1.0)
    assert attachment_of(unet) is attachment and len(unet._forward_pre_hooks) == 1
    assert torch.equal(predict(unet, inputs), expected)
    detach(unet)
    assert snapshot(unet) == before and torch.equal(predict(unet, inputs), base)


def test_thresholds(unet: UNet2DConditionModel, random_adapter: MakeAdapter) -> None:
    adapters = [random_adapter(unet, threshold=0.75), random_adapter(unet)]
    assert attach(unet, adapters).thresholds.tolist() == [0.75, 0.0]
    assert attach(unet, adapters, gate_threshold=0.25).thresholds.tolist() == [0.25, 0.25]
    assert attach(unet, adapters, gate_threshold=0.0).thresholds.tolist() == [0.0, 0.0]


def test_tokens_by_way_of_combining(unet: UNet2DConditionModel, random_adapter: MakeAdapter) -> None:
    adapter = random_adapter(unet)
    adapter.concept_list[0] = dataclasses.replace(adapter.concept_list[0], token_ids=(5,), all_token_ids=(4, 5))
    states = torch.zeros(1, 7, 32)
    for combine, gate in (("linear", 0.0), ("official", 0.5)):
        attachment = attach(unet, [adapter], combine=combine)
        with attachment.call(CallInfo(1, token_ids=[{4}])) as call, torch.no_grad():
            unet(torch.randn(1, 4, 16, 16), 5, states)
        assert call.records[-1].gates.item() == gate


def changed(adapter: SPMAdapter, path: str, **changes: Any) -> SPMAdapter:
    factors = dict(adapter.factors)
    factors[path] = dataclasses.replace(factors[path], **changes)
    return dataclasses.replace(adapter, factors=factors)


TO_K = "mid_block.attentions.0.transformer_blocks.0.attn2.to_k"
CONV = "mid_block.attentions.0.proj_in"
BAD: dict[str, tuple[Callable[[SPMAdapter], SPMAdapter], type[ExpungeError], str]] = {
    "no such site": (
        lambda a: dataclasses.replace(a, factors=a.factors | {"mid_block.attentions.9.proj_in": a.factors[CONV]}),
        AdapterMismatchError,
        r"1 of 49 .*mid_block\.attentions\.9",
    ),
    "a site that is no layer": (
        lambda a: dataclasses.replace(a, factors=a.factors | {"mid_block": a.factors[CONV]}),
        UnsupportedOperationError,
        "mid_block",
    ),
    "another width": (
        lambda a: changed(a, TO_K, down=torch.randn(1, 31)),
        AdapterMismatchError,
        r"\[r, 32\]",
    ),
    "another kernel": (
        lambda a: changed(a, CONV, down=torch.randn(1, 64, 3, 3), up=torch.randn(64, 1, 1, 1)),
        AdapterMismatchError,
        "proj_in",
    ),
    "a Linear's factors at a convolution": (
        lambda a: changed(a, CONV, down=torch.randn(1, 64), up=torch.randn(64, 1)),
        AdapterMismatchError,
        "proj_in",
    ),
    "NaN": (lambda a: changed(a, TO_K, up=torch.full((64, 1), float("nan"))), NonFiniteError, "to_k"),
    "infinity": (lambda a: changed(a, TO_K, down=torch.full((1, 32), float("inf"))), NonFiniteError, "to_k"),
    "states of another width": (
        lambda a: dataclasses.replace(a, concept_list=[Concept("cat", torch.randn(1, 7, 48))]),
        AdapterMismatchError,
        "48",
    ),
    "states that are not finite": (
        lambda a: dataclasses.replace(a, concept_list=[Concept("cat", torch.full((1, 7, 32), float("nan")))]),
        NonFiniteError,
        "concept states",
    ),
    "states of another length than its neighbours'": (
        lambda a: dataclasses.replace(a, concept_list=[Concept("cat", torch.randn(1, 9, 32))]),
        AdapterMismatchError,
        "one shape",
    ),
    "no states": (
        lambda a: dataclasses.replace(a, concept_list=[Concept("cat")]),
        InvalidInputError,
        "make_concept",
    ),
}


@pytest.mark.parametrize("attached", [False, True])
@pytest.mark.parametrize("bad", BAD)
def test_a_bad_adapter_changes_nothing(
    bad: str, attached: bool, unet: UNet2DConditionModel, random_adapter: MakeAdapter, inputs: tuple[Tensor, ...]
) -> None:
    good = random_adapter(unet)
    if attached:
        attach(unet, [good], gate_threshold=0.9)
    before, out = snapshot(unet), predict(unet, inputs)
    spoil, error, says = BAD[bad]
    with pytest.raises(error, match=says):
        attach(unet, [good, spoil(random_adapter(unet, seed=2))])
    assert snapshot(unet) == before
    assert torch.equal(predict(unet, inputs), out)


@pytest.mark.parametrize(
    "arguments",
    [
        {"combine": "sum"},
        {"multiplier": [1.0, 2.0]},
        {"multiplier": float("inf")},
        {"gate": float("nan")},
        {"gate_threshold": float("nan")},
    ],
)
def test_bad_arguments_change_nothing(
    arguments: dict[str, Any], unet: UNet2DConditionModel, random_adapter: MakeAdapter
) -> None:
    before = snapshot(unet)
    with pytest.raises(InvalidInputError, match=next(iter(arguments))):
        attach(unet, [random_adapter(unet)], **arguments)
    assert snapshot(unet) == before


def test_no_adapter_and_unlike_ranks_are_refused(unet: UNet2DConditionModel, random_adapter: MakeAdapter) -> None:
    with pytest.raises(InvalidInputError, match="adapters"):
        attach(unet, [])
    with pytest.raises(InvalidInputError, match="ranks 1 and 2"):
        attach(unet, [random_adapter(unet), random_adapter(unet, rank=2)], combine="official")
    with pytest.raises(UnsupportedOperationError, match="Linear"):
        attach(nn.Linear(2, 2), [random_adapter(unet)])


def test_a_constant_gate_needs_no_states(
    unet: UNet2DConditionModel, random_adapter: MakeAdapter, inputs: tuple[Tensor, ...]
) -> None:
    adapter = random_adapter(unet)
    attach(unet, [adapter], gate=1.0)
    expected = predict(unet, inputs)
    attach(unet, [dataclasses.replace(adapter, concept_list=[Concept("cat")])], gate=1.0)
    assert torch.equal(predict(unet, inputs), expected)


def test_a_quantised_model_is_refused(unet: UNet2DConditionModel, random_adapter: MakeAdapter) -> None:
    class Linear4bit(nn.Linear):
        pass

    adapter = random_adapter(unet)
    parent = unet.get_submodule(TO_K.rpartition(".")[0])
    parent.to_k = Linear4bit(32, 64, bias=False)
    with pytest.raises(UnsupportedOperationError, match="Linear4bit"):
        attach(unet, [adapter])


def test_sequential_offload_needs_no_weights(unet: UNet2DConditionModel) -> None:
    unet.to("meta")
    adapter = SPMAdapter(
        {TO_K: Factors(torch.randn(1, 32), torch.randn(64, 1))}, [Concept("cat", torch.randn(1, 7, 32))]
    )
    carrier = attach(unet, [adapter]).carriers[0]
    assert carrier.get_buffer("erasure_down").device.type == "cpu"


def test_training_keeps_the_leaves(unet: UNet2DConditionModel, random_adapter: MakeAdapter) -> None:
    adapter = random_adapter(unet)
    attachment = attach(unet, [adapter], trainable=True)
    for carrier in attachment.carriers:
        assert carrier.get_buffer("erasure_down_0") is adapter.factors[carrier.path].down
        assert carrier.get_buffer("erasure_up_0") is adapter.factors[carrier.path].up


def test_training_without_states_takes_forced_gates_only(
    unet: UNet2DConditionModel, random_adapter: MakeAdapter, inputs: tuple[Tensor, ...]
) -> None:
    adapter = dataclasses.replace(random_adapter(unet), concept_list=[Concept("cat")])
    attachment = attach(unet, [adapter], trainable=True)
    with attachment.force(1.0):
        predict(unet, inputs)
    with pytest.raises(InvalidInputError, match="force"):
        predict(unet, inputs)
