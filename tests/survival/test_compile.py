"""torch.compile and erasing in every order; the eager backend, since it is the capturing that could lose an erasure."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from expunge import ErasedPipeline, erase, restore

Pipe = Any
pytestmark = pytest.mark.slow


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def wrapped(pipe: Pipe) -> Pipe:
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe


def in_place(pipe: Pipe) -> Pipe:
    pipe.unet.compile(backend="eager")
    return pipe


def repeated_blocks(pipe: Pipe) -> Pipe:
    pipe.unet.compile_repeated_blocks(backend="eager")
    return pipe


WAYS = [wrapped, in_place, repeated_blocks]
SMALL = {  # one resolution: compiling takes most of the time here
    "block_out_channels": (32,),
    "down_block_types": ("CrossAttnDownBlock2D",),
    "up_block_types": ("CrossAttnUpBlock2D",),
}


@pytest.fixture(scope="module")
def small(tiny_sd: Callable[..., Pipe]) -> Callable[[], Pipe]:
    return lambda: tiny_sd(**SMALL)


@pytest.fixture(scope="module")
def world(small: Callable[[], Pipe], spm_for: Callable[..., Any]) -> Any:
    return spm_for(small())


@pytest.mark.parametrize("compiled", WAYS)
@pytest.mark.parametrize("first", ["erase", "compile", "compile and run", "another pipeline compiled and run"])
def test_every_order(
    first: str,
    compiled: Callable[[Pipe], Pipe],
    world: Any,
    small: Callable[[], Pipe],
    bake: Callable[..., Pipe],
    draw: Callable[..., Any],
) -> None:
    plain = draw(small())
    pipe = small()
    if first == "another pipeline compiled and run":
        draw(compiled(small()))
    if first == "erase":
        compiled(erase(pipe, world))
    else:
        compiled(pipe)
        if first == "compile and run":
            torch.testing.assert_close(draw(pipe), plain)
        erase(pipe, world)
    torch.testing.assert_close(draw(pipe), draw(bake(small(), world)), atol=1e-4, rtol=0)
    torch.testing.assert_close(draw(pipe, ["a cat", "a dog"])[1:], draw(small(), ["x", "a dog"])[1:])
    torch.testing.assert_close(draw(restore(pipe)), plain)


def test_a_compiled_pipeline_is_saved_and_comes_back_erased(
    world: Any, small: Callable[[], Pipe], draw: Callable[..., Any], tmp_path: Any
) -> None:
    pipe = wrapped(erase(small(), world))
    pipe.save_pretrained(tmp_path)
    again = ErasedPipeline.from_pretrained(tmp_path)
    assert torch.equal(draw(again), draw(erase(small(), world)))
