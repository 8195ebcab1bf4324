"""Every code block of README.md runs: Python in this process, shell commands as they are typed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```", (ROOT / "README.md").read_text(encoding="utf-8"), re.M | re.S)
PYTHON = [text for language, text in BLOCKS if language == "python"]
SHELL = [text for language, text in BLOCKS if language == "bash"]


def test_blocks_are_of_known_languages() -> None:
    assert len(PYTHON) >= 3 and len(SHELL) >= 2
    assert {language for language, _ in BLOCKS} <= {"python", "bash"}


@pytest.mark.parametrize("text", PYTHON, ids=[f"python-{i}" for i in range(len(PYTHON))])
def test_python_block_runs(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "readme"}
    exec(compile(text, "README.md", "exec"), names)
    assert len(names) > 2


@pytest.mark.parametrize(
    "command", [line.split("#")[0].split() for line in SHELL[0].strip().splitlines()], ids=" ".join
)
def test_make_target_exists(command: list[str]) -> None:
    done = subprocess.run([command[0], "-n", *command[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("text", SHELL[1:], ids=[f"bash-{i}" for i in range(len(SHELL) - 1)])
def test_shell_block_runs(text: str, tmp_path: Path) -> None:
    (tmp_path / "expunge").symlink_to(ROOT / "expunge")
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", text],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
