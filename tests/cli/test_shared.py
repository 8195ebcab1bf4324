"""Tables, placement, and what the commands share."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from expunge.cli.shared import Placement, facts, flat
from expunge.errors import InvalidInputError


def printed(table: object) -> str:
    console = Console(file=io.StringIO(), width=100, color_system=None)
    console.print(table)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_nested_settings_become_one_level() -> None:
    nested = {"method": "spm", "config": {"rank": 1, "prompts": ["a", "b", "c", "d", "e"], "crop": (1, 2)}}
    assert flat(nested) == {
        "method": "spm",
        "config.rank": 1,
        "config.prompts": "5: a, b, c, …",
        "config.crop": (1, 2),
    }


def test_values_are_not_read_as_markup_and_none_is_a_dash() -> None:
    lines = printed(facts("[b]title[/b]", {"concept": "[red]cat[/red]", "threshold": None})).splitlines()
    assert lines[0].startswith("[b]title[/b]")
    assert "[red]cat[/red]" in lines[1]
    assert lines[2].split() == ["threshold", "–"]


class TestPlacement:
    @pytest.mark.parametrize(
        ("device", "dtype", "expected"),
        [
            ("cpu", None, ("cpu", "float32")),
            ("cuda:1", None, ("cuda:1", "float16")),
            ("cuda", "bfloat16", ("cuda", "bfloat16")),
            ("mps", None, ("mps", "float32")),
        ],
    )
    def test_fills_in_what_is_open(self, device: str, dtype: str | None, expected: tuple[str, str]) -> None:
        placement = Placement.choose(device, dtype)
        assert (placement.device, placement.dtype) == expected
        assert str(placement.torch_dtype) == f"torch.{expected[1]}"

    def test_refuses_other_dtypes(self) -> None:
        with pytest.raises(InvalidInputError, match="int8"):
            Placement.choose("cpu", "int8")
