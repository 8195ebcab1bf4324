"""Files whose keys do not make whole adapters: other loaders apply nothing, or garbage, and say nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from expunge.errors import AdapterFormatError, ExpungeError

from .conftest import FLAT, SITE, artefact, kohya, save

Refusal = Callable[..., ExpungeError]
FIXTURE = Path(__file__).parent.parent / "fixtures" / "spm" / "official_spm_tiny.safetensors"
PAIR = {"lora_A.weight": torch.ones(1, 3), "lora_B.weight": torch.ones(2, 1)}

FILES: dict[str, dict[str, torch.Tensor]] = {
    "half the keys": dict(sorted(load_file(FIXTURE).items())[::2]),
    "only down": {key: tensor for key, tensor in load_file(FIXTURE).items() if "down" in key},
    "only alphas": {key: tensor for key, tensor in load_file(FIXTURE).items() if "alpha" in key},
    "one alpha missing": {key: tensor for key, tensor in load_file(FIXTURE).items() if key != f"{FLAT}.alpha"},
    "only lora_A": {f"unet.{SITE}.lora_A.weight": torch.ones(1, 3)},
    "another prefix": {key.replace("lora_unet", "lora_prior"): tensor for key, tensor in kohya().items()},
    "another architecture": {key.replace("mid_block", "double_blocks"): tensor for key, tensor in kohya().items()},
    "a transformer's": {f"transformer.{SITE}.{key}": tensor for key, tensor in PAIR.items()} | {"y": torch.ones(1)},
    "an unknown key": kohya() | {"extra": torch.ones(1)},
    "a text encoder's": kohya() | {"lora_te_text_model_encoder_layers_0_mlp_fc1.alpha": torch.ones(())},
    "DoRA": kohya() | {f"{FLAT}.dora_scale": torch.ones(2)},
    "LoHa": {f"{FLAT}.hada_w1_a": torch.ones(1, 3), f"{FLAT}.alpha": torch.tensor(1.0)},
    "a bias": {f"unet.{SITE}.{key}": tensor for key, tensor in PAIR.items()} | {"unet.x.lora_B.bias": torch.ones(2)},
    "two namings": kohya() | {f"unet.{SITE}.{key}": tensor for key, tensor in PAIR.items()},
    "one layer under two names": kohya() | {
        key.replace("mid_block_attentions_0", "middle_block_1"): tensor for key, tensor in kohya().items()
    },
    "a path that leads out": {f"unet.../../x.{key}": tensor for key, tensor in PAIR.items()},
    "a path with an empty part": {f"unet.a..b.{key}": tensor for key, tensor in PAIR.items()},
    "a path of 300 parts": {f"unet.{'.'.join('a' * 300)}.{key}": tensor for key, tensor in PAIR.items()},
    "a PEFT file alone": {f"base_model.model.{SITE}.{key}": tensor for key, tensor in PAIR.items()},
    "a plain model": {f"{SITE}.weight": torch.ones(2, 3)},
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_keys_that_make_no_adapter(tmp_path: Path, expect_refusal: Refusal, name: str) -> None:
    expect_refusal(AdapterFormatError, save(tmp_path / "x.safetensors", FILES[name]))


@pytest.mark.parametrize(
    "config",
    [
        [],
        {"peft_type": "LORA", "r": 2},
        {"peft_type": "LOHA", "r": 1},
        {"peft_type": ["LORA"], "r": 1},
        {"r": 1, "lora_alpha": None},
        {"r": 1, "use_dora": True},
        {"r": 1, "rank_pattern": {"(x+x+)+y": 1}},
        {"r": 1, "rank_pattern": 5},
        {"r": 1, "lora_alpha": [1]},
        {"r": 1, "init_lora_weights": "loftq"},
        {"r": 1, "init_lora_weights": ["x"]},
        {"r": 1, "concepts": "cat"},
        {"r": 1, "concepts": [1]},
        {"r": 1, "neutral": {}},
        {"r": 1, "layer_replication": [[0, 1]]},
    ],
)
def test_a_hostile_peft_configuration(tmp_path: Path, expect_refusal: Refusal, config: object) -> None:
    tensors = {f"base_model.model.{SITE}.{key}": tensor for key, tensor in PAIR.items()}
    save(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    expect_refusal(AdapterFormatError, tmp_path)


@pytest.mark.parametrize(
    "metadata", ["[", "[]", '{"unet.r": 1, "unet.use_dora": true}', '{"unet.r": "x"}', "[" * 99_999]
)
def test_hostile_diffusers_metadata(tmp_path: Path, expect_refusal: Refusal, metadata: str) -> None:
    tensors = {f"unet.{SITE}.{key}": tensor for key, tensor in PAIR.items()}
    expect_refusal(AdapterFormatError, save(tmp_path / "x.safetensors", tensors, {"lora_adapter_metadata": metadata}))


def test_alphas_in_keys_and_in_the_metadata(tmp_path: Path, expect_refusal: Refusal) -> None:
    tensors = {f"unet.{SITE}.{key}": tensor for key, tensor in PAIR.items()} | {f"unet.{SITE}.alpha": torch.tensor(1.0)}
    metadata = {"lora_adapter_metadata": '{"unet.r": 1, "unet.lora_alpha": 8}'}
    assert "alpha" in expect_refusal(AdapterFormatError, save(tmp_path / "x.safetensors", tensors, metadata)).found


def test_an_artefacts_files_of_two_saves(tmp_path: Path, expect_refusal: Refusal) -> None:
    one, two = artefact(tmp_path / "one"), artefact(tmp_path / "two")
    save(two / "erasure.safetensors", {"factors.a.b.down": torch.ones(2, 3), "factors.a.b.up": torch.ones(2, 2)})
    (one / "erasure.safetensors").write_bytes((two / "erasure.safetensors").read_bytes())
    expect_refusal(AdapterFormatError, one, concepts=None)
