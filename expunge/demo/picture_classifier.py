"""The measuring instrument: which object and which style does a picture of the demo world show?

It was trained on rendered pictures only and never saw a generated one.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

IMAGE_SIZE = 32


class PictureClassifier(nn.Module):
    """A small convolutional network with two heads.

    Args:
        objects: names of the object classes, in the order of the head.
        styles: names of the style classes.
        width: channels of the first stage.
    """

    def __init__(self, objects: Sequence[str], styles: Sequence[str], width: int = 24) -> None:
        super().__init__()
        self.objects, self.styles, self.width = list(objects), list(styles), width
        sizes = (3, width, 2 * width, 4 * width)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(sizes):
            layers += [nn.Conv2d(before, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU()]
            layers += [nn.Conv2d(after, after, 3, padding=1), nn.GroupNorm(8, after), nn.SiLU(), nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers, nn.Flatten())
        flat = 4 * width * (IMAGE_SIZE // 8) ** 2
        self.dropout = nn.Dropout(0.3)
        self.object_head = nn.Linear(flat, len(self.objects))
        self.style_head = nn.Linear(flat, len(self.styles))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Pictures [B, 3, 32, 32] in -1..1 -> object logits [B, objects], style logits [B, styles]."""
        hidden = self.dropout(self.features(x))
        return self.object_head(hidden), self.style_head(hidden)

    @torch.no_grad()
    def classify(self, images: Any) -> Reading:
        """Reads PIL pictures, an array [B, H, W, 3] in 0..1 or a tensor [B, 3, H, W] in 0..1."""
        x = to_tensor(images)
        parts = [self(part) for part in (x * 2 - 1).split(256)]
        objects = torch.cat([o for o, _ in parts]).softmax(-1)
        styles = torch.cat([s for _, s in parts]).softmax(-1)
        return Reading(
            [self.objects[i] for i in objects.argmax(-1)], [self.styles[i] for i in styles.argmax(-1)], objects, styles
        )

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> PictureClassifier:
        """Reads `config.json` and `model.safetensors`."""
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
        model = cls(config["objects"], config["styles"], config["width"])
        model.load_state_dict({k: v.float() for k, v in load_file(Path(folder) / "model.safetensors").items()})
        return model.eval()


@dataclass
class Reading:
    """What the classifier read: names and probabilities ([B, objects], [B, styles] float32), one row a picture."""

    objects: list[str]
    styles: list[str]
    object_probabilities: Tensor
    style_probabilities: Tensor

    def share(self, object: str | None = None, style: str | None = None) -> float:
        """Share of pictures read as `object` (and as `style`)."""
        hits = [
            (object is None or o == object) and (style is None or s == style)
            for o, s in zip(self.objects, self.styles, strict=True)
        ]
        return sum(hits) / max(len(hits), 1)


def to_tensor(images: Any) -> Tensor:
    """PIL list, array [B, H, W, 3] or tensor [B, 3, H, W], all in 0..1 (PIL: bytes) -> float32 [B, 3, 32, 32]."""
    if isinstance(images, Tensor):
        x = images.float()
    elif isinstance(images, np.ndarray):
        x = torch.from_numpy(images).float().permute(0, 3, 1, 2)  # [B, H, W, 3] -> [B, 3, H, W]
    else:
        arrays = [np.asarray(image.convert("RGB"), np.float32) / 255.0 for image in images]
        x = torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
    return x if x.shape[-1] == IMAGE_SIZE else F.interpolate(x, (IMAGE_SIZE, IMAGE_SIZE), mode="area")
