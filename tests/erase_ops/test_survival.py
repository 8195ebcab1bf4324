"""What an attached erasure survives: after each operation the denoiser equals one with the erasure baked in, or raises.

The oracle is a copy of the UNet whose weights hold W + delta, put through the same operation.
"""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from accelerate.hooks import AlignDevicesHook, add_hook_to_module, remove_hook_from_module
from diffusers import UNet2DConditionModel
from peft import LoraConfig
from torch import Tensor, nn

from expunge.erase_ops.attach import attach, attachment_of, detach
from expunge.erase_ops.entry import CallInfo
from expunge.erase_ops.spm import SPMAdapter
from expunge.errors import ErasureLostError

Predict = Callable[[Any, tuple[Tensor, ...]], Tensor]
Bake = Callable[[UNet2DConditionModel, SPMAdapter], UNet2DConditionModel]
Kept = Callable[..., None]


def style_lora(unet: UNet2DConditionModel, rank: int = 3) -> None:
    """A LoRA of another purpose, the same on every copy."""
    unet.add_adapter(LoraConfig(r=rank, target_modules=["to_q", "to_v", "proj_in", "to_out.0"]), adapter_name="style")
    generator = torch.Generator().manual_seed(5)
    for name, parameter in unet.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2


OPERATIONS: dict[str, Callable[[UNet2DConditionModel], Any]] = {
    "nothing": lambda unet: None,
    "to": lambda unet: unet.to("cpu", torch.float64).to(torch.float32),
    "half and back": lambda unet: unet.half().float(),
    "channels_last": lambda unet: unet.to(memory_format=torch.channels_last),
    "attention slicing": lambda unet: unet.set_attention_slice("auto"),
    "freeu": lambda unet: unet.enable_freeu(0.9, 0.2, 1.2, 1.4),
    "default processors": lambda unet: unet.set_default_attn_processor(),
    "gradient checkpointing": lambda unet: unet.enable_gradient_checkpointing(),
    "eval and train": lambda unet: unet.train().eval(),
    "fuse and unfuse qkv": lambda unet: (unet.fuse_qkv_projections(), unet.unfuse_qkv_projections()),
    "reload weights": lambda unet: unet.load_state_dict(
        {name: tensor * 1.01 for name, tensor in unet.state_dict().items()}, strict=True
    ),
    "reload weights, assigned": lambda unet: unet.load_state_dict(
        {name: tensor * 1.01 for name, tensor in unet.state_dict().items()}, strict=True, assign=True
    ),
    "model offload": lambda unet: cpu_offload_with_hook(unet, torch.device("cpu")),
    "sequential offload": lambda unet: cpu_offload(unet, torch.device("cpu")),
    "lora": style_lora,
    "lora, disabled": lambda unet: (style_lora(unet), unet.disable_adapters()),
    "lora, deleted": lambda unet: (style_lora(unet), unet.delete_adapters("style")),
    "lora, fused": lambda unet: (style_lora(unet), unet.fuse_lora()),
    "lora, fused and unloaded": lambda unet: (style_lora(unet), unet.fuse_lora(), unet.unload_lora()),
    "lora, unfused and unloaded": lambda unet: (
        style_lora(unet),
        unet.fuse_lora(),
        unet.unfuse_lora(),
        unet.unload_lora(),
    ),
    "forward chunking": lambda unet: [
        block.set_chunk_feed_forward(4, dim=1) for block in unet.modules() if hasattr(block, "set_chunk_feed_forward")
    ],
}
# After these the oracle is not the same operation on the baked copy: it would overwrite what is baked in.
RELOADS = {"reload weights", "reload weights, assigned"}


def oracle_after(operation: str, unet: UNet2DConditionModel, adapter: SPMAdapter, bake: Bake) -> UNet2DConditionModel:
    if operation in RELOADS:
        changed = copy.deepcopy(unet)
        OPERATIONS[operation](changed)
        return bake(changed, adapter)
    if operation in ("half and back", "sequential offload", "model offload"):
        changed = copy.deepcopy(unet)
        if operation == "half and back":
            changed.half().float()  # the base weights lose precision, the erasure's factors do not
        return bake(changed, adapter)
    baked = bake(unet, adapter)
    OPERATIONS[operation](baked)
    return baked


@pytest.mark.parametrize("operation", OPERATIONS)
def test_erase_then_operate(
    operation: str,
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    bake: Bake,
    assert_kept: Kept,
) -> None:
    oracle = oracle_after(operation, unet, adapter, bake)
    attach(unet, [adapter], gate=1.0)
    OPERATIONS[operation](unet)
    assert_kept(unet, oracle, inputs, 1e-4)


@pytest.mark.parametrize("operation", OPERATIONS)
def test_operate_then_erase_then_restore(
    operation: str,
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    assert_kept: Kept,
) -> None:
    oracle = oracle_after(operation, unet, adapter, bake)
    OPERATIONS[operation](unet)
    before = predict(unet, inputs)
    attach(unet, [adapter], gate=1.0)
    assert_kept(unet, oracle, inputs, 1e-4)
    detach(unet)
    assert torch.equal(predict(unet, inputs), before)


def test_deepcopy_is_erased_by_itself(
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    assert_kept: Kept,
) -> None:
    oracle, base = bake(unet, adapter), copy.deepcopy(unet)
    attach(unet, [adapter], gate=1.0)
    clone = copy.deepcopy(unet)
    assert attachment_of(clone) is not attachment_of(unet)
    detach(unet)
    for parameter in unet.parameters():
        parameter.data.zero_()
    assert_kept(clone, oracle, inputs)
    detach(clone)
    assert torch.equal(predict(clone, inputs), predict(base, inputs))


def test_pickle(
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    assert_kept: Kept,
    predict_merged: Predict,
) -> None:
    oracle, base = bake(unet, adapter), predict(unet, inputs)
    attach(unet, [adapter], gate=1.0)
    predict_merged(unet, inputs)
    clone = pickle.loads(pickle.dumps(unet))
    assert_kept(clone, oracle, inputs)
    assert_kept(unet, oracle, inputs)
    buffer = io.BytesIO()
    torch.save(unet, buffer)
    buffer.seek(0)
    assert_kept(torch.load(buffer, weights_only=False), oracle, inputs)
    detach(clone)
    assert torch.equal(predict(clone, inputs), base)


def test_save_pretrained_writes_the_clean_base(
    unet: UNet2DConditionModel, adapter: SPMAdapter, inputs: tuple[Tensor, ...], tmp_path: Path, predict: Predict
) -> None:
    base, keys = predict(unet, inputs), list(unet.state_dict())
    attach(unet, [adapter], gate=1.0)
    assert list(unet.state_dict()) == keys
    unet.save_pretrained(tmp_path)
    assert torch.equal(predict(UNet2DConditionModel.from_pretrained(tmp_path), inputs), base)
    fresh = UNet2DConditionModel.from_config(unet.config).eval()
    fresh.load_state_dict(unet.state_dict(), strict=True)
    assert attachment_of(fresh) is None and torch.equal(predict(fresh, inputs), base)


def test_accelerates_leaf_hooks_before_and_after(
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    assert_kept: Kept,
) -> None:
    oracle, base = bake(unet, adapter), predict(unet, inputs)
    for module in unet.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook(torch.device("cpu")))
    attach(unet, [adapter], gate=1.0)
    assert_kept(unet, oracle, inputs)
    carriers = attachment_of(unet).carriers  # type: ignore[union-attr]
    assert all(isinstance(carrier._hf_hook, AlignDevicesHook) for carrier in carriers)
    remove_hook_from_module(unet, recurse=True)
    assert_kept(unet, oracle, inputs)
    for module in unet.modules():
        if not list(module.children()):
            add_hook_to_module(module, AlignDevicesHook(torch.device("cpu")))
    assert_kept(unet, oracle, inputs)
    detach(unet)
    assert torch.equal(predict(unet, inputs), base)
    remove_hook_from_module(unet, recurse=True)
    assert torch.equal(predict(unet, inputs), base)


def test_sequential_offload_comes_off_again(
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    assert_kept: Kept,
) -> None:
    oracle, base = bake(unet, adapter), predict(unet, inputs)
    cpu_offload(unet, torch.device("cpu"))
    attach(unet, [adapter], gate=1.0)
    assert all(parameter.device.type == "meta" for parameter in unet.parameters())
    assert_kept(unet, oracle, inputs)
    remove_hook_from_module(unet, recurse=True)
    assert all(parameter.device.type == "cpu" for parameter in unet.parameters())
    assert_kept(unet, oracle, inputs)
    detach(unet)
    assert torch.equal(predict(unet, inputs), base)


@pytest.mark.parametrize("first", ["erase", "cast"])
def test_layerwise_casting(
    first: str,
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    assert_kept: Kept,
) -> None:
    def cast(model: UNet2DConditionModel) -> None:
        model.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    plain = copy.deepcopy(unet)
    cast(plain)
    base = predict(plain, inputs)
    rounded = copy.deepcopy(unet)  # the oracle: base weights rounded to float8, the erasure not
    for name, parameter in rounded.named_parameters():
        parameter.data = plain.get_parameter(name).data.float()
    oracle = bake(rounded, adapter)
    for operation in (cast, lambda model: attach(model, [adapter], gate=1.0))[:: 1 if first == "cast" else -1]:
        operation(unet)
    assert_kept(unet, oracle, inputs, 1e-4)
    detach(unet)
    assert torch.equal(predict(unet, inputs), base)
    assert (
        unet.get_submodule("mid_block.attentions.0.transformer_blocks.0.attn1.to_q").weight.dtype == torch.float8_e4m3fn
    )


@pytest.mark.parametrize("order", ["lora first", "erase first"])
def test_lora_through_every_change(
    order: str,
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    bake: Bake,
    assert_kept: Kept,
) -> None:
    oracle = bake(unet, adapter)
    steps: list[Callable[[UNet2DConditionModel], Any]] = [
        lambda u: u.disable_adapters(),
        lambda u: u.enable_adapters(),
        lambda u: u.set_adapters(["style"], [0.3]),
        lambda u: u.fuse_lora(),
        lambda u: u.unfuse_lora(),
        lambda u: u.unload_lora(),
    ]
    style_lora(oracle)
    if order == "lora first":
        style_lora(unet)
    attach(unet, [adapter], gate=1.0)
    if order == "erase first":
        style_lora(unet)
    for step in steps:
        assert_kept(unet, oracle, inputs, 1e-4)
        step(unet)
        step(oracle)
    assert_kept(unet, oracle, inputs, 1e-4)


def test_restore_leaves_a_lora_in_place(
    unet: UNet2DConditionModel, adapter: SPMAdapter, inputs: tuple[Tensor, ...], predict: Predict
) -> None:
    styled = copy.deepcopy(unet)
    style_lora(styled)
    attach(unet, [adapter], gate=1.0)
    style_lora(unet)
    detach(unet)
    assert torch.equal(predict(unet, inputs), predict(styled, inputs))


def test_bfloat16(
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    predict_merged: Predict,
) -> None:
    exact = predict(bake(unet, adapter), inputs)
    attach(unet, [adapter], gate=1.0)
    unet.to(torch.bfloat16)
    narrow = tuple(tensor.bfloat16() if tensor.is_floating_point() else tensor for tensor in inputs)
    for out in (predict(unet, narrow), predict_merged(unet, narrow)):
        assert (out.float() - exact).norm() / exact.norm() < 0.05
    assert all(buffer.dtype == torch.float32 for name, buffer in unet.named_buffers() if "erasure_" in name)


def test_autocast(
    unet: UNet2DConditionModel,
    adapter: SPMAdapter,
    inputs: tuple[Tensor, ...],
    predict: Predict,
    bake: Bake,
    predict_merged: Predict,
) -> None:
    exact = predict(bake(unet, adapter), inputs)
    attach(unet, [adapter], gate=1.0)
    with torch.autocast("cpu", torch.bfloat16):
        for out in (predict(unet, inputs), predict_merged(unet, inputs)):
            assert (out.float() - exact).norm() / exact.norm() < 0.05


LOSSES: dict[str, tuple[Callable[[UNet2DConditionModel], Any], str]] = {
    "fused qkv": (lambda unet: unet.fuse_qkv_projections(), "fused"),
    "replaced block": (
        lambda unet: setattr(unet, "mid_block", UNet2DConditionModel.from_config(unet.config).mid_block),
        "replaced",
    ),
    "replaced layer": (
        lambda unet: setattr(unet.mid_block.attentions[0], "proj_in", nn.Conv2d(64, 64, 1)),
        "mid_block.attentions.0.proj_in",
    ),
    "pre-hooks cleared": (lambda unet: unet._forward_pre_hooks.clear(), "gates"),
    "hooks cleared": (lambda unet: unet._forward_hooks.clear(), "hooks"),
    "carrier of another model": (
        lambda unet: setattr(unet, "mid_block", copy.deepcopy(unet).mid_block),
        "replaced",
    ),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_lost_erasure_raises_before_an_image_is_made(
    loss: str, unet: UNet2DConditionModel, adapter: SPMAdapter, inputs: tuple[Tensor, ...], predict: Predict
) -> None:
    operation, says = LOSSES[loss]
    attachment = attach(unet, [adapter], gate=1.0)
    operation(unet)
    with pytest.raises(ErasureLostError, match=says):
        predict(unet, inputs)
    with pytest.raises(ErasureLostError):
        attachment.check(unet)
    if "hooks" not in loss:
        with attachment.call(CallInfo(2)), pytest.raises(ErasureLostError, match=says):
            predict(unet, inputs)


def test_parts_of_an_erased_denoiser_raise_by_themselves(
    unet: UNet2DConditionModel, adapter: SPMAdapter, inputs: tuple[Tensor, ...]
) -> None:
    attach(unet, [adapter], gate=1.0)
    with pytest.raises(ErasureLostError, match="mid_block"):
        unet.mid_block(torch.randn(1, 64, 8, 8), torch.randn(1, 128), encoder_hidden_states=inputs[2][:1])


def test_fused_before_erasing_is_refused(unet: UNet2DConditionModel, adapter: SPMAdapter) -> None:
    from expunge.errors import UnsupportedOperationError

    unet.fuse_qkv_projections()
    with pytest.raises(UnsupportedOperationError, match="unfuse"):
        attach(unet, [adapter], gate=1.0)
    assert attachment_of(unet) is None
