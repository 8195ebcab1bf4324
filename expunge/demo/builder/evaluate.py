"""Scores the finished model: every object in every style at held-out seeds, read by the classifier."""

from __future__ import annotations

from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from expunge.demo.builder import text
from expunge.demo.builder.concepts import OBJECTS, STYLES
from expunge.demo.picture_classifier import PictureClassifier
from expunge.demo.scoring import generate

SEEDS_PER_PAIR, FIRST_SEED = 4, 90_000


def assemble(output: Path) -> StableDiffusionPipeline:
    """Writes `model_index.json` beside the trained parts, so that the folder opens with diffusers alone."""
    from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel
    from transformers import CLIPTextModel, CLIPTokenizer

    model = output / "model"
    pipe = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(model / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(model / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(model / "tokenizer"),
        unet=UNet2DConditionModel.from_pretrained(model / "unet"),
        scheduler=DDIMScheduler.from_pretrained(model / "scheduler"),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_config(model)
    return StableDiffusionPipeline.from_pretrained(model)


def evaluate(output: Path, seeds_per_pair: int = SEEDS_PER_PAIR) -> dict[str, Any]:
    """Object and style accuracy, in the mean, for each object and for each style; writes `samples.png`."""
    pipe = assemble(output)
    model = PictureClassifier.from_pretrained(output / "classifier")
    wanted = [(o, s, k) for o in OBJECTS for s in STYLES for k in range(seeds_per_pair)]
    prompts = [f"a {o} in {s} style" if o[0] not in "aeiou" else f"an {o} in {s} style" for o, s, _ in wanted]
    seeds = [FIRST_SEED + i for i in range(len(wanted))]
    with tqdm(total=len(prompts), desc="samples") as bar:
        images = generate(pipe, prompts, seeds, on_batch=lambda n: bar.update(n) and None)
    reading = model.classify(images)
    hits: dict[str, dict[str, list[bool]]] = {"object": defaultdict(list), "style": defaultdict(list)}
    for (o, s, _), seen_object, seen_style in zip(wanted, reading.objects, reading.styles, strict=True):
        hits["object"][o].append(seen_object == o)
        hits["style"][s].append(seen_style == s)
    sample_sheet(images, output / "samples.png", seeds_per_pair)
    return {
        "pictures": len(wanted),
        "object accuracy": mean([h for group in hits["object"].values() for h in group]),
        "style accuracy": mean([h for group in hits["style"].values() for h in group]),
        "per object": {o: mean(h) for o, h in hits["object"].items()},
        "per style": {s: mean(h) for s, h in hits["style"].items()},
        "text states": text_state_cosines(pipe),
    }


def mean(values: list[bool]) -> float:
    return round(sum(values) / len(values), 4)


def text_state_cosines(pipe: StableDiffusionPipeline) -> dict[str, float]:
    """Mean cosine of flattened text states for pairs of captions of the same and of different objects."""
    names = list(OBJECTS)
    a = text.encode(pipe.text_encoder, pipe.tokenizer, [f"a {o} in pixel style" for o in names]).flatten(1)
    b = text.encode(pipe.text_encoder, pipe.tokenizer, [f"look, a {o} in pixel style" for o in names]).flatten(1)
    cosine = torch.nn.functional.normalize(a, dim=-1) @ torch.nn.functional.normalize(b, dim=-1).T
    same = torch.eye(len(names), dtype=torch.bool)
    return {
        "same object, other template, lowest": round(cosine[same].min().item(), 3),
        "other object, mean": round(cosine[~same].mean().item(), 3),
        "other object, highest": round(cosine[~same].max().item(), 3),
    }


def sample_sheet(images: Tensor, path: Path, seeds_per_pair: int) -> None:
    """One picture a pair, styles in rows, objects in columns, enlarged twice."""
    first = images[::seeds_per_pair].view(len(OBJECTS), len(STYLES), 3, 32, 32)  # [O*S, 3, H, W] -> [O, S, 3, H, W]
    half = len(OBJECTS) // 2
    blocks = [first[:half], first[half:]]
    rows = [b[:, j].permute(2, 0, 3, 1).reshape(32, half * 32, 3) for b in blocks for j in range(len(STYLES))]
    sheet = Image.fromarray((torch.cat(rows).clamp(0, 1) * 255).round().byte().numpy())
    sheet.resize((sheet.width * 2, sheet.height * 2), Image.Resampling.BICUBIC).save(path)
