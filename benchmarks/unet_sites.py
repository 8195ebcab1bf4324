"""The adapted layers of Stable Diffusion's denoisers, read off diffusers' own model without allocating it."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from expunge.erase_ops.sites import find_sites


@dataclass(frozen=True)
class Site:
    """One kind of adapted layer: a linear or 1x1 convolution from `width` to `features` channels."""

    conv: bool
    rows: int
    tokens: int
    width: int
    features: int


def sd15_sites(latents: int = 64, rows: int = 2, length: int = 77) -> Counter[Site]:
    """How often each kind of layer stands in Stable Diffusion 1.5's denoiser, for latents of this side.

    Args:
        latents: height and width of the latents; 64 makes pictures of 512 pixels.
        rows: rows of the batch, 2 for one picture with classifier-free guidance.
        length: positions of the text states.
    """
    with torch.device("meta"):
        unet = UNet2DConditionModel(
            sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
        )
        sample, states = torch.empty(rows, 4, latents, latents), torch.empty(rows, length, 768)
    found: Counter[Site] = Counter()

    def note(layer: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        conv = isinstance(layer, nn.Conv2d)
        features, width = layer.get_parameter("weight").shape[:2]
        tokens = inputs[0].numel() // (rows * width)
        found[Site(conv, rows, tokens, width, features)] += 1

    for layer in find_sites(unet).values():
        layer.register_forward_pre_hook(note)
    with torch.no_grad():
        unet(sample, torch.tensor(1, device="meta"), encoder_hidden_states=states)
    return found
