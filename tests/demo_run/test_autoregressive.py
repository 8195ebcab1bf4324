"""The demo of the bundled autoregressive model: what it draws, trains and writes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from expunge import demo_ar
from expunge.demo_run import autoregressive
from expunge.demo_run.autoregressive import plan, run_ar_demo
from expunge.erase_ops.delta.adapter import DeltaAdapter
from expunge.errors import InvalidInputError


@pytest.mark.parametrize(("concept", "erased"), [("star", 16), ("red", 16)])
def test_the_plan_shows_the_concept_and_everything_else(concept: str, erased: int) -> None:
    shots = plan(concept, demo_ar.captions(), seed=5)
    assert [shot.erased for shot in shots] == [concept] * erased + [None] * 56
    assert len({shot.seed for shot in shots}) == len(shots)
    assert all(concept in shot.prompt.split() for shot in shots[:erased])
    assert not any(concept in shot.prompt.split() for shot in shots[erased:])
    assert {shot.wants for shot in shots[:erased]} == {"object" if concept == "star" else "style"}


def test_an_unknown_concept_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="hexagon"):
        run_ar_demo(tmp_path, concept="hexagon")


def test_a_run_writes_pictures_figures_page_and_delta(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With one pair in the place of 36: what is written, not how well it erases."""
    fields = autoregressive.training_fields("star")
    short = {**fields, "prompts": fields["prompts"][:1], "window": 64}
    monkeypatch.setattr(autoregressive, "training_fields", lambda concept, seed: short)
    result = run_ar_demo(tmp_path, concept="star")
    record = json.loads((tmp_path / "results.json").read_text(encoding="utf-8"))
    assert record == json.loads(json.dumps(result.to_dict()))
    assert [row["label"] for row in record["scores"]] == [
        "star: is it there?",
        "star: is the colour as asked?",
        "everything else: shape as asked?",
        "everything else: colour as asked?",
    ]
    assert record["scores"][0]["before"]["hits"] >= 14
    assert record["sampling"]["temperature"] == demo_ar.TEMPERATURE
    assert set(record["pictures"][0]["before"]) == {"shape", "colour"}
    page = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "EAR with aligned prefixes" in page
    assert page.count("<figure") == 16 + 56
    assert "bit-identical" not in page and '<span class="gate' not in page  # there is no gate to speak of
    assert "have the colour that was asked" in page
    assert Image.open(tmp_path / "erased.png").size[0] > 500
    assert DeltaAdapter.from_pretrained(tmp_path / "star-ear").concepts == ["star"]
