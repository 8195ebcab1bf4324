"""The report: a table for people, JSON for programs, and the gates of the call that it belongs to."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from expunge import erase
from expunge.pipelines.report import ErasureReport

Pipe = Any
TinyPipe = Callable[..., Pipe]
Draw = Callable[..., torch.Tensor]


def test_before_the_first_call(erased: Pipe) -> None:
    text = str(erased.erasures)
    for part in ("concept", "cat", "spm", "84/84", "0.980", "calibrated"):
        assert part in text
    assert "image" not in text and erased.erasures.images == ()


def test_every_image_of_the_last_call(tiny_sd: TinyPipe, cat: Any, van_gogh: Any, draw: Draw) -> None:
    pipe = erase(tiny_sd(), [cat, van_gogh])
    draw(pipe, ["a cat by van gogh", "a dog"], num_images_per_prompt=2)
    report = pipe.erasures
    assert [report.gates_of(index) for index in range(4)] == [{"cat": 1.0, "van gogh": 1.0}] * 2 + [
        {"cat": 0.0, "van gogh": 0.0}
    ] * 2
    assert [image.prompt for image in report.images] == [0, 0, 1, 1]
    assert "1.000 overlap" in str(report) and "0.000 off" in str(report) and "image 3" in str(report)


def test_the_output_keeps_the_report_of_its_call(erased: Pipe) -> None:
    first = erased("a cat", num_inference_steps=1, output_type="latent")
    second = erased("a dog", num_inference_steps=1, output_type="latent")
    assert first.erasures.gates_of(0) == {"cat": 1.0} and second.erasures.gates_of(0) == {"cat": 0.0}
    assert erased.erasures == second.erasures
    assert list(first.keys()) == ["images"] and len(first.to_tuple()) == 1  # an attribute, not a further item
    assert pickle.loads(pickle.dumps(first)).erasures == first.erasures
    assert copy.deepcopy(first).erasures == first.erasures


def test_json(erased: Pipe, draw: Draw) -> None:
    draw(erased, ["a cat", "a dog"])
    record = json.loads(erased.erasures.to_json())
    assert record == erased.erasures.to_dict()
    assert record["erasures"][0]["concepts"] == ["cat"] and record["erasures"][0]["attached"] == 84
    assert [image["gates"] for image in record["images"]] == [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("settings", "threshold", "source"),
    [
        ({}, 0.98, "calibrated"),
        ({"gate_threshold": 0.5}, 0.5, "given"),
        ({"gate_threshold": 0.0}, 0.0, "given"),
        ({"gate": 1.0}, None, "constant gate"),
    ],
)
def test_where_the_threshold_comes_from(
    settings: dict[str, Any], threshold: float | None, source: str, tiny_sd: TinyPipe, cat: Any
) -> None:
    row = erase(tiny_sd(), cat, **settings).erasures.rows[0]
    assert row.threshold == (None if threshold is None else pytest.approx(threshold)) and row.threshold_source == source


def test_a_file_without_a_threshold(tiny_sd: TinyPipe, cat: Any) -> None:
    row = erase(tiny_sd(), replace(cat, threshold=None)).erasures.rows[0]
    assert (row.threshold, row.threshold_source) == (0.0, "none stored")


def test_concepts_are_text_not_markup(tiny_sd: TinyPipe, spm_for: Callable[..., Any]) -> None:
    pipe = erase(tiny_sd(), spm_for(tiny_sd(), "[red]cat[/red]", name="cat"))
    assert "[red]cat[/red]" in str(pipe.erasures)


def test_lost_sites_show(erased: Pipe, tiny_sd: TinyPipe) -> None:
    erased.unet.mid_block = tiny_sd().unet.mid_block
    row = erased.erasures.rows[0]
    assert 0 < row.attached < row.expected == 84
    erased.unet = tiny_sd().unet
    assert (erased.erasures.rows[0].attached, erased.erasures.rows[0].expected) == (0, 84)


def test_each_erasure_has_its_own_sites(tiny_sd: TinyPipe, cat: Any, spm_for: Callable[..., Any]) -> None:
    pipe = erase(tiny_sd(), [cat, spm_for(tiny_sd(), "dog", coverage="cross_attention_kv")])
    assert [(row.attached, row.expected) for row in pipe.erasures.rows] == [(84, 84), (14, 14)]


def test_an_empty_report() -> None:
    assert ErasureReport.lost(None).rows == () and "concept" in str(ErasureReport(()))
