"""Files that others write (the reference, kohya, diffusers, PEFT), against what their own libraries compute."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from expunge.erase_ops.formats.foreign import find_weights, read_foreign
from expunge.erase_ops.formats.lora import kohya_tensors, parse_key
from expunge.erase_ops.formats.peft_config import read_peft_config
from expunge.errors import AdapterFormatError, NonFiniteError

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "spm"
TinyPipeline = Callable[..., StableDiffusionPipeline]
SITES = [
    "down_blocks.0.attentions.0.proj_in",
    "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k",
    "mid_block.attentions.0.transformer_blocks.0.ff.net.2",
    "up_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0",
]


def weights(unet: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {site: unet.get_submodule(site).weight.detach().clone() for site in SITES}


def draw(module: torch.nn.Module) -> None:
    """LoRA starts B at zero; a test needs it to do something."""
    for name, parameter in module.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)


def test_the_reference_file_is_read_as_it_is() -> None:
    raw = load_file(FIXTURES / "official_spm_tiny_b.safetensors")
    file = read_foreign(FIXTURES / "official_spm_tiny_b.safetensors")
    assert file.concepts == ["mickey", "mickey mouse"] and file.family == "sd"
    assert len(file.factors) == 48 == len(raw) / 3
    for path, item in file.factors.items():
        key = "lora_unet_" + path.replace(".", "_")
        assert torch.equal(item.down, raw[key + ".lora_down.weight"])
        assert torch.equal(item.up, raw[key + ".lora_up.weight"])
        assert item.alpha == raw[key + ".alpha"].item()


def test_the_reference_files_sites_are_those_of_its_unet() -> None:
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_pretrained(FIXTURES / "tiny_unet")
    for path, item in read_foreign(FIXTURES / "official_spm_tiny.safetensors").factors.items():
        assert item.delta().shape == unet.get_submodule(path).weight.shape


def test_alpha_of_the_file_counts() -> None:
    file = read_foreign(FIXTURES / "official_spm_tiny_alpha05.safetensors")
    assert {item.scale for item in file.factors.values()} == {0.5}


@pytest.mark.parametrize("options", [{}, {"use_rslora": True}, {"init_lora_weights": "gaussian"}])
def test_a_peft_folder_computes_what_peft_computes(tmp_path: Path, tiny_sd: TinyPipeline, options: dict) -> None:
    unet = tiny_sd().unet
    before = weights(unet)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=SITES, lora_dropout=0.1, **options)
    if not options.get("use_rslora"):
        config.rank_pattern = {SITES[1]: 2, "ff.net.2": 3}
        config.alpha_pattern = {r"attn2\.to_k": 1.5, "^" + SITES[3] + "$": 9}
    model = get_peft_model(unet, config)
    draw(model)
    model.save_pretrained(tmp_path)
    after = weights(model.merge_and_unload())
    file = read_foreign(find_weights(tmp_path, None), ["cat"])
    assert sorted(file.factors) == sorted(SITES)
    for site in SITES:
        torch.testing.assert_close(before[site] + file.factors[site].delta(), after[site])


def test_a_diffusers_file_computes_what_diffusers_computes(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    pipe = tiny_sd()
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=SITES, alpha_pattern={"proj_in": 8}))
    draw(pipe.unet)
    from peft.utils import get_peft_model_state_dict

    metadata = pipe.unet.peft_config["default"].to_dict()
    metadata["target_modules"] = sorted(metadata["target_modules"])
    pipe.save_lora_weights(tmp_path, get_peft_model_state_dict(pipe.unet), unet_lora_adapter_metadata=metadata)
    fresh = tiny_sd()
    before = weights(fresh.unet)
    fresh.load_lora_weights(tmp_path)
    fresh.fuse_lora()
    fresh.unload_lora_weights()
    file = read_foreign(find_weights(tmp_path, None), ["cat"])
    assert sorted(file.factors) == sorted(SITES)
    for site, after in weights(fresh.unet).items():
        torch.testing.assert_close(before[site] + file.factors[site].delta(), after)


def test_what_save_lora_adapter_writes_is_read(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    unet = tiny_sd().unet
    unet.add_adapter(LoraConfig(r=4, lora_alpha=2, target_modules=SITES))
    unet.save_lora_adapter(tmp_path)
    file = read_foreign(find_weights(tmp_path, None), ["cat"])
    assert {item.scale for item in file.factors.values()} == {0.5}
    assert sorted(file.factors) == sorted(SITES)


@pytest.mark.parametrize(
    ("key", "site"),
    [
        ("unet.mid_block.attentions.0.proj_in.lora.down.weight", "mid_block.attentions.0.proj_in"),
        ("unet.mid.attn1.processor.to_q_lora.down.weight", "mid.attn1.to_q"),
        ("mid.attn1.processor.to_out_lora.down.weight", "mid.attn1.to_out.0"),
    ],
)
def test_older_diffusers_names(key: str, site: str) -> None:
    part = parse_key("diffusers", key)
    assert part is not None and part == (site, "down")


def test_a_kohya_file_of_any_rank(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    """Oracle: diffusers' reading of the same file."""
    pipe = tiny_sd()
    before = weights(pipe.unet)
    tensors = {}
    for index, site in enumerate(SITES):
        weight, flat, rank = before[site], "lora_unet_" + site.replace(".", "_"), index + 1
        conv = weight.ndim == 4
        tensors[flat + ".lora_down.weight"] = torch.randn(rank, *weight.shape[1:]).half()
        tensors[flat + ".lora_up.weight"] = torch.randn(weight.shape[0], rank, *((1, 1) if conv else ())).half()
        tensors[flat + ".alpha"] = torch.tensor(2) if index else torch.tensor(1.5)  # kohya writes integers as well
    path = tmp_path / "style.safetensors"
    save_file(tensors, path)
    file = read_foreign(path, ["cat"])
    pipe.load_lora_weights(path)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    for site, after in weights(pipe.unet).items():
        torch.testing.assert_close(before[site] + file.factors[site].delta(), after, atol=1e-5, rtol=1e-5)


def test_a_kohya_file_without_alphas_has_scale_one(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "official_spm_tiny_alpha05.safetensors")
    save_file({key: value for key, value in tensors.items() if "alpha" not in key}, tmp_path / "x.safetensors")
    file = read_foreign(tmp_path / "x.safetensors", ["cat"])
    assert {item.scale for item in file.factors.values()} == {1.0}


def test_sdxl_is_told_by_its_layers(tmp_path: Path, tiny_sdxl: TinyPipeline) -> None:
    unet = tiny_sdxl().unet
    get_peft_model(unet, LoraConfig(r=2, target_modules=["to_k"])).save_pretrained(tmp_path)
    assert read_foreign(find_weights(tmp_path, None), ["cat"]).family == "sdxl"
    sgm = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_k"
    save_file({f"{sgm}.lora_down.weight": torch.ones(1, 3), f"{sgm}.lora_up.weight": torch.ones(2, 1)}, tmp_path / "k")
    file = read_foreign(tmp_path / "k", ["cat"])
    assert file.family == "sdxl"
    assert list(file.factors) == ["down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"]


def test_what_is_missing_and_unexpected_is_listed(tmp_path: Path) -> None:
    tensors = load_file(FIXTURES / "official_spm_tiny.safetensors")
    first = next(key for key in sorted(tensors) if key.endswith("lora_up.weight"))
    del tensors[first]
    tensors["lora_te_text_model_encoder_layers_0_mlp_fc1.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(AdapterFormatError) as caught:
        read_foreign(tmp_path / "x.safetensors", ["cat"])
    assert "missing: [up of down_blocks.0.attentions.0.proj_in]" in caught.value.found
    assert "unexpected: [lora_te_text_model_encoder_layers_0_mlp_fc1.alpha]" in caught.value.found
    assert "denoiser only" in caught.value.fix


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"use_dora": True}, AdapterFormatError),
        ({"bias": "all"}, AdapterFormatError),
        ({"init_lora_weights": "pissa"}, AdapterFormatError),
        ({"modules_to_save": ["conv_in"]}, AdapterFormatError),
        ({"some_future_option": {"a": 1}}, AdapterFormatError),
        ({"peft_type": "LOHA"}, AdapterFormatError),
        ({"r": 0}, AdapterFormatError),
        ({"r": True}, AdapterFormatError),
        ({"lora_alpha": 0}, AdapterFormatError),
        ({"lora_alpha": "1"}, AdapterFormatError),
        ({"lora_alpha": 10**400}, NonFiniteError),
        ({"lora_alpha": float("nan")}, NonFiniteError),
        ({"rank_pattern": {"(a+)+": 1}}, AdapterFormatError),
        ({"alpha_pattern": ["x"]}, AdapterFormatError),
    ],
)
def test_configurations_that_are_not_plain_lora(change: dict[str, Any], error: type[Exception]) -> None:
    config = {**LoraConfig(r=2, target_modules=["to_k"]).to_dict(), "target_modules": ["to_k"]}
    assert read_peft_config(config, "adapter_config.json").alpha_of("x.to_k", 2) == 8
    with pytest.raises(error, match=r"adapter_config\.json"):
        read_peft_config({**config, **change}, "adapter_config.json")


def test_a_rank_that_contradicts_the_configuration(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    get_peft_model(tiny_sd().unet, LoraConfig(r=4, target_modules=["to_k"])).save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "r": 2}))
    with pytest.raises(AdapterFormatError, match="rank 2"):
        read_foreign(find_weights(tmp_path, None), ["cat"])
    path.unlink()
    with pytest.raises(AdapterFormatError, match=r"adapter_config\.json beside it"):
        read_foreign(find_weights(tmp_path, None), ["cat"])


def test_which_file_of_a_folder(tmp_path: Path) -> None:
    def touch(name: str) -> Path:
        path = tmp_path / "run" / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"")
        return path

    touch("a.safetensors")
    assert find_weights(tmp_path / "run", None).name == "a.safetensors"
    touch("b.safetensors")
    with pytest.raises(AdapterFormatError, match=r"\['a\.safetensors', 'b\.safetensors'\].*weight_name"):
        find_weights(tmp_path / "run", None)
    assert find_weights(tmp_path / "run", "b.safetensors").name == "b.safetensors"
    for name in ("pytorch_lora_weights.safetensors", "run_last.safetensors", "adapter_model.safetensors"):
        touch(name)
        assert find_weights(tmp_path / "run", None).name == name
    with pytest.raises(AdapterFormatError, match=r"'c\.safetensors'"):
        find_weights(tmp_path / "run", "c.safetensors")


def test_written_kohya_files_are_read_back(tmp_path: Path) -> None:
    file = read_foreign(FIXTURES / "official_spm_tiny.safetensors")
    raw = load_file(FIXTURES / "official_spm_tiny.safetensors")
    written = kohya_tensors(file.factors)
    assert written.keys() == raw.keys() and all(torch.equal(written[key], raw[key]) for key in raw)
