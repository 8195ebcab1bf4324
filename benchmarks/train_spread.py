"""Trains a small delta alone or under torchrun, and writes its weights and gradients; `trainer_checks` runs it.

    python benchmarks/train_spread.py MODEL METHOD TARGET.safetensors [--accumulation N] [--folder FOLDER [--kill STEP]]

With a folder the run keeps checkpoints there and goes on from the last; `--kill` ends the process, without notice,
after a step. A step has eight samples, however they are spread.
"""

from __future__ import annotations

import argparse
import os
import signal
from pathlib import Path
from typing import Any

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from expunge.erase_ops.methods import METHODS
from expunge.erase_ops.training.deltas import train_delta
from expunge.erase_ops.training.loop import make_accelerator

PROMPTS = [{"target": "a cat on the sofa", "neutral": "on the sofa"}, {"target": "a cat"}, {"target": "cat"}]
STEPS = 3


def settings(processes: int, accumulation: int, method: str) -> dict[str, Any]:
    """Eight samples a step; plain gradient descent, so that the weights are sums of gradients."""
    return {
        "prompts": PROMPTS,
        "concepts": ("cat",),
        "max_train_steps": STEPS,
        "learning_rate": 0.05,
        "optimizer": "sgd",
        "max_grad_norm": 0.0,
        "batch_size": 8 // (processes * accumulation),
        "gradient_accumulation_steps": accumulation,
        "max_denoising_steps": 4,
        "preserve": ("a dog", "a tree", "a house"),
        "state_source": "drawn" if method == "few_shot" else "rollout",
        "drawn_images": 4,
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("method")
    parser.add_argument("target", type=Path)
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--kill", type=int)
    given = parser.parse_args()
    torch.set_num_threads(1)
    pipe = StableDiffusionPipeline.from_pretrained(given.model, local_files_only=True)
    gradients: dict[str, Tensor] = {}

    def keep(optimizer: Optimizer, args: object, kwargs: object) -> None:
        """The gradients that a step is made with: averaged over the processes, and of all accumulated batches."""
        flat = [p.grad.flatten() for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        gradients[f"gradient {len(gradients) + 1}"] = torch.cat(flat)

    register_optimizer_step_pre_hook(keep)
    config_class = METHODS[given.method].load_config()
    alone = config_class.from_dict(settings(1, given.accumulation, given.method))
    accelerator = make_accelerator(alone, torch.device("cpu"))
    fields = settings(accelerator.num_processes, given.accumulation, given.method)
    if given.folder is not None:
        fields |= {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}

    def kill(step: int, metrics: dict[str, float]) -> None:
        if step == given.kill:
            os.kill(os.getpid(), signal.SIGKILL)

    config = config_class.from_dict(fields)
    delta = train_delta(pipe, config, output_dir=given.folder, progress=False, callback=kill)
    if accelerator.is_main_process:
        save_file(delta.values | gradients, given.target)


if __name__ == "__main__":
    main()
