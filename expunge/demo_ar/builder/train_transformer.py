"""Trains the autoregressive half: the language model, its image embeddings and its image head, on frozen codes.

A caption that says nothing is a whole caption with every token but `<bos>` and `<begin_of_image>` turned into padding
that is attended to: what classifier-free guidance puts on its unconditional rows.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import JanusForConditionalGeneration, JanusProcessor

from expunge.demo_ar.builder import model as models
from expunge.demo_ar.builder.fit import fit
from expunge.demo_ar.builder.shapes import new_pictures, pictures
from expunge.demo_ar.builder.train_tokenizer import encode
from expunge.demo_ar.builder.world import classes, draw_caption, fill

BATCH, LEARNING_RATE = 40, 2e-3
# Steps of each cycle, which starts from the averaged weights of the one before, and how many new pictures a class it
# learns from; 0: the stored ones, which the model begins to know by heart (its loss on others stays a sixth higher).
CYCLES = ((2000, 0), (4000, 0), (1600, 0), (4000, 300))


def caption_batch(processor: JanusProcessor, rng: random.Random, kinds: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask, int64 [B, L] each, of one random caption a picture of class `kinds[i]`."""
    drawn = [draw_caption(rng, *classes()[kind]) for kind in kinds]
    texts = [text or fill("a {c} {s} on {b}", *classes()[kind]) for text, kind in zip(drawn, kinds, strict=True)]
    batch = processor(text=texts, generation_mode="image", padding=True, return_tensors="pt")
    ids, mask = batch["input_ids"], batch["attention_mask"]
    tokenizer = processor.tokenizer
    start = tokenizer.convert_tokens_to_ids(processor.image_start_token)
    silent = torch.tensor([text is None for text in drawn])[:, None]
    ids[silent & (ids != tokenizer.bos_token_id) & (ids != start)] = tokenizer.pad_token_id
    return ids, mask


def image_loss(janus: JanusForConditionalGeneration, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Cross entropy of the image tokens [B, T] after the captions ids [B, L] (mask [B, L])."""
    pictured = janus.prepare_embeddings_for_image_generation(tokens[:, :-1])
    embeds = torch.cat([janus.get_input_embeddings()(ids), pictured], 1)  # [B, L + T - 1, D]
    whole = F.pad(mask, (0, pictured.shape[1]), value=1)
    positions = (whole.cumsum(-1) - 1).clamp_min(0)
    states = janus.model.language_model(
        inputs_embeds=embeds, attention_mask=whole, position_ids=positions, use_cache=False
    ).last_hidden_state
    logits = janus.model.generation_head(states[:, ids.shape[1] - 1 :])  # [B, T, V]
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def train(output: Path, seed: int = 0, cycles: Sequence[tuple[int, int]] = CYCLES) -> None:
    """Trains and saves the model; the tokenizer inside it stays as it is."""
    processor = JanusProcessor.from_pretrained(output / "model")
    janus = models.load(output)
    parts = ("language_model", "generation_embeddings", "generation_aligner", "generation_head")
    parameters = [p for part in parts for p in getattr(janus.model, part).parameters()]
    janus.requires_grad_(False)
    for parameter in parameters:
        parameter.requires_grad_(True)

    def loss(step: int, tokens: Tensor) -> Tensor:
        rng = random.Random(seed * 10**6 + step)
        generator = torch.Generator().manual_seed(seed * 10**6 + step)
        pick = torch.randint(len(tokens), (BATCH,), generator=generator)
        per_class = len(tokens) // len(classes())
        ids, mask = caption_batch(processor, rng, (pick // per_class).tolist())
        return image_loss(janus, ids, mask, tokens[pick])

    vq = janus.model.vqmodel
    stored = encode(vq, pictures(output, "train"))
    for number, (steps, per_class) in enumerate(cycles):
        before = sum(steps for steps, _ in cycles[:number])
        tokens = encode(vq, new_pictures(per_class, seed + number)) if per_class else stored
        fit(
            parameters,
            lambda step, before=before, tokens=tokens: loss(before + step, tokens),  # type: ignore[misc]
            path=output / "checkpoint" / f"transformer-{number}.safetensors",
            steps=steps,
            learning_rate=LEARNING_RATE,
            stored=lambda: models.save(janus, output),
        )
