"""Trains the AutoencoderKL: 32x32x3 pictures to 8x8x8 latents, whitened inside its own quantisation convolutions.

`StableDiffusionPipeline` knows a scaling factor but no shift, and raw latent means lie far from zero, so the
whitening is folded into `quant_conv` and `post_quant_conv` after training and `scaling_factor` stays 1.
"""

from __future__ import annotations

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from torch import Tensor
from tqdm import tqdm

from expunge.demo.builder import dataset
from expunge.demo.builder.styles import IMAGE_SIZE

STEPS, BATCH, LEARNING_RATE = 3600, 24, 2e-3
LATENT_CHANNELS = 8


def new_vae() -> AutoencoderKL:
    """8 channels a group in every GroupNorm: with 2 the reconstruction stays blurred."""
    return AutoencoderKL(
        in_channels=3,
        out_channels=3,
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=1,
        latent_channels=LATENT_CHANNELS,
        norm_num_groups=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=1.0,
    )


def pictures(output: Path, split: str) -> Tensor:
    """float32 [n, 3, 32, 32] in -1..1, in the order object, style, sample."""
    raw = torch.from_numpy(dataset.load(output, split)).flatten(0, 2)  # [O, S, n, H, W, 3] -> [O*S*n, H, W, 3]
    return raw.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def loss(vae: AutoencoderKL, x: Tensor, generator: torch.Generator) -> Tensor:
    """L1 at full size and at a quarter (which keeps colours right), squared error, and a light KL term."""
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample(generator)).sample
    colour = F.l1_loss(F.avg_pool2d(y, 4), F.avg_pool2d(x, 4))
    return F.l1_loss(y, x) + colour + F.mse_loss(y, x) + 1e-5 * posterior.kl().mean() / LATENT_CHANNELS


@torch.no_grad()
def whiten(vae: AutoencoderKL, x: Tensor) -> None:
    """Folds (z - mean) / std, per channel, into the two 1x1 convolutions around the latent space."""
    latents = torch.cat([vae.encode(part).latent_dist.mode() for part in x.split(256)])  # [n, C, h, w]
    mean = latents.mean((0, 2, 3))
    std = latents.std((0, 2, 3))
    quant, post = vae.quant_conv, vae.post_quant_conv
    c = LATENT_CHANNELS
    # moments = [mean (C), logvar (C)]: scale the mean, shift the log-variance.
    quant.weight[:c] /= std[:, None, None, None]
    quant.bias[:c] = (quant.bias[:c] - mean) / std
    quant.bias[c:] -= 2 * std.log()
    post.bias += (post.weight[:, :, 0, 0] * mean).sum(1)
    post.weight *= std[None, :, None, None]


@torch.no_grad()
def reconstruction_psnr(vae: AutoencoderKL, x: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of decoded latent modes."""
    y = torch.cat([vae.decode(vae.encode(part).latent_dist.mode()).sample for part in x.split(256)])
    mse = ((y.clamp(-1, 1) - x) / 2).square().mean().item()
    return -10 * math.log10(mse)


def train(output: Path, seed: int = 0, steps: int = STEPS) -> float:
    """Trains, whitens and saves `model/vae` (float16 weights); returns the PSNR on held-out pictures in dB."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    vae = new_vae().to(memory_format=torch.channels_last)
    x = pictures(output, "train")
    optimizer = torch.optim.AdamW(vae.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.99), weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=steps, pct_start=0.05)
    progress = tqdm(range(steps), desc="vae", mininterval=5)
    for _ in progress:
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        value = loss(vae, batch, generator)
        optimizer.zero_grad(set_to_none=True)
        value.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        progress.set_postfix(loss=f"{value.item():.4f}", refresh=False)
    vae.eval()
    whiten(vae, x[::7])
    score = reconstruction_psnr(vae, pictures(output, "test"))
    vae.half().save_pretrained(output / "model" / "vae")
    return score
