"""The microbenchmarks' frame: right results only, all columns, reasons for what is left out, and the plotter."""

import csv
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest
import timing
import torch
from timing import Setting, percentiles, run_benchmark

PLOTTER = Path(timing.__file__).with_name("plot_kernels.py")


def settings(error: float = 0.0) -> Callable[[torch.device], Iterator[Setting]]:
    def make(device: torch.device) -> Iterator[Setting]:
        x = torch.randn(64, 33, device=device)
        providers = {
            "naive": lambda: x.softmax(-1),
            "expunge": lambda: (x - x.amax(-1, keepdim=True)).softmax(-1) + error,
            "peer": timing.peer("a_package_that_nobody_has", lambda: lambda: x),
        }
        yield Setting("64x33", "float32", "forward", providers, x.double().softmax(-1), 1e-5, 2 * x.nbytes)

    return make


@pytest.fixture
def quick(tmp_path: Path) -> list[str]:
    return ["--device", "cpu", "--seconds", "0", "--csv", str(tmp_path / "out" / "op.csv")]


def test_one_line_a_provider_with_every_column(quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_benchmark("softmax", settings(), quick) == 0
    with Path(quick[-1]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["provider"] for row in rows] == ["naive", "expunge"]
    for row in rows:
        assert (row["op"], row["shape"], row["dtype"], row["mode"]) == ("softmax", "64x33", "float32", "forward")
        assert 0 < float(row["p20"]) <= float(row["p50"]) <= float(row["p80"])
        assert int(row["samples"]) == timing.ROUNDS[0]
        assert row["clock"] == "CPU process time"
        assert row["share"] == ""
        assert torch.__version__ in row["versions"]
        assert row["commit"] and row["device"]
    printed = capsys.readouterr().out
    assert "peer left out: a_package_that_nobody_has is not installed" in printed
    assert "p50" in printed


@pytest.mark.parametrize("error", [1e-3, float("nan")])
def test_a_wrong_result_is_never_timed(error: float, quick: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match=r"expunge, 64x33, float32, forward: relative RMS error"):
        run_benchmark("softmax", settings(error), quick)
    assert "p50" not in capsys.readouterr().out
    assert not Path(quick[-1]).exists()


def test_another_shape_is_a_wrong_result() -> None:
    expected = torch.tensor([3.0, 4.0], dtype=torch.float64)
    assert timing.error(torch.tensor([3.0, 4.5]), expected) == pytest.approx(0.1)
    assert timing.error(torch.tensor([3.0]), expected) == float("inf")


def test_percentiles_are_those_of_a_long_row() -> None:
    assert percentiles([float(value) for value in range(101)]) == (20.0, 50.0, 80.0)


@pytest.mark.slow
def test_compiled_gives_the_same_or_a_reason() -> None:
    run = timing.compiled(lambda: torch.arange(5.0) * 2)
    if isinstance(run, str):
        assert "compiler" in run
    else:
        assert run().tolist() == [0.0, 2.0, 4.0, 6.0, 8.0]


def test_the_plotter_draws_every_provider_and_the_same_picture_twice(quick: list[str], tmp_path: Path) -> None:
    run_benchmark("softmax", settings(), quick)
    pictures = []
    for folder in ("one", "two"):
        command = [sys.executable, str(PLOTTER), quick[-1], "--format", "svg", "png", "--out", str(tmp_path / folder)]
        subprocess.run(command, check=True, capture_output=True)
        assert (tmp_path / folder / "op.png").read_bytes().startswith(b"\x89PNG")
        pictures.append((tmp_path / folder / "op.svg").read_text())
    assert pictures[0] == pictures[1]
    text = " ".join(node.text or "" for node in ElementTree.fromstring(pictures[0]).iter())
    assert all(name in text for name in ("naive", "expunge", "softmax", "64x33"))


def test_the_plotter_says_what_is_missing(tmp_path: Path) -> None:
    empty = tmp_path / "empty.csv"
    empty.write_text("op,provider\n")
    done = subprocess.run([sys.executable, str(PLOTTER), str(empty)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "has no rows" in done.stderr
