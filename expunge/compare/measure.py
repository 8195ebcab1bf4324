"""What one trial costs, and how far an erased model's predictions move where nothing was to change."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

from expunge.erase_ops.training.families import family_of

PERIOD = 0.005  # seconds between two looks at the memory
STATES = 16  # noised latents that the drift is averaged over
UNRELATED = ("a picture", "an image of something", "a nice drawing", "blurry, low quality")


@contextmanager
def cost() -> Iterator[dict[str, float]]:
    """Fills in, at its end, the seconds (wall and processor) and the peak of resident memory above the start's, MiB."""
    found: dict[str, float] = {}
    process, stop = psutil.Process(), threading.Event()
    start = peak = process.memory_info().rss

    def watch() -> None:
        nonlocal peak
        while not stop.wait(PERIOD):
            peak = max(peak, process.memory_info().rss)

    watcher = threading.Thread(target=watch, daemon=True)
    wall, processor = time.perf_counter(), time.process_time()
    watcher.start()
    try:
        yield found
    finally:
        found |= {"seconds": time.perf_counter() - wall, "cpu_seconds": time.process_time() - processor}
        stop.set()
        watcher.join()
        found["peak_memory_mib"] = max(peak, process.memory_info().rss) / 2**20 - start / 2**20


def tensor_bytes_of(folder: Path) -> int:
    """Bytes of the tensors that an erasure needs."""
    return (folder / "erasure.safetensors").stat().st_size


def digest_of(folder: Path) -> str:
    """SHA-256 of an erasure: its tensors and what its JSON files say of them, but for the log of its training."""
    found = hashlib.sha256()
    files = [*folder.glob("*.safetensors"), *folder.glob("*.json")]
    for file in sorted(file for file in files if file.name != "training_log.json"):
        found.update(file.name.encode() + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    return found.hexdigest()


class Probe:
    """Predictions of a pipeline's denoiser at fixed noised latents, for the empty prompt and for unrelated ones.

    Args:
        pipe: the pipeline, before it is erased.
        prompts: unrelated prompts.
    """

    def __init__(self, pipe: Any, prompts: Sequence[str] = UNRELATED) -> None:
        generator = torch.Generator().manual_seed(0)
        family = family_of(pipe)
        shape = family.latent_shape(family.native_resolution)
        self._latents = torch.randn(STATES, *shape, generator=generator)  # [S, C, h, w]
        self._timesteps = torch.linspace(20, 980, STATES).long()
        unrelated = [prompts[index % len(prompts)] for index in range(STATES)]
        self._prompts = {"unconditional": [""] * STATES, "unrelated": unrelated}
        self._base = self._predict(pipe)

    @torch.no_grad()
    def _predict(self, pipe: Any) -> dict[str, Tensor]:
        family = family_of(pipe)
        return {
            name: family.predict(self._latents, self._timesteps, family.encode(prompts))
            for name, prompts in self._prompts.items()
        }

    def drift(self, pipe: Any) -> dict[str, float]:
        """Mean squared change of the predictions over their mean square, by kind of prompt; the erased pipeline's."""
        return {
            name: float((after - self._base[name]).square().mean() / self._base[name].square().mean())
            for name, after in self._predict(pipe).items()
        }
