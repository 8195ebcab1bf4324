"""Two processes, and accumulated batches, against one process with one batch; and a process that is killed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from trainer_checks import spread_gaps, train_apart


@pytest.mark.slow
@pytest.mark.parametrize("method", ["esd", "few_shot"])
def test_it_does_not_matter_how_samples_are_spread(method: str, tiny_sd: Callable[..., Any], tmp_path: Path) -> None:
    tiny_sd().save_pretrained(tmp_path / "model")
    spreads = [(2, 1), (1, 4), (2, 2)] if method == "esd" else [(2, 1)]
    assert max(map(max, spread_gaps(tmp_path / "model", method, spreads, tmp_path))) <= 1e-5


@pytest.mark.slow
def test_a_killed_process_goes_on_bit_for_bit(tiny_sd: Callable[..., Any], tmp_path: Path) -> None:
    model = tmp_path / "model"
    tiny_sd().save_pretrained(model)
    whole = train_apart(model, "esd", tmp_path / "whole")
    assert train_apart(model, "esd", tmp_path / "killed", kill=2) is None
    assert sorted(path.name for path in (tmp_path / "killed").glob("checkpoint-*"))[-1] == "checkpoint-000002"
    resumed = train_apart(model, "esd", tmp_path / "killed")
    assert whole is not None and resumed is not None
    weights = [name for name in whole if not name.startswith("gradient ")]
    assert weights and all(torch.equal(resumed[name], whole[name]) for name in weights)
    assert "gradient 3" in whole and "gradient 2" not in resumed  # two of its three steps were the first run's
