"""Run by test_processes.py under torchrun: trains a line in two processes, with and without an interruption."""

import atexit
import sys
from pathlib import Path

import torch
from accelerate import PartialState
from torch import Tensor

from expunge.erase_ops.training.config import TrainingConfig
from expunge.erase_ops.training.draws import Draws
from expunge.erase_ops.training.loop import TrainingLoop, make_accelerator


class Line:
    """A method whose gradient differs between the processes, since their random numbers do."""

    def __init__(self) -> None:
        self.weight = torch.ones(3, requires_grad=True)

    def parameters(self) -> dict[str, Tensor]:
        return {"weight": self.weight}

    def losses(self, draws: Draws) -> dict[str, Tensor]:
        return {"loss": (self.weight * torch.randn(3, generator=draws.stream) - 1).square().sum()}

    def state_dict(self) -> dict[str, Tensor]:
        return {}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        assert not tensors


def note_the_end(folder: Path) -> None:
    """Runs after what the loop registers, since the last one registered comes first."""
    (folder / f"connected-{PartialState().process_index}.txt").write_text(repr(torch.distributed.is_initialized()))


def main(folder: Path) -> None:
    atexit.register(note_the_end, folder)
    weights = []
    for resume in (None, "checkpoint-000002"):
        config = TrainingConfig(max_train_steps=4, checkpointing_steps=2, resume_from_checkpoint=resume)
        accelerator = make_accelerator(config, torch.device("cpu"))
        assert accelerator.num_processes == 2
        method = Line()
        history = TrainingLoop(method, config, accelerator, folder, progress=False).run()
        accelerator.wait_for_everyone()
        weights.append(method.weight.detach().tolist())
    rank = accelerator.process_index
    (folder / f"result-{rank}.txt").write_text(repr((weights, [entry["loss"] for entry in history])))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
