"""The demo's table, against readings that are known."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from expunge.demo_run.plan import Shot
from expunge.demo_run.scores import identical, scores


@dataclass
class Reading:
    objects: list[str]
    styles: list[str]


SHOTS = [
    Shot("a cat in noto style", 0, "cat", "noto", "trained", "cat"),
    Shot("a cat in pixel style", 0, "cat", "pixel", "trained", "cat"),
    Shot("a dog in neon style", 0, "dog", "neon", "shipped", "neon"),
    Shot("a dog in noto style", 0, "dog", "noto", "untouched", None),
    Shot("a car in noto style", 0, "car", "noto", "untouched", None),
]
BEFORE = Reading(["cat", "cat", "dog", "dog", "car"], ["noto", "pixel", "neon", "noto", "noto"])
AFTER = Reading(["owl", "cat", "dog", "dog", "bus"], ["noto", "pixel", "noto", "noto", "pixel"])


def test_each_concept_is_asked_for_itself_and_for_what_should_stay() -> None:
    rows = scores(SHOTS, BEFORE, AFTER)
    found = {row.label: (row.before.hits, row.after.hits, row.after.n) for row in rows}
    assert found == {
        "cat: is it there?": (2, 1, 2),
        "cat: is the style as asked?": (2, 2, 2),
        "neon: is it there?": (1, 0, 1),
        "neon: is the object as asked?": (1, 1, 1),
        "everything else: object as asked?": (2, 1, 2),
        "everything else: style as asked?": (2, 1, 2),
    }
    assert [row.group for row in rows] == ["trained"] * 2 + ["shipped"] * 2 + ["untouched"] * 2


def test_scores_are_plain_data() -> None:
    assert scores(SHOTS, BEFORE, AFTER)[0].to_dict()["after"] == {
        "hits": 1,
        "n": 2,
        "value": 0.5,
        "interval_95": list(scores(SHOTS, BEFORE, AFTER)[0].after.interval),
    }


def test_identical_means_every_bit() -> None:
    before = torch.rand(3, 3, 4, 4)
    after = before.clone()
    after[1, 0, 0, 0] = torch.nextafter(after[1, 0, 0, 0], torch.tensor(2.0))
    assert identical(before, after) == [True, False, True]
