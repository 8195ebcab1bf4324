"""A small comparison on the bundled model: its files, and going on after an interruption."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from expunge.cli.compare import result_table
from expunge.compare import run
from expunge.compare.run import Runner
from expunge.demo_run.pictures import CELL, GAP, HEAD, LABEL, SPLIT


@pytest.fixture(autouse=True)
def _few_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    original = run.generate
    monkeypatch.setattr(run, "generate", lambda *args, **kwargs: original(*args, steps=2, **kwargs))


def test_writes_table_grid_and_page_and_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = Runner(tmp_path, targets=2, others=2).run(["uce", "itd"], ["cat"])
    assert [row.row for row in first.rows] == ["uce", "itd"]
    assert all(row.bytes > 10_000 for row in first.rows) and first.rows[0].drift["unrelated"] > 0
    record = json.loads((tmp_path / "results.json").read_text())
    assert record["targets"] == 2 and len(record["rows"]) == 2
    page = (tmp_path / "index.html").read_text()
    assert "sparse autoencoder" in page and page.count("<img") == 1 and "Unified concept editing" in page
    with Image.open(tmp_path / "grid.png") as sheet:
        assert sheet.size == (LABEL + 4 * (CELL + GAP) + SPLIT, HEAD + 3 * (CELL + GAP))  # base and two methods
    drawn: list[int] = []
    original = run.generate

    def counted(pipe: Any, prompts: list[str], *args: Any, **kwargs: Any) -> Any:
        drawn.append(len(prompts))
        return original(pipe, prompts, *args, **kwargs)

    monkeypatch.setattr(run, "generate", counted)
    again = Runner(tmp_path, targets=2, others=3).run(["uce", "itd"], ["cat"])
    assert drawn == [1, 1, 1]  # one more picture of the base and of each method
    assert again.rows[0].cpu_seconds == first.rows[0].cpu_seconds  # nothing was trained again
    assert result_table(again).row_count == 2
    drawn.clear()
    changed = Runner(tmp_path, targets=2, others=3).run(["uce"], ["cat"], {"uce": {"ridge": 50.0}})
    assert drawn == [5]  # another erasure: its pictures are drawn anew
    assert changed.rows[0].drift != again.rows[0].drift
