"""The classifier's reading does not depend on how pictures are handed in, nor on the batch."""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

from expunge import demo


def test_reads_the_same_from_pil_arrays_and_tensors() -> None:
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (3, 32, 32, 3), dtype=np.uint8)
    model = demo.classifier()
    from_pil = model.classify([Image.fromarray(picture) for picture in raw])
    from_array = model.classify(raw.astype(np.float32) / 255)
    from_tensor = model.classify(torch.from_numpy(raw).permute(0, 3, 1, 2) / 255)
    assert torch.allclose(from_pil.object_probabilities, from_array.object_probabilities, atol=1e-5)
    assert torch.allclose(from_pil.style_probabilities, from_tensor.style_probabilities, atol=1e-5)
    assert from_pil.objects == from_array.objects == from_tensor.objects


def test_probabilities_are_a_distribution_over_the_named_classes() -> None:
    model = demo.classifier()
    reading = model.classify(torch.zeros(2, 3, 32, 32))
    assert reading.object_probabilities.shape == (2, 40)
    assert torch.allclose(reading.style_probabilities.sum(-1), torch.ones(2))
    assert set(reading.objects) <= set(model.objects)
