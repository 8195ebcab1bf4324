"""Threads that share a pipeline get the images that they would have had alone, or wait, or a named error."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier, Event
from typing import Any

import pytest
import torch

from expunge import erase, restore
from expunge.errors import ErasureLostError
from expunge.pipelines.families import ErasedStableDiffusionPipeline

Pipe = Any
TinyPipe = Callable[..., Pipe]
Draw = Callable[..., torch.Tensor]
PROMPTS = ["a cat", "a dog", ["a cat", "a dog"], "a house"]


def test_one_pipeline(erased: Pipe, draw: Draw) -> None:
    alone = [draw(erased, prompt) for prompt in PROMPTS]
    start = Barrier(len(PROMPTS))

    def work(index: int) -> list[torch.Tensor]:
        start.wait()
        return [draw(erased, PROMPTS[index]) for _ in range(3)]

    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        for images, reference in zip(pool.map(work, range(len(PROMPTS))), alone, strict=True):
            assert all(torch.equal(image, reference) for image in images)


def test_the_report_of_an_output_is_its_own(erased: Pipe) -> None:
    start = Barrier(2)

    def work(prompt: str) -> list[float]:
        start.wait()
        outputs = [erased(prompt, num_inference_steps=1, output_type="latent") for _ in range(4)]
        return [output.erasures.images[0].gates[0] for output in outputs]

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(work, ["a cat", "a dog"])) == [[1.0] * 4, [0.0] * 4]


def test_two_pipelines_on_one_denoiser(erased: Pipe, draw: Draw) -> None:
    other = ErasedStableDiffusionPipeline(**erased.components, requires_safety_checker=False)
    other.set_progress_bar_config(disable=True)
    alone = {prompt: draw(erased, prompt) for prompt in ("a cat", "a dog")}

    def work(pipe: Pipe, prompt: str) -> list[torch.Tensor]:
        return [draw(pipe, prompt) for _ in range(3)]

    with ThreadPoolExecutor(2) as pool:
        jobs = {prompt: pool.submit(work, pipe, prompt) for pipe, prompt in ((erased, "a cat"), (other, "a dog"))}
    for prompt, job in jobs.items():
        assert all(torch.equal(image, alone[prompt]) for image in job.result())


@pytest.mark.parametrize("change", ["restore", "erase"])
def test_changes_wait_for_a_running_call(
    change: str, tiny_sd: TinyPipe, erased: Pipe, van_gogh: Any, draw: Draw
) -> None:
    reference = draw(erased)
    inside, called = Event(), Event()

    def hold(pipe: Pipe, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        inside.set()
        called.wait(10)
        return tensors

    with ThreadPoolExecutor(2) as pool:
        image = pool.submit(draw, erased, callback_on_step_end=hold)
        assert inside.wait(10)
        changed = pool.submit(lambda: restore(erased) if change == "restore" else erase(erased, van_gogh))
        assert not changed.done()
        called.set()
        assert torch.equal(image.result(), reference)
        changed.result()
    assert torch.equal(draw(erased), draw(tiny_sd()))


def test_a_denoiser_taken_away_by_another_thread(erased: Pipe, tiny_sd: TinyPipe) -> None:
    def swap(pipe: Pipe, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(setattr, pipe, "unet", tiny_sd().unet).result()
        return tensors

    with pytest.raises(ErasureLostError):
        erased("a cat", num_inference_steps=2, output_type="latent", callback_on_step_end=swap)
