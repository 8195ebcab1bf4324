"""A tiny pipeline that forgets "cat", and the adapter that does it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from expunge import erase


@pytest.fixture(scope="session")
def cat(tiny_sd: Callable[..., Any], spm_for: Callable[..., Any]) -> Any:
    """An SPM for `tiny_sd()`."""
    return spm_for(tiny_sd())


@pytest.fixture(scope="session")
def van_gogh(tiny_sd: Callable[..., Any], spm_for: Callable[..., Any]) -> Any:
    """Another, with two words."""
    return spm_for(tiny_sd(), "van gogh", seed=2)


@pytest.fixture
def erased(tiny_sd: Callable[..., Any], cat: Any) -> Any:
    """A fresh `tiny_sd()` with "cat" erased."""
    return erase(tiny_sd(), cat)
