"""SPM as a PEFT method, through PEFT's and diffusers' own calls."""

import copy
import json
import pickle
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils import PeftType, get_peft_model_state_dict
from torch import Tensor, nn

from expunge.erase_ops.spm import SPMAdapter
from expunge.erase_ops.spm.peft import SPMConfig, SPMLayer, export_spm, load_spm, register
from expunge.errors import AdapterMismatchError, InvalidInputError, NonFiniteError, UnsupportedOperationError

FIXTURES = Path(__file__).resolve().parents[3] / "fixtures" / "spm"
TinyPipeline = Callable[..., StableDiffusionPipeline]


class Tiny(nn.Module):
    """A Linear, a strided and dilated Conv2d, and a Linear that nothing targets."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, stride=2, padding=2, dilation=2, padding_mode="reflect")
        self.linear = nn.Linear(4, 5)
        self.head = nn.Linear(5, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.linear(self.conv(x).movedim(1, -1)))  # [B, 3, H, W] -> [B, H', W', 4] -> [B, H', W', 2]


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(7))


def config(**fields: Any) -> SPMConfig:
    return SPMConfig(**{"r": 2, "target_modules": ["conv", "linear"], "init_weights": False, **fields})


def tiny(**fields: Any) -> PeftModel:
    return get_peft_model(Tiny(), config(**fields))


def by_hand(model: PeftModel, x: Tensor, adapters: dict[str, float]) -> Tensor:
    """The formula, from the parameters themselves."""
    base = model.get_base_model()
    conv, linear = base.conv, base.linear
    padded = nn.functional.pad(x, (2, 2, 2, 2), mode="reflect")
    y = nn.functional.conv2d(padded, conv.base_layer.weight, conv.base_layer.bias, stride=2, dilation=2)
    for name, scale in adapters.items():
        inner = nn.functional.conv2d(padded, conv.spm_down[name], stride=2, dilation=2)
        y = y + scale * nn.functional.conv2d(inner, conv.spm_up[name])
    z = y.movedim(1, -1)
    out = linear.base_layer(z)
    for name, scale in adapters.items():
        out = out + scale * (z @ linear.spm_down[name].T @ linear.spm_up[name].T)
    return base.head(out)


# ------------------------------------------------------------------------------------------------------- registration


def test_the_method_is_registered_once() -> None:
    register()
    register()
    assert PeftType("SPM") is PeftType["SPM"] is PeftType.SPM
    assert [member.value for member in PeftType].count("SPM") == 1
    assert pickle.loads(pickle.dumps(PeftType.SPM)) is PeftType.SPM and copy.deepcopy(PeftType.SPM) is PeftType.SPM


def test_a_method_of_that_name_from_elsewhere_is_left_alone() -> None:
    code = """
from peft.utils import PeftType, register_peft_method
from peft import IA3Config, IA3Model
member = str.__new__(PeftType, "SPM"); member._name_ = member._value_ = "SPM"
PeftType._member_map_["SPM"] = PeftType._value2member_map_["SPM"] = member; PeftType._member_names_.append("SPM")
type.__setattr__(PeftType, "SPM", member)
class Model(IA3Model): prefix = "spm_"
class Config(IA3Config): pass
register_peft_method(name="spm", config_cls=Config, model_cls=Model)
from expunge.errors import UnsupportedOperationError
try:
    import expunge.erase_ops.spm.peft
except UnsupportedOperationError as error:
    assert "__main__.Config" in str(error)
else:
    raise SystemExit("the name clash was not seen")
"""
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


@pytest.mark.parametrize(
    "fields", [{"r": 0}, {"r": True}, {"r": 1.5}, {"alpha": 0.0}, {"alpha": float("nan")}, {"rank_pattern": {"x": 0}}]
)
def test_configurations_are_checked(fields: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match="SPMConfig"):
        config(**fields)


# --------------------------------------------------------------------------------------------------------- arithmetic


def test_forward_is_the_formula() -> None:
    model = tiny(alpha=3.0)
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 1.5}))


def test_a_fresh_adapter_is_the_identity() -> None:
    base = Tiny().requires_grad_(False)  # as PEFT leaves it: torch may compute otherwise where a gradient is wanted
    expected = base(X)
    model = get_peft_model(base, config(init_weights=True))
    with torch.no_grad():
        assert torch.equal(model(X), expected)
    trainable = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trainable == {
        f"base_model.model.{layer}.spm_{part}.default" for layer in ("conv", "linear") for part in ("down", "up")
    }
    model(X).square().sum().backward()
    assert all(parameter.grad is not None for name, parameter in model.named_parameters() if name in trainable)


def test_ranks_and_alphas_by_layer() -> None:
    model = tiny(rank_pattern={"linear": 3}, alpha_pattern={"conv": 4.0})
    layers = model.get_base_model()
    assert (layers.conv.r, layers.linear.r) == ({"default": 2}, {"default": 3})
    assert (layers.conv.scaling, layers.linear.scaling) == ({"default": 2.0}, {"default": 1 / 3})


def test_several_adapters() -> None:
    model = tiny()
    model.add_adapter("two", config(r=1, alpha=0.5))
    assert not any(p.requires_grad for name, p in model.named_parameters() if name.endswith(".two"))
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 0.5}))
    model.base_model.set_adapter(["default", "two"])
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 0.5, "two": 0.5}))
    model.set_adapter("two")
    torch.testing.assert_close(model(X), by_hand(model, X, {"two": 0.5}))
    with model.disable_adapter():
        torch.testing.assert_close(model(X), by_hand(model, X, {}))
    model.delete_adapter("two")
    assert not [name for name, _ in model.named_parameters() if name.endswith(".two")]
    assert model.active_adapters == ["default"]
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 0.5}))
    with pytest.raises(ValueError, match="does not exist"):
        model.delete_adapter("two")


def test_scales() -> None:
    model = tiny()
    layers = [module for module in model.modules() if isinstance(module, SPMLayer)]
    for layer in layers:
        layer.set_scale("default", 3.0)
        layer.set_scale("unknown", 3.0)
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 1.5}))
    for layer in layers:
        layer.scale_layer(2.0)
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 3.0}))
    for layer in layers:
        layer.unscale_layer(2.0)
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 1.5}))
    for layer in layers:
        layer.unscale_layer()
    torch.testing.assert_close(model(X), by_hand(model, X, {"default": 0.5}))


# ------------------------------------------------------------------------------------------------------------ merging


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_unmerging_restores_every_bit(dtype: torch.dtype) -> None:
    model = get_peft_model(Tiny().to(dtype), config())
    model.add_adapter("two", config())
    base = {name: p.detach().clone() for name, p in model.named_parameters() if "spm" not in name}
    for _ in range(5):
        model.merge_adapter(["default"], safe_merge=True)
        model.merge_adapter(["two"])
        assert not torch.equal(
            model.get_base_model().linear.base_layer.weight, base["base_model.model.linear.base_layer.weight"]
        )
        model.unmerge_adapter()
    assert all(torch.equal(p, base[name]) for name, p in model.named_parameters() if name in base)


def test_merged_is_unmerged() -> None:
    model = tiny()
    model.add_adapter("two", config(r=1))
    model.base_model.set_adapter(["default", "two"])
    expected = model(X)
    model.merge_adapter()
    torch.testing.assert_close(model(X), expected, atol=1e-5, rtol=1e-5)
    with pytest.raises(ValueError, match="merged"):
        model.delete_adapter("two")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.unmerge_adapter()
    with pytest.warns(UserWarning, match="Already unmerged"):
        model.unmerge_adapter()
    assert torch.equal(model(X), expected)
    merged = model.merge_and_unload(safe_merge=True)
    assert isinstance(merged, Tiny) and type(merged.conv) is nn.Conv2d
    torch.testing.assert_close(merged(X), expected, atol=1e-5, rtol=1e-5)


def test_disabling_a_merged_adapter_gives_the_base() -> None:
    base = Tiny().requires_grad_(False)
    expected = base(X)
    model = get_peft_model(base, config())
    model.merge_adapter()
    with model.disable_adapter():
        assert torch.equal(model(X), expected)
    assert torch.equal(model.unload()(X), expected)


def test_a_safe_merge_refuses_nan() -> None:
    model = tiny()
    layer = model.get_base_model().linear
    before = layer.base_layer.weight.detach().clone()
    layer.spm_up["default"].data[0] = float("nan")
    with pytest.raises(NonFiniteError, match="default"):
        model.merge_adapter(safe_merge=True)
    assert torch.equal(layer.base_layer.weight, before) and not layer.merged


def test_what_cannot_be_merged_or_adapted() -> None:
    grouped = get_peft_model(nn.Sequential(nn.Conv2d(4, 4, 1, groups=2)), config(target_modules=["0"]))
    assert grouped(torch.randn(1, 4, 2, 2)).shape == (1, 4, 2, 2)
    with pytest.raises(UnsupportedOperationError, match="groups"):
        grouped.merge_adapter()
    with pytest.raises(UnsupportedOperationError, match="Embedding"):
        get_peft_model(nn.Sequential(nn.Embedding(3, 3)), config(target_modules=["0"]))


# ----------------------------------------------------------------------------------------------------- saving, loading


def test_save_and_load(tmp_path: Path) -> None:
    model = tiny(concepts=["cat"], neutral="animal", rank_pattern={"linear": 3})
    model.add_adapter("two", config(r=1))
    model.save_pretrained(tmp_path)
    assert isinstance(PeftConfig.from_pretrained(tmp_path), SPMConfig)
    assert PeftConfig.from_pretrained(tmp_path).concepts == ["cat"]
    base = Tiny()
    base.load_state_dict({k.replace(".base_layer", ""): v for k, v in model.get_base_model().state_dict().items()
                          if "spm" not in k})  # fmt: skip
    for options in ({}, {"low_cpu_mem_usage": True}):
        read = PeftModel.from_pretrained(copy.deepcopy(base), tmp_path, **options)
        assert torch.equal(read(X), model(X))
        read.load_adapter(tmp_path / "two", "two")
        assert torch.equal(read(X), model(X))  # a further adapter is not activated
        read.base_model.set_adapter(["default", "two"])
        model.base_model.set_adapter(["default", "two"])
        assert torch.equal(read(X), model(X))
        model.set_adapter("default")


def test_saving_is_deterministic(tmp_path: Path) -> None:
    names = ("q", "k", "to_out", "ff")
    layers = nn.ModuleList(nn.ModuleDict({name: nn.Linear(2, 2) for name in (*names, "v")}) for _ in range(10))
    targets = [f"{index}.{name}" for index in range(10) for name in names]
    get_peft_model(layers, config(target_modules=targets)).save_pretrained(tmp_path)
    # So many that PEFT shortens them to a set of endings, whose order differs from process to process.
    assert json.loads((tmp_path / "adapter_config.json").read_text())["target_modules"] == sorted(names)


def test_deepcopy_and_pickle() -> None:
    model = tiny()
    expected = model(X)
    assert torch.equal(copy.deepcopy(model)(X), expected)
    assert torch.equal(pickle.loads(pickle.dumps(model.get_base_model()))(X), expected)


def test_beside_a_lora() -> None:
    model = Tiny()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["linear"], init_lora_weights=False), model, "style")
    expected = model(X)
    inject_adapter_in_model(config(init_weights=True), model, "cat")
    assert torch.equal(model(X), expected)
    assert isinstance(model.linear, SPMLayer) and isinstance(model.linear.get_base_layer(), nn.Linear)


# ------------------------------------------------------------------------------------------------------ denoisers


def test_the_default_coverage_is_the_references(tiny_sd: TinyPipeline) -> None:
    unet = tiny_sd().unet
    sites = sum(".attentions." in name and isinstance(m, nn.Linear | nn.Conv2d) for name, m in unet.named_modules())
    model = get_peft_model(unet, SPMConfig())
    assert sum(isinstance(module, SPMLayer) for module in model.modules()) == sites
    model = get_peft_model(tiny_sd().unet, SPMConfig(coverage="cross_attention"))
    assert all(".attn2." in name for name, m in model.named_modules() if isinstance(m, SPMLayer))
    with pytest.raises(UnsupportedOperationError):
        get_peft_model(Tiny(), SPMConfig())


def test_diffusers_own_calls(tiny_sd: TinyPipeline) -> None:
    pipe = tiny_sd()

    def image() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe("a dog", num_inference_steps=1, generator=generator, output_type="np").images)

    plain = image()
    pipe.unet.add_adapter(SPMConfig(init_weights=False), "cat")
    pipe.unet.add_adapter(SPMConfig(init_weights=False), "dog")
    pipe.unet.set_adapters(["cat", "dog"], [0.5, 2.0])
    both = image()
    assert not torch.equal(both, plain)
    pipe.unet.set_adapters(["cat", "dog"], [0.0, 0.0])
    torch.testing.assert_close(image(), plain)
    pipe.unet.disable_adapters()
    assert torch.equal(image(), plain)
    pipe.unet.enable_adapters()
    pipe.unet.delete_adapters(["cat", "dog"])
    assert torch.equal(image(), plain)


def test_what_save_lora_adapter_writes_is_read_back(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    unet = tiny_sd().unet
    unet.add_adapter(SPMConfig(r=2, init_weights=False, concepts=["cat"]), "cat")
    get_peft_model(tiny_sd().unet, SPMConfig(r=2, init_weights=False, concepts=["cat"])).save_pretrained(tmp_path)
    adapter = SPMAdapter.from_pretrained(tmp_path)
    assert adapter.concepts == ["cat"] and {item.scale for item in adapter.factors.values()} == {0.5}
    exported = export_spm(unet, "cat")
    assert exported.factors.keys() == adapter.factors.keys() and exported.concepts == ["cat"]


@pytest.mark.parametrize("file", ["official_spm_tiny", "official_spm_tiny_alpha05"])
def test_the_reference_file_as_a_peft_adapter(file: str) -> None:
    """Oracle: the noise prediction of the reference's own classes with the same file."""
    from safetensors.torch import load_file

    data = load_file(FIXTURES / "reference.safetensors")
    expected = data["eps_A_merge1" if file.endswith("tiny") else "eps_D_merge1"]
    unet = UNet2DConditionModel.from_pretrained(FIXTURES / "tiny_unet")
    adapter = SPMAdapter.from_pretrained(FIXTURES / f"{file}.safetensors")
    model = load_spm(unet, adapter)
    inputs = (data["sample"], data["timestep"], data["encoder_hidden_states"])
    with torch.no_grad():
        torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-4, rtol=0)
        model.merge_adapter(safe_merge=True)
        torch.testing.assert_close(model(*inputs).sample, expected, atol=1e-4, rtol=0)
        with model.disable_adapter():
            torch.testing.assert_close(model(*inputs).sample, data["eps_base"], atol=1e-5, rtol=0)


def test_to_peft_and_back(tmp_path: Path) -> None:
    unet = UNet2DConditionModel.from_pretrained(FIXTURES / "tiny_unet")
    one = SPMAdapter.from_pretrained(FIXTURES / "official_spm_tiny_b.safetensors", neutral="mouse")
    two = SPMAdapter.from_pretrained(FIXTURES / "official_spm_tiny_alpha05.safetensors")
    model = load_spm(load_spm(unet, one), two, "two")
    for adapter, name in ((one, "default"), (two, "two")):
        back = export_spm(model, name)
        assert (back.concepts, back.neutral) == (adapter.concepts, adapter.neutral)
        assert back.base_fingerprint is not None
        for path, item in adapter.factors.items():
            assert torch.equal(back.factors[path].down, item.down) and torch.equal(back.factors[path].up, item.up)
            assert back.factors[path].alpha == item.alpha
    keys = get_peft_model_state_dict(model)
    assert len(keys) == 2 * 48 and all(key.endswith((".spm_down", ".spm_up")) for key in keys)
    with pytest.raises(InvalidInputError, match="free"):
        load_spm(model, one)
    with pytest.raises(InvalidInputError, match="none"):
        export_spm(model, "none")


def test_an_adapter_of_another_model_changes_nothing(tiny_sd: TinyPipeline) -> None:
    unet = tiny_sd().unet
    before = [name for name, _ in unet.named_modules()]
    adapter = SPMAdapter.from_pretrained(FIXTURES / "official_spm_tiny.safetensors")
    with pytest.raises(AdapterMismatchError, match="other shapes"):
        load_spm(unet, adapter)
    assert [name for name, _ in unet.named_modules()] == before
