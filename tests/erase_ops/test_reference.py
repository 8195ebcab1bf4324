"""Every noise prediction of the SPM reference implementation, reproduced from its own files."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from diffusers import UNet2DConditionModel
from torch import Tensor

from expunge.erase_ops.attach import attach, detach
from expunge.erase_ops.entry import CallInfo
from expunge.erase_ops.spm import SPMAdapter

OUTPUTS = json.loads((Path(__file__).parent.parent / "fixtures" / "spm" / "outputs.json").read_text(encoding="utf-8"))


def read(fixtures: Path, name: str, alpha: float | None = None) -> SPMAdapter:
    adapter = SPMAdapter.from_pretrained(fixtures / f"{name}.safetensors")
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
    how = OUTPUTS[name]
    adapters = [read(fixtures, file, how["alpha"]) for file in how["files"]]
    base = predict(unet, reference)
    attachment = attach(unet, adapters, gate=how["gate"], combine=how["combine"], multiplier=how["multiplier"])
    with attachment.call(CallInfo(2)) if merged else attachment.force(how["gate"]):
        out = predict(unet, reference)
    torch.testing.assert_close(out, reference[name], atol=1e-4, rtol=0)
    detach(unet)
    assert torch.equal(predict(unet, reference), base)


@torch.no_grad()
def test_base_output(unet: UNet2DConditionModel, reference: dict[str, Tensor]) -> None:
    torch.testing.assert_close(predict(unet, reference), reference["eps_base"], atol=1e-4, rtol=0)
