"""Names of a diffusers UNet's layers, and how kohya files flatten them.

kohya (and the SPM reference) write the dotted path of a module with "_" for ".", which cannot be split back by itself:
`to_out_0` is `to_out.0` while `proj_in` is one name. The grammar below lists what UNet2DConditionModel is made of, so
that the way back is exact. Files made by kohya's own SDXL trainer use the names of the original (SGM) UNet instead,
which counts its blocks in one row; those are mapped first.
"""

from __future__ import annotations

import re

_N = r"(0|[1-9]\d{0,2})"
_ATTENTION = (
    rf"(attentions)_{_N}_(?:"
    r"(proj_in|proj_out)|"
    rf"(transformer_blocks)_{_N}_(?:"
    r"(attn1|attn2)_(?:(to_q|to_k|to_v)|(to_out)_(0))|"
    r"(ff)_(net)_(?:(0)_(proj)|(2))))"
)
_RESNET = rf"(resnets)_{_N}_(conv1|conv2|conv_shortcut|time_emb_proj)"
_RESAMPLER = rf"(downsamplers|upsamplers)_{_N}_(conv)"
# Each group is one part of the dotted path.
_UNET = re.compile(
    rf"(?:(down_blocks|up_blocks)_{_N}|(mid_block))_(?:{_ATTENTION}|{_RESNET}|{_RESAMPLER})"
    r"|(conv_in|conv_out)|(time_embedding|add_embedding)_(linear_1|linear_2)",
    re.ASCII,
)

_SGM_BLOCK = re.compile(rf"(input_blocks|output_blocks)_{_N}_{_N}_(.+)", re.ASCII)
_SGM_MIDDLE = re.compile(r"middle_block_([012])_(.+)", re.ASCII)
_SGM_RESNET = {
    "in_layers_2": "conv1",
    "emb_layers_1": "time_emb_proj",
    "out_layers_3": "conv2",
    "skip_connection": "conv_shortcut",
}
_SGM_TOP = {
    "input_blocks_0_0": "conv_in",
    "out_2": "conv_out",
    "time_embed_0": "time_embedding_linear_1",
    "time_embed_2": "time_embedding_linear_2",
    "label_emb_0_0": "add_embedding_linear_1",
    "label_emb_0_2": "add_embedding_linear_2",
}


def flatten(path: str) -> str:
    """`path` as kohya files write it."""
    return path.replace(".", "_")


def unflatten(flat: str) -> str | None:
    """The dotted path of a diffusers UNet's layer.

    Args:
        flat: the path with "_" for ".", in diffusers' block names or in the original SDXL UNet's.

    Returns:
        The dotted path, or None if no layer of a diffusers UNet has such a name.
    """
    match = _UNET.fullmatch(_from_sgm(flat))
    return None if match is None else ".".join(part for part in match.groups() if part is not None)


def is_sgm(flat: str) -> bool:
    """Whether the name is one of the original (SGM) UNet's, which among kohya files only those for SDXL use."""
    return _from_sgm(flat) != flat


def _from_sgm(flat: str) -> str:
    if flat in _SGM_TOP:
        return _SGM_TOP[flat]
    middle = _SGM_MIDDLE.fullmatch(flat)
    if middle is not None:  # resnet, attention, resnet
        index, rest = int(middle[1]), middle[2]
        return f"mid_block_attentions_0_{rest}" if index == 1 else _resnet("mid_block", index // 2, rest) or flat
    match = _SGM_BLOCK.fullmatch(flat)
    if match is None:
        return flat
    index, part, rest = int(match[2]), int(match[3]), match[4]
    if match[1] == "input_blocks":  # 0 is conv_in; then two layers and a downsampler a block
        block, layer = divmod(index - 1, 3)
        found = _down_layer(f"down_blocks_{block}", layer, part, rest) if index > 0 else None
    else:  # three layers a block, the last with an upsampler
        block, layer = divmod(index, 3)
        found = _up_layer(f"up_blocks_{block}", layer, part, rest)
    return found or flat


def _down_layer(block: str, layer: int, part: int, rest: str) -> str | None:
    if layer == 2:
        return f"{block}_downsamplers_0_conv" if (part, rest) == (0, "op") else None
    return _resnet(block, layer, rest) if part == 0 else _attention(block, layer, part, rest)


def _up_layer(block: str, layer: int, part: int, rest: str) -> str | None:
    if rest == "conv":  # beside an attention it is the third part, without one the second
        return f"{block}_upsamplers_0_conv" if layer == 2 and part in (1, 2) else None
    return _resnet(block, layer, rest) if part == 0 else _attention(block, layer, part, rest)


def _attention(block: str, layer: int, part: int, rest: str) -> str | None:
    return f"{block}_attentions_{layer}_{rest}" if part == 1 else None


def _resnet(block: str, layer: int, rest: str) -> str | None:
    name = _SGM_RESNET.get(rest)
    return None if name is None else f"{block}_resnets_{layer}_{name}"
