"""The frame of the command line: help, version, and how errors reach the shell."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

import expunge
from expunge.cli import app
from expunge.cli.options import Debug, Json
from expunge.cli.shared import command, emit
from expunge.errors import AdapterFormatError, ExpungeError


def failing(error: Exception) -> typer.Typer:
    """A program of one command that fails."""
    program = typer.Typer(pretty_exceptions_enable=False)

    @program.command()
    @command
    def fail(json_output: Json = False, debug: Debug = False) -> None:
        raise error

    return program


FORMAT = AdapterFormatError("cat.bin", expected="a safetensors file", found="a pickle", fix="Convert it\nfirst.")


@pytest.fixture
def invoke() -> Callable[..., Any]:
    return CliRunner().invoke


class TestFrame:
    def test_no_arguments_show_every_command(self, invoke: Callable[..., Any]) -> None:
        result = invoke(app, [])
        for name in ("demo", "train", "generate", "info", "check"):
            assert name in result.output

    def test_version(self, invoke: Callable[..., Any]) -> None:
        result = invoke(app, ["--version"])
        assert (result.exit_code, result.stdout) == (0, f"expunge {expunge.__version__}\n")

    @pytest.mark.parametrize("arguments", [["forget"], ["train", "magic"], ["generate", "--prompt", "a cat"]])
    def test_wrong_usage_is_code_2(self, invoke: Callable[..., Any], arguments: list[str]) -> None:
        assert invoke(app, arguments).exit_code == 2

    @pytest.mark.parametrize("name", ["demo", "generate", "info", "check"])
    def test_every_command_offers_json_and_debug(self, invoke: Callable[..., Any], name: str) -> None:
        text = invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output
        assert "--json" in text
        assert "--debug" in text


class TestErrors:
    def test_one_readable_line_and_code_1(self, invoke: Callable[..., Any]) -> None:
        result = invoke(failing(FORMAT), [])
        assert result.exit_code == 1
        assert result.stdout == ""
        assert result.stderr == (
            "AdapterFormatError: cat.bin: expected a safetensors file, found a pickle. Convert it first.\n"
        )

    @pytest.mark.parametrize("error", [FileNotFoundError(2, "No such file or directory", "x"), OSError("disk full")])
    def test_errors_of_the_system_too(self, invoke: Callable[..., Any], error: OSError) -> None:
        result = invoke(failing(error), [])
        assert result.exit_code == 1
        assert result.stderr == f"{type(error).__name__}: {error}\n"

    def test_anything_else_points_to_debug(self, invoke: Callable[..., Any]) -> None:
        result = invoke(failing(ZeroDivisionError("by zero")), [])
        assert result.exit_code == 1
        assert result.stderr == "ZeroDivisionError: by zero (run again with --debug to see where)\n"

    def test_debug_lets_the_traceback_through(self, invoke: Callable[..., Any]) -> None:
        result = invoke(failing(FORMAT), ["--debug"])
        assert result.exit_code == 1
        assert result.exception is FORMAT

    def test_json_gives_the_error_as_an_object(self, invoke: Callable[..., Any]) -> None:
        result = invoke(failing(FORMAT), ["--json"])
        assert result.exit_code == 1
        assert json.loads(result.stdout)["error"] == {
            "kind": "AdapterFormatError",
            "message": "cat.bin: expected a safetensors file, found a pickle. Convert it first.",
            "subject": "cat.bin",
            "expected": "a safetensors file",
            "found": "a pickle",
            "fix": "Convert it\nfirst.",
        }

    def test_interrupt_is_not_taken_for_an_error(self, invoke: Callable[..., Any]) -> None:
        result = invoke(failing(typer.Abort()), [])
        assert result.exit_code == 1
        assert "Aborted" in result.stderr

    def test_exit_codes_of_commands_pass(self, invoke: Callable[..., Any]) -> None:
        assert invoke(failing(typer.Exit(3)), []).exit_code == 3

    def test_nan_is_never_printed_as_json(self) -> None:
        with pytest.raises(ValueError, match="JSON"):
            emit({"gate": float("nan")})

    def test_every_expunge_error_is_handled_as_one(self) -> None:
        assert issubclass(AdapterFormatError, ExpungeError)
