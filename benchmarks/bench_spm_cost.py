"""What SPMs cost at inference: CPU time over the base's, median of paired runs.

    python benchmarks/bench_spm_cost.py [--pairs 30] [--json OUT.json]

One prompt: whole calls of the bundled pipeline with 1, 10 and 100 SPMs, merged once a call. Half of the pairs run on
one of two equal pipelines and half on the other, since where a model lies in memory is worth a percent or two by
itself: the row "no SPMs" shows that. Rows with different gates: one forward of a UNet of Stable Diffusion 1.5's size
with random weights, 32x32 latents, batch 2.
Seconds are the process's CPU seconds on one thread, so that other work on the machine counts little.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from bars import Bar, print_table, verdict, write_json
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import logging as diffusers_logging
from torch import Tensor

from expunge import SPMAdapter, demo, erase, restore
from expunge.erase_ops.attach import attach, detach
from expunge.erase_ops.entry import Attachment
from expunge.erase_ops.gates import make_concept
from expunge.erase_ops.sites import find_sites
from expunge.erase_ops.spm import Concept, Factors

STEPS = 50  # the pipeline's default


def paired(one: Callable[[], object], other: Callable[[], object], pairs: int) -> list[float]:
    """The ratios other / one over runs in turn, in CPU seconds."""
    ratios = []
    for index in range(pairs + 1):
        seconds = []
        for run in (one, other) if index % 2 else (other, one):
            start = time.process_time()
            run()
            seconds.append(time.process_time() - start)
        a, b = seconds if index % 2 else seconds[::-1]
        if index:  # the first pair warms up
            ratios.append(b / a)
    return ratios


def cost_row(what: str, limit: float | None, ratios: list[float]) -> Bar:
    """One row of the table; without a limit it is for comparison and always holds."""
    middle = statistics.median(ratios)
    return Bar(
        what,
        "for comparison" if limit is None else f"<= {limit:.2f}",
        f"{middle:.3f} [{min(ratios):.3f}, {max(ratios):.3f}] ({len(ratios)} pairs)",
        limit is None or middle <= limit,
        {"ratio": middle, "pairs": len(ratios)},
    )


def random_adapter(unet: torch.nn.Module, concept: Concept, seed: int) -> SPMAdapter:
    """A rank-1 SPM of the right shapes on every site; small random factors, no threshold."""
    generator = torch.Generator().manual_seed(seed)
    factors = {}
    for path, module in find_sites(unet).items():
        rows, columns = module.weight.shape[:2]
        down = torch.randn(1, columns, *module.weight.shape[2:], generator=generator) * 1e-3
        up = torch.randn(rows, 1, *(1,) * (module.weight.ndim - 2), generator=generator) * 1e-3
        factors[path] = Factors(down, up, 1.0)
    return SPMAdapter(factors, [concept], name=f"random-{seed}")


def quiet_pipeline() -> StableDiffusionPipeline:
    """The bundled model without progress bars."""
    pipe = demo.load()
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_rows(pairs: int) -> list[Bar]:
    """One prompt on the bundled model; two pipelines with the same weights, which take turns at being erased."""
    pipes = quiet_pipeline(), quiet_pipeline()
    concept = make_concept(
        "cat", neutral="", tokenizers=[pipes[0].tokenizer], text_encoders=[pipes[0].text_encoder], family="sd"
    )

    def call(pipe: StableDiffusionPipeline) -> Callable[[], object]:
        return lambda: pipe("a cat in noto style", num_inference_steps=STEPS, output_type="latent")

    rows = []
    for count in (0, 1, 10, 100):
        adapters = [random_adapter(pipes[0].unet, concept, seed) for seed in range(count)]
        ratios = []
        for base, erased in (pipes, pipes[::-1]):
            if adapters:
                erase(erased, adapters)
            ratios += paired(call(base), call(erased), (pairs + 1) // 2)
            if adapters:
                restore(erased)
        name = f"{count or 'no'} SPM{'s' * (count != 1)}"
        rows.append(cost_row(f"one prompt, {name}: pipeline CPU time over the base's", 1.03 if count else None, ratios))
    return rows


def large_unet() -> UNet2DConditionModel:
    """Stable Diffusion 1.5's denoiser with random weights (860 M parameters)."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=64, cross_attention_dim=768, block_out_channels=(320, 640, 1280, 1280), attention_head_dim=8
    ).eval()


def unet_rows(pairs: int) -> list[Bar]:
    """Two rows with different gates: the gated low-rank path against the base layers of the same UNet."""
    unet = large_unet()
    generator = torch.Generator().manual_seed(1)
    sample, states = (torch.randn(s, generator=generator) for s in ((2, 4, 32, 32), (2, 77, 768)))
    step = torch.tensor(500)
    concept = Concept("cat", states[:1], (1,), (1,))

    def forward() -> Tensor:
        result: Tensor = unet(sample, step, encoder_hidden_states=states).sample
        return result

    rows = []
    for count, bar in ((1, 1.10), (10, 1.15)):
        attachment = attach(unet, [random_adapter(unet, concept, seed) for seed in range(count)])
        gates = torch.rand(2, count, generator=generator) * 0.5 + 0.25

        def run(attachment: Attachment, gates: Tensor | float) -> Tensor:
            with attachment.force(gates):
                return forward()

        ratios = paired(partial(run, attachment, 0.0), partial(run, attachment, gates), pairs)
        detach(unet)
        name = f"{count} SPM{'s' * (count > 1)}"
        rows.append(cost_row(f"rows with different gates, {name}: UNet CPU time over the base's", bar, ratios))
    return rows


def measure(pairs: int) -> list[Bar]:
    """All rows."""
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    diffusers_logging.disable_progress_bar()
    return pipeline_rows(pairs) + unet_rows(max(3, pairs // 6))


def main() -> int:
    parser = argparse.ArgumentParser(description="What SPMs cost at inference.")
    parser.add_argument("--pairs", type=int, default=30, help="paired runs a row")
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = measure(arguments.pairs)
    print_table("CPU cost of SPMs", rows)
    if arguments.json:
        write_json(arguments.json, rows)
    return verdict(rows)


if __name__ == "__main__":
    raise SystemExit(main())
