"""The demo as a user runs it, on the bundled model."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from expunge.cli import app


@pytest.mark.slow
def test_cat_disappears_and_the_rest_stays(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["demo", "--output_dir", str(tmp_path), "--json"])
    assert result.exit_code == 0, result.output
    record = json.loads(result.stdout)
    assert record == json.loads((tmp_path / "results.json").read_text())
    scores = {score["label"]: score for score in record["scores"]}
    seen = scores["cat: is it there?"]
    assert seen["before"]["value"] >= 0.85
    assert seen["after"]["value"] <= 0.10
    for what in ("object", "style"):
        kept = scores[f"everything else: {what} as asked?"]
        assert kept["after"]["value"] >= kept["before"]["value"] - 0.05
    assert len(record["shipped"]) >= 9
    assert record["untouched"]["bit_identical"] >= 0.5 * record["untouched"]["n"]
    sources = re.findall(r'src="([^"]{0,22})', (tmp_path / "index.html").read_text())
    assert len(sources) > 50
    assert set(sources) == {"data:image/png;base64,"}
