"""A small base pipeline on disk, and adapters for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from expunge import SPMAdapter
from expunge.cli import app


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


@pytest.fixture
def artefact(tiny_spm: Callable[..., SPMAdapter], tmp_path: Path) -> Path:
    """An artefact folder that erases "cat"."""
    tiny_spm().save_pretrained(tmp_path / "cat-spm")
    return tmp_path / "cat-spm"
