"""The SPM reference's own files and outputs: largest difference of ours, merged and as a low-rank update.

    python benchmarks/bench_spm_fixtures.py [--json OUT.json]

`tests/fixtures/spm` holds files that the reference implementation wrote and the noise that it predicted with them on a
tiny UNet; `outputs.json` there says how each prediction was made.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from bars import Bar, print_table, verdict, write_json
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file

from expunge import SPMAdapter
from expunge.erase_ops.attach import attach, detach
from expunge.erase_ops.entry import CallInfo

FIXTURES = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "spm"
LIMIT = 1e-4


def read(name: str, alpha: float | None) -> SPMAdapter:
    """One of the reference's files; `alpha` stands in for the file's where the reference was constructed with it."""
    adapter = SPMAdapter.from_pretrained(FIXTURES / f"{name}.safetensors")
    if alpha is not None:
        adapter.factors = {path: dataclasses.replace(f, alpha=alpha) for path, f in adapter.factors.items()}
    return adapter


@torch.no_grad()
def difference(unet: UNet2DConditionModel, name: str, how: dict[str, Any], merged: bool) -> float:
    """Largest difference of one predicted noise from the reference's."""
    reference = load_file(FIXTURES / "reference.safetensors")
    adapters = [read(file, how["alpha"]) for file in how["files"]]
    attachment = attach(unet, adapters, gate=how["gate"], combine=how["combine"], multiplier=how["multiplier"])
    with attachment.call(CallInfo(2)) if merged else attachment.force(how["gate"]):
        out = unet(reference["sample"], reference["timestep"], reference["encoder_hidden_states"]).sample
    detach(unet)
    return float((out - reference[name]).abs().max())


def measure() -> list[Bar]:
    """Two rows, over all outputs."""
    outputs = json.loads((FIXTURES / "outputs.json").read_text(encoding="utf-8"))
    unet = UNet2DConditionModel.from_pretrained(FIXTURES / "tiny_unet").eval()
    rows = []
    for path, merged in (("merged", True), ("low-rank", False)):
        found = {name: difference(unet, name, how, merged) for name, how in outputs.items()}
        worst = max(found, key=found.__getitem__)
        rows.append(
            Bar(
                f"outputs of the SPM reference, {path}: largest difference",
                f"<= {LIMIT:.0e}",
                f"{found[worst]:.1e} ({worst[4:]}; {len(found)} outputs)",
                found[worst] <= LIMIT,
                found,
            )
        )
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="also write the rows here")
    arguments = parser.parse_args()
    rows = measure()
    print_table("SPM against its reference implementation", rows)
    if arguments.json:
        write_json(arguments.json, rows)
    return verdict(rows)


if __name__ == "__main__":
    raise SystemExit(main())
