"""A tiny pipeline, and copies of its text encoder to be erased."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest


@pytest.fixture(scope="module")
def pipe(tiny_sd: Callable[..., Any]) -> Any:
    return tiny_sd()


@pytest.fixture
def encoder(pipe: Any) -> Any:
    """A fresh copy."""
    return copy.deepcopy(pipe.text_encoder)
