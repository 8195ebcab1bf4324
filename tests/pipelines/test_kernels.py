"""A whole pipeline call through the Triton kernels, interpreted, against the torch path."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expunge import erase

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs Triton's interpreter", allow_module_level=True)


def test_rows_with_different_gates(
    tiny_sd: Callable[..., Any],
    spm_for: Callable[..., Any],
    draw: Callable[..., Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Linear layers and 1x1 convolutions of a UNet, gates by facilitated_transport, all by kernels."""
    from expunge.kernels.testing.guard import guard

    pipe = tiny_sd()
    erase(pipe, [spm_for(pipe, "cat"), spm_for(pipe, "dog", seed=2)])
    prompts = ["a cat", "a dog on a beach", "a red house"]
    expected = draw(pipe, prompts, num_inference_steps=1)
    gates = pipe.erasures
    monkeypatch.setenv("EXPUNGE_KERNELS", "triton")
    with guard() as counts:
        found = draw(pipe, prompts, num_inference_steps=1)
    assert counts.launches.count("gated_lowrank_fwd_kernel") > 20
    assert str(pipe.erasures) == str(gates)
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
