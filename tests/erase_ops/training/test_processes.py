"""Two processes on one machine: gradients are averaged, checkpoints hold both random states, resuming is exact."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from expunge.erase_ops.training.draws import seeded_generator


def expected() -> tuple[list[float], list[float]]:
    """The same four steps in one process: the mean gradient and loss of both processes' batches."""
    weight, streams = torch.ones(3, requires_grad=True), [seeded_generator(0, 1 + rank) for rank in range(2)]
    optimizer, means = torch.optim.AdamW([weight], lr=1e-4, weight_decay=1e-2), []
    for _ in range(4):
        loss = sum((weight * torch.randn(3, generator=stream) - 1).square().sum() for stream in streams) / 2
        loss.backward()  # type: ignore[union-attr]
        means.append(loss.item())  # type: ignore[union-attr]
        torch.nn.utils.clip_grad_norm_([weight], 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return weight.tolist(), means


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    script = Path(__file__).with_name("two_processes.py")
    command = [sys.executable, "-P", "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    subprocess.run([*command, str(script), str(tmp_path)], check=True, timeout=300)
    first, second = (ast.literal_eval((tmp_path / f"result-{rank}.txt").read_text()) for rank in range(2))
    assert first == second
    (whole, resumed), losses = first
    assert whole == resumed
    weight, means = expected()
    assert whole == pytest.approx(weight, abs=1e-7) and losses == pytest.approx(means, rel=1e-5)
    assert whole != [1.0] * 3
    ranks = sorted(path.name for path in (tmp_path / "checkpoint-000004").glob("rank-*"))
    assert ranks == ["rank-0.safetensors", "rank-1.safetensors"]
    assert [(tmp_path / f"connected-{rank}.txt").read_text() for rank in range(2)] == ["False"] * 2
