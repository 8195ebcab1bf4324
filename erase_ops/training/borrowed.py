"""A pipeline's parts as a training needs them, and as they were once it is over, however it ends."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from expunge.erase_ops.training.families import StableDiffusion


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Deterministic kernels where torch has them (CPUs need no switch), so that a seed gives the same weights again."""
    if device.type == "cpu":
        yield
        return
    enabled, warns = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read by cuBLAS when it is first used
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(enabled, warn_only=warns)


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """A module in evaluation mode; afterwards each of its parts is in its own mode again, whatever the whole is in."""
    modes = {part: part.training for part in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for part, training in modes.items():
            part.training = training


@contextmanager
def frozen(module: nn.Module, gradient_checkpointing: bool) -> Iterator[None]:
    """A module in evaluation mode without gradients of its own; afterwards as it was."""
    flags = {parameter: parameter.requires_grad for parameter in module.parameters()}
    checkpointing = gradient_checkpointing and module.is_gradient_checkpointing
    module.requires_grad_(False)
    if gradient_checkpointing and not checkpointing:
        module.enable_gradient_checkpointing()  # type: ignore[operator]
    try:
        with evaluating(module):
            yield
    finally:
        if gradient_checkpointing and not checkpointing:
            module.disable_gradient_checkpointing()  # type: ignore[operator]
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)


@contextmanager
def text_encoders_on_cpu(family: StableDiffusion, wanted: bool) -> Iterator[None]:
    """The text encoders on the CPU, if that is wanted; afterwards where they were."""
    encoders = [(encoder, encoder.device) for encoder in family.text_encoders] if wanted else []
    for encoder, _ in encoders:
        encoder.to("cpu")
    if encoders and torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        yield
    finally:
        for encoder, device in encoders:
            encoder.to(device)
