"""The tokenizer and the text encoder: genuine CLIP classes, small.

The text encoder is trained together with the UNet (`unet.py`). As CLIP's own is contrastive, this one gets a metric
loss beside the denoising loss: the cosine of two captions' flattened states should be the share of what they name in
common. Without it the states of different concepts lie close together and a gate on them cannot tell them apart.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from expunge.demo.builder.captions import vocabulary

POSITIONS, WIDTH = 16, 128
START, END = "<|startoftext|>", "<|endoftext|>"


def build_tokenizer(output: Path) -> CLIPTokenizer:
    """Trains byte-pair merges until every caption word is one token; unknown words fall apart into bytes."""
    words = vocabulary()
    byte_level = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    byte_level.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=8192, min_frequency=1, end_of_word_suffix="</w>", initial_alphabet=alphabet, show_progress=False
    )
    byte_level.train_from_iterator([[word] for word in words], trainer, length=len(words))
    merges = [tuple(pair) for pair in json.loads(byte_level.to_str())["model"]["merges"]]
    units = alphabet + [f"{unit}</w>" for unit in alphabet]
    vocab = {unit: i for i, unit in enumerate(units)}
    for left, right in merges:
        vocab.setdefault(left + right, len(vocab))
    vocab[START], vocab[END] = len(vocab), len(vocab) + 1
    folder = output / "model" / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2", *(f"{left} {right}" for left, right in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = CLIPTokenizer.from_pretrained(
        folder, bos_token=START, eos_token=END, unk_token=END, pad_token=END, model_max_length=POSITIONS
    )
    tokenizer.save_pretrained(folder)
    split = [word for word in words if len(tokenizer(word).input_ids) != 3]
    if split:
        raise ValueError(f"tokenizer: expected one token for each caption word, found several for {split}.")
    return tokenizer


def new_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=4 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        projection_dim=WIDTH,
        hidden_act="quick_gelu",
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModel(config)


def tokenize(tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Padded to POSITIONS as the pipeline does, int64 [n, POSITIONS]."""
    ids: Tensor = tokenizer(
        list(texts), padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids
    return ids


def metric_loss(states: Tensor, objects: Tensor, styles: Tensor) -> Tensor:
    """Mean squared distance of the captions' cosines from half (same object) + half (same style).

    states [B, L, D]; objects and styles int64 [B], where "none" is a value of its own.
    """
    flat = F.normalize(states.flatten(1), dim=-1)  # [B, L, D] -> [B, L*D]
    cosine = flat @ flat.T
    same_object = (objects[:, None] == objects[None, :]).float()
    same_style = (styles[:, None] == styles[None, :]).float()
    return (cosine - 0.5 * (same_object + same_style)).square().mean()


@torch.no_grad()
def encode(encoder: CLIPTextModel, tokenizer: CLIPTokenizer, texts: Sequence[str]) -> Tensor:
    """Text states [n, L, D] as StableDiffusionPipeline feeds them to the UNet."""
    states: Tensor = encoder(tokenize(tokenizer, texts))[0]
    return states
