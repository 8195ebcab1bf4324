"""Every noise prediction of the SPM reference implementation, reproduced from its own files."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from expunge.erase_ops.attach import attach, detach
from expunge.erase_ops.entry import CallInfo
from expunge.erase_ops.spm import SPMAdapter

FILES = {"A": "official_spm_tiny", "B": "official_spm_tiny_b", "D": "official_spm_tiny_alpha05"}

# output: (files, gate, multiplier, combine)
OUTPUTS = {
    "eps_A_mult0.0": ("A", 1.0, 0.0, "linear"),
    "eps_A_mult0.5": ("A", 1.0, 0.5, "linear"),
    "eps_A_mult1.0": ("A", 1.0, 1.0, "linear"),
    "eps_A_mult2.0": ("A", 1.0, 2.0, "linear"),
    "eps_A_merge1": ("A", 1.0, 1.0, "linear"),
    "eps_AB_merge_1_1": ("AB", 1.0, 1.0, "linear"),
    "eps_D_merge1": ("D", 1.0, 1.0, "linear"),
    "eps_D_ctoralpha0.5": ("D", 1.0, 1.0, "linear"),
    "eps_D_ctoralpha1.0": ("D", 1.0, 1.0, "linear"),
    "eps_A_infergate0.25": ("A", 0.25, 1.0, "official"),
    "eps_A_infergate0.5": ("A", 0.5, 1.0, "official"),
    "eps_AB_infergate_1_1": ("AB", 1.0, 1.0, "official"),
}


def read(fixtures: Path, letter: str, alpha: float | None = None) -> SPMAdapter:
    adapter = SPMAdapter.from_pretrained(fixtures / f"{FILES[letter]}.safetensors")
    if alpha is not None:
        adapter.factors = {path: dataclasses.replace(f, alpha=alpha) for path, f in adapter.factors.items()}
    return adapter


def predict(unet: UNet2DConditionModel, reference: dict[str, Tensor]) -> Tensor:
    return unet(reference["sample"], reference["timestep"], reference["encoder_hidden_states"]).sample


def test_every_output_is_covered(reference: dict[str, Tensor]) -> None:
    assert {name for name in reference if name.startswith("eps_")} == {*OUTPUTS, "eps_base"}


@pytest.mark.parametrize("merged", [True, False], ids=["merged", "lowrank"])
@pytest.mark.parametrize("name", OUTPUTS)
@torch.no_grad()
def test_reference_output(
    name: str, merged: bool, unet: UNet2DConditionModel, reference: dict[str, Tensor], fixtures: Path
) -> None:
    letters, gate, multiplier, combine = OUTPUTS[name]
    adapters = [read(fixtures, letter, 1.0 if name == "eps_D_ctoralpha1.0" else None) for letter in letters]
    base = predict(unet, reference)
    attachment = attach(unet, adapters, gate=gate, combine=combine, multiplier=multiplier)
    with attachment.call(CallInfo(2)) if merged else attachment.force(gate):
        out = predict(unet, reference)
    torch.testing.assert_close(out, reference[name], atol=1e-4, rtol=0)
    detach(unet)
    assert torch.equal(predict(unet, reference), base)


@torch.no_grad()
def test_base_output(unet: UNet2DConditionModel, reference: dict[str, Tensor]) -> None:
    torch.testing.assert_close(predict(unet, reference), reference["eps_base"], atol=1e-4, rtol=0)
