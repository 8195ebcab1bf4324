"""What takes an erasure away is a named error in the next call, before an image comes back; never a silent loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.attention_processor import CustomDiffusionAttnProcessor
from peft import HRAConfig, LoHaConfig, LoKrConfig
from torch import nn

from expunge import erase, restore
from expunge.errors import ErasureLostError, ExpungeError, UnsupportedOperationError
from expunge.pipelines.families import ErasedStableDiffusionImg2ImgPipeline, ErasedStableDiffusionPipeline

Pipe = Any
SITE = "down_blocks.0.attentions.0.transformer_blocks.0.attn2"


@pytest.fixture(scope="module")
def world(tiny_sd: Callable[..., Pipe], spm_for: Callable[..., Any]) -> Any:
    return spm_for(tiny_sd())


@pytest.fixture
def erased(world: Any, tiny_sd: Callable[..., Pipe]) -> Pipe:
    return erase(tiny_sd(), world)


def plain_unet(pipe: Pipe) -> UNet2DConditionModel:
    """A fresh model with the erased one's weights: what saving and loading its state gives."""
    unet = UNet2DConditionModel.from_config(pipe.unet.config)
    unet.load_state_dict(pipe.unet.state_dict(), strict=True)
    return unet.eval()


def custom_diffusion(pipe: Pipe) -> None:
    processors = dict(pipe.unet.attn_processors)
    attention = pipe.unet.get_submodule(SITE)
    processors[f"{SITE}.processor"] = CustomDiffusionAttnProcessor(
        train_kv=True, train_q_out=False, hidden_size=attention.inner_dim, cross_attention_dim=32
    )
    pipe.unet.set_attn_processor(processors)


def load_encoder(pipe: Pipe, other: Pipe) -> None:
    pipe.text_encoder.load_state_dict(other.text_encoder.state_dict())


def sibling(pipe: Pipe) -> None:
    restore(StableDiffusionPipeline(**pipe.components, requires_safety_checker=False))


# Each gets the erased pipeline and a plain one with other weights.
LOSSES: dict[str, Callable[[Pipe, Pipe], Any]] = {
    "another unet": lambda pipe, other: setattr(pipe, "unet", other.unet),
    "no unet": lambda pipe, other: setattr(pipe, "unet", None),
    "another unet, registered": lambda pipe, other: pipe.register_modules(unet=other.unet),
    "the state in a fresh unet": lambda pipe, other: setattr(pipe, "unet", plain_unet(pipe)),
    "a wrapper around the unet": lambda pipe, other: setattr(pipe, "unet", nn.DataParallel(pipe.unet)),
    "no forward pre-hooks": lambda pipe, other: pipe.unet._forward_pre_hooks.clear(),
    "no forward hooks": lambda pipe, other: pipe.unet._forward_hooks.clear(),
    "restored through a pipeline that shares the unet": lambda pipe, other: sibling(pipe),
    "a block from another unet": lambda pipe, other: setattr(pipe.unet, "mid_block", other.unet.mid_block),
    "one layer replaced": lambda pipe, other: setattr(pipe.unet.get_submodule(SITE), "to_k", nn.Linear(32, 32)),
    "fused attention": lambda pipe, other: pipe.fuse_qkv_projections(),
    "fused attention of the unet alone": lambda pipe, other: pipe.unet.fuse_qkv_projections(),
    "Custom Diffusion": lambda pipe, other: custom_diffusion(pipe),
    "a PEFT layer that reads weights": lambda pipe, other: pipe.unet.add_adapter(
        HRAConfig(r=2, target_modules=["to_k"]), adapter_name="hra"
    ),
    "another text encoder": lambda pipe, other: setattr(pipe, "text_encoder", other.text_encoder),
    "another text encoder's weights": load_encoder,
}


# In the middle of a call these are of no effect on its image, or stop it in the host's own code.
HOST_STUMBLES = {"another text encoder", "another text encoder's weights", "no unet", "a wrapper around the unet"}


def image_is_refused(pipe: Pipe, monkeypatch: pytest.MonkeyPatch, error: type[ExpungeError]) -> None:
    """The call raises, and nothing was decoded."""
    decoded: list[Any] = []
    monkeypatch.setattr(type(pipe.vae), "decode", lambda self, *args, **kwargs: decoded.append(args))
    with pytest.raises(error):
        pipe("a cat", num_inference_steps=1, output_type="pt")
    assert not decoded


@pytest.mark.parametrize("name", LOSSES)
def test_a_lost_erasure_makes_no_image(
    name: str, erased: Pipe, tiny_sd: Callable[..., Pipe], monkeypatch: pytest.MonkeyPatch
) -> None:
    erased("a cat", num_inference_steps=1, output_type="latent")  # whatever the first call leaves behind does not help
    LOSSES[name](erased, tiny_sd(seed=1))
    image_is_refused(erased, monkeypatch, ErasureLostError)


@pytest.mark.parametrize("name", [name for name in LOSSES if name.startswith("another") and "weights" not in name])
def test_putting_it_back_is_enough(
    name: str, erased: Pipe, tiny_sd: Callable[..., Pipe], draw: Callable[..., Any]
) -> None:
    before, own = draw(erased), (erased.unet, erased.text_encoder)
    LOSSES[name](erased, tiny_sd(seed=1))
    with pytest.raises(ErasureLostError):
        draw(erased)
    erased.unet, erased.text_encoder = own
    assert torch.equal(draw(erased), before)


def test_a_pipeline_that_lost_its_denoiser_is_erased_anew_or_plain_again(
    world: Any, erased: Pipe, tiny_sd: Callable[..., Pipe], draw: Callable[..., Any]
) -> None:
    image = draw(erased)
    erased.unet = tiny_sd().unet
    assert "0/84" in str(erased.erasures)
    assert torch.equal(draw(erase(erased, world)), image)
    erased.unet = tiny_sd().unet
    assert type(restore(erased)) is StableDiffusionPipeline
    assert torch.equal(draw(erased), draw(tiny_sd()))


def test_another_tokenizer(erased: Pipe, monkeypatch: pytest.MonkeyPatch) -> None:
    """To this one "cat" is what "dog" is to the other. A token that is merely added is harmless; see the gating."""
    vocabulary = dict(erased.tokenizer.get_vocab())
    swapped = {"cat</w>": vocabulary["dog</w>"], "dog</w>": vocabulary["cat</w>"]}
    merges = [("c", "at</w>"), ("a", "t</w>"), ("d", "og</w>"), ("o", "g</w>")]
    erased.tokenizer = type(erased.tokenizer)(vocab=vocabulary | swapped, merges=merges, model_max_length=16)
    image_is_refused(erased, monkeypatch, ErasureLostError)


@pytest.mark.parametrize("config", [LoHaConfig, LoKrConfig])
def test_peft_layers_that_add_are_fine(
    config: type, erased: Pipe, tiny_sd: Callable[..., Pipe], world: Any, bake: Callable[..., Pipe], draw: Any
) -> None:
    baked = bake(tiny_sd(), world)
    for pipe in (erased, baked):
        torch.manual_seed(3)
        pipe.unet.add_adapter(config(r=2, target_modules=["to_k"], init_weights=False), adapter_name="extra")
    torch.testing.assert_close(draw(erased), draw(baked), atol=1e-4, rtol=0)


def test_parts_of_an_erased_denoiser_do_not_run_alone(erased: Pipe) -> None:
    sample, states = torch.randn(1, 4, 8, 8), torch.randn(1, 16, 32)
    with pytest.raises(ErasureLostError):
        erased.unet.forward(sample, 1, encoder_hidden_states=states)
    with pytest.raises(ErasureLostError):
        erased.unet.get_submodule(SITE)(torch.randn(1, 4, 32), encoder_hidden_states=states)


@pytest.mark.parametrize("kind", [ErasedStableDiffusionPipeline, ErasedStableDiffusionImg2ImgPipeline])
def test_an_erased_class_on_a_plain_denoiser(kind: type, tiny_sd: Callable[..., Pipe]) -> None:
    images = {"image": torch.zeros(1, 3, 16, 16)} if "Img2Img" in kind.__name__ else {}
    for pipe in (kind(**tiny_sd().components, requires_safety_checker=False), kind.from_pipe(tiny_sd())):
        with pytest.raises(ErasureLostError, match="erase"):
            pipe("a cat", num_inference_steps=2, **images)


def at_first_step(act: Callable[[Pipe], Any]) -> Callable[..., dict[str, Any]]:
    """A callback that acts once."""
    done: list[bool] = []

    def callback(pipe: Pipe, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if not done:
            done.append(True)
            act(pipe)
        return tensors

    return callback


@pytest.mark.parametrize("name", [name for name in LOSSES if name not in HOST_STUMBLES])
def test_lost_in_the_middle_of_a_call(name: str, erased: Pipe, tiny_sd: Callable[..., Pipe]) -> None:
    other = tiny_sd(seed=1)
    callback = at_first_step(lambda pipe: LOSSES[name](pipe, other))
    with pytest.raises(ExpungeError):
        erased("a cat", num_inference_steps=2, output_type="latent", callback_on_step_end=callback)


@pytest.mark.parametrize("last_step", [False, True])
def test_an_erased_unet_of_others_is_not_this_one(
    last_step: bool, world: Any, erased: Pipe, spm_for: Callable[..., Any], tiny_sd: Callable[..., Pipe]
) -> None:
    other = erase(tiny_sd(), spm_for(tiny_sd(), "dog"))
    callback = at_first_step(lambda pipe: setattr(pipe, "unet", other.unet))
    with pytest.raises(ErasureLostError, match="same"):
        erased("a cat", num_inference_steps=1 if last_step else 2, callback_on_step_end=callback)


@pytest.mark.parametrize("change", ["erase", "restore"])
def test_no_change_of_erasures_inside_a_call(change: str, world: Any, erased: Pipe, draw: Callable[..., Any]) -> None:
    before = draw(erased)
    callback = at_first_step(lambda pipe: restore(pipe) if change == "restore" else erase(pipe, world))
    with pytest.raises(UnsupportedOperationError, match="has ended"):
        erased("a cat", num_inference_steps=2, output_type="latent", callback_on_step_end=callback)
    assert torch.equal(draw(erased), before)


def test_layers_that_see_other_rows_than_the_denoiser(erased: Pipe) -> None:
    """Rows of one batch in chunks: harmless while all rows share one weight, refused where each has its own gate."""
    for module in erased.unet.modules():
        if hasattr(module, "set_chunk_feed_forward"):
            module.set_chunk_feed_forward(1, 0)
    assert erased("a cat", num_inference_steps=1, output_type="latent").images.isfinite().all()
    with pytest.raises(UnsupportedOperationError, match="rows"):
        erased(["a cat", "a dog"], num_inference_steps=1, output_type="latent")


def test_group_offloading_must_come_after_erasing(world: Any, tiny_sd: Callable[..., Pipe]) -> None:
    pipe, cpu = tiny_sd(), torch.device("cpu")
    pipe.enable_group_offload(onload_device=cpu, offload_device=cpu, offload_type="leaf_level")
    with pytest.raises(UnsupportedOperationError, match="after erasing"):
        erase(pipe, world)
    assert type(pipe) is StableDiffusionPipeline


def test_fused_attention_must_come_after_or_never(world: Any, tiny_sd: Callable[..., Pipe]) -> None:
    pipe = tiny_sd()
    pipe.fuse_qkv_projections()
    with pytest.raises(UnsupportedOperationError, match="unfuse"):
        erase(pipe, world)
    assert type(pipe) is StableDiffusionPipeline
