"""What the attacks share: valid files to start from, and a check that a load is refused by name and fast."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from expunge.erase_ops.spm import Concept, Factors, SPMAdapter
from expunge.errors import ExpungeError

SITE = "mid_block.attentions.0.proj_in"
FLAT = "lora_unet_mid_block_attentions_0_proj_in"
SECONDS = 5.0


def kohya(**changes: torch.Tensor) -> dict[str, torch.Tensor]:
    """One site in kohya's naming; `down`, `up` and `alpha` may be replaced."""
    parts = {"down": torch.ones(1, 3), "up": torch.ones(2, 1), "alpha": torch.tensor(1.0), **changes}
    keys = {"down": "lora_down.weight", "up": "lora_up.weight", "alpha": "alpha"}
    return {f"{FLAT}.{keys[name]}": tensor for name, tensor in parts.items()}


def raw(header: bytes | dict[str, Any], data: bytes = b"", length: int | None = None) -> bytes:
    """A safetensors file with any header, of any stated length."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def save(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> Path:
    """A file by the safetensors library itself."""
    path.write_bytes(safetensors.torch.save(tensors, metadata))
    return path


def artefact(folder: Path) -> Path:
    """A valid artefact of two sites and two concepts."""
    factors = {
        SITE: Factors(torch.ones(1, 3), torch.ones(2, 1)),
        "a.b": Factors(torch.ones(2, 3), torch.ones(2, 2), 0.5),
    }
    concepts = [Concept("cat", torch.ones(1, 2, 3), (1, 2), (1, 2, 3)), Concept("dog")]
    return SPMAdapter(factors, concepts, threshold=0.5).save_pretrained(folder)


@pytest.fixture
def expect_refusal() -> Callable[..., ExpungeError]:
    """`expect_refusal(error, path, **arguments)`: loading raises exactly that error, in bounded CPU time."""

    def check(error: type[ExpungeError], path: Path | str, **arguments: Any) -> ExpungeError:
        arguments = {"concepts": ["cat"], **arguments}
        before = set(os.listdir("."))
        start = time.process_time()
        with pytest.raises(ExpungeError) as caught:
            SPMAdapter.from_pretrained(path, **arguments)
        assert type(caught.value) is error, repr(caught.value)
        assert time.process_time() - start < SECONDS
        assert set(os.listdir(".")) == before
        assert all((caught.value.subject, caught.value.expected, caught.value.found, caught.value.fix))
        return caught.value

    return check
