"""A small base pipeline on disk, and adapters for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from typer.testing import CliRunner

from expunge import SPMAdapter
from expunge.cli import app
from expunge.erase_ops.formats.factors import Factors
from expunge.erase_ops.sites import find_sites
from expunge.erase_ops.spm.concepts import Concept


@pytest.fixture
def cli() -> Callable[..., Any]:
    """`cli("info", folder, code=0)`: runs a command, checks its exit code, gives the result."""
    runner = CliRunner()

    def run(*arguments: object, code: int = 0) -> Any:
        result = runner.invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "200"})
        assert result.exit_code == code, result.output
        return result

    return run


@pytest.fixture(scope="module")
def base(tiny_sd: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Stable Diffusion pipeline."""
    folder = tmp_path_factory.mktemp("base")
    tiny_sd().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make_adapter(tiny_sd: Callable[..., Any]) -> Callable[..., SPMAdapter]:
    """Factory: a random SPM for the tiny pipeline, strong enough to be seen."""

    def make(concept: str = "cat", *, threshold: float | None = None, seed: int = 0) -> SPMAdapter:
        generator = torch.Generator().manual_seed(seed)
        factors = {path: random_factors(layer, generator) for path, layer in find_sites(tiny_sd().unet).items()}
        settings = {"max_train_steps": 7, "concepts": [concept]}
        return SPMAdapter(factors, [Concept(concept)], threshold=threshold, settings=settings)

    return make


def random_factors(layer: nn.Module, generator: torch.Generator) -> Factors:
    weight = layer.weight
    assert isinstance(weight, torch.Tensor)
    down = torch.randn(1, *weight.shape[1:], generator=generator)
    up = 0.3 * torch.randn(weight.shape[0], 1, *[1] * (weight.ndim - 2), generator=generator)
    return Factors(down, up, 1.0)


@pytest.fixture
def artefact(make_adapter: Callable[..., SPMAdapter], tmp_path: Path) -> Path:
    """An artefact folder that erases "cat"."""
    make_adapter().save_pretrained(tmp_path / "cat-spm")
    return tmp_path / "cat-spm"
