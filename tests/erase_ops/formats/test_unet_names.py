"""kohya names: exact for every layer below a transformer of SD 1.x, SD 2.x, SDXL, and for the rest of the UNet."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import nn

from expunge.erase_ops.formats.unet_names import flatten, is_sgm, unflatten

SD1: dict[str, Any] = {"cross_attention_dim": 768}
SD2: dict[str, Any] = {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
}
SDXL: dict[str, Any] = {
    "cross_attention_dim": 2048,
    "block_out_channels": (320, 640, 1280),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
}


def layers(config: dict[str, Any]) -> Iterator[str]:
    with torch.device("meta"):
        unet = UNet2DConditionModel(sample_size=64, **config)
    for path, module in unet.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            yield path


@pytest.mark.parametrize(("config", "sites"), [(SD1, 192), (SD2, 192), (SDXL, 722)], ids=["sd1", "sd2", "sdxl"])
def test_every_layer_is_named_exactly(config: dict[str, Any], sites: int) -> None:
    paths = list(layers(config))
    assert sum(".attentions." in path for path in paths) == sites  # the published count of adapted layers
    assert {path: unflatten(flatten(path)) for path in paths} == {path: path for path in paths}
    assert not any(is_sgm(flatten(path)) for path in paths)


def test_sgm_names_agree_with_diffusers() -> None:
    """Oracle: diffusers' own mapping of kohya's SDXL names, for every attention layer of the SDXL UNet."""
    from diffusers.loaders.lora_conversion_utils import _maybe_map_sgm_blocks_to_diffusers

    paths = {path for path in layers(SDXL) if ".attentions." in path}
    config = type("Config", (), {"layers_per_block": 2})
    seen = set()
    for flat in sgm_attention_names(sorted(paths)):
        key = f"lora_unet_{flat}.alpha"
        # It renumbers the blocks only; their names are replaced later, in the midst of other work.
        expected = next(iter(_maybe_map_sgm_blocks_to_diffusers({key: 0}, config)))
        for sgm, name in (
            ("input_blocks", "down_blocks"),
            ("middle_block", "mid_block"),
            ("output_blocks", "up_blocks"),
        ):
            expected = expected.replace(sgm, name)
        path = unflatten(flat)
        assert path is not None and f"lora_unet_{flatten(path)}.alpha" == expected
        assert is_sgm(flat)
        seen.add(path)
    assert seen == paths


def sgm_attention_names(paths: list[str]) -> Iterator[str]:
    """The original UNet's names of attention layers: blocks counted in one row, three (down: two and a sampler)."""
    for path in paths:
        block, *rest = path.split(".")
        if block == "mid_block":
            yield "middle_block_1_" + "_".join(rest[2:])
            continue
        index, layer, tail = int(rest[0]), int(rest[2]), "_".join(rest[3:])
        first, name = (1, "input_blocks") if block == "down_blocks" else (0, "output_blocks")
        yield f"{name}_{first + 3 * index + layer}_1_{tail}"


@pytest.mark.parametrize(
    ("flat", "path"),
    [
        ("input_blocks_0_0", "conv_in"),
        ("input_blocks_1_0_in_layers_2", "down_blocks.0.resnets.0.conv1"),
        ("input_blocks_3_0_op", "down_blocks.0.downsamplers.0.conv"),
        ("middle_block_2_out_layers_3", "mid_block.resnets.1.conv2"),
        ("output_blocks_2_1_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_2_2_conv", "up_blocks.0.upsamplers.0.conv"),
        ("output_blocks_3_0_skip_connection", "up_blocks.1.resnets.0.conv_shortcut"),
        ("output_blocks_8_0_emb_layers_1", "up_blocks.2.resnets.2.time_emb_proj"),
        ("label_emb_0_2", "add_embedding.linear_2"),
        ("out_2", "conv_out"),
    ],
)
def test_sgm_names_outside_attention(flat: str, path: str) -> None:
    assert unflatten(flat) == path


@pytest.mark.parametrize(
    "flat",
    [
        "",
        "down_blocks_0",
        "down_blocks_00_attentions_0_proj_in",
        "down_blocks_0_attentions_0_proj_in_",
        "down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_out",
        "down_blocks_0_attentions_0_transformer_blocks_0_attn3_to_q",
        "input_blocks_0_1_proj_in",
        "input_blocks_3_1_proj_in",
        "middle_block_0_proj_in",
        "output_blocks_0_1_conv",
        "transformer_blocks_0_attn_to_q",
        "down_blocks_٣_attentions_0_proj_in",
        "../../x",
    ],
)
def test_anything_else_is_no_layer(flat: str) -> None:
    assert unflatten(flat) is None
