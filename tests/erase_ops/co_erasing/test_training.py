"""train_co_erasing on tiny pipelines: its two stages, which text and image each forward sees, and resuming."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from trainer_checks import differing

from expunge.erase_ops.co_erasing.config import CoErasingConfig
from expunge.erase_ops.co_erasing.image_branch import ImageBranch
from expunge.erase_ops.co_erasing.prompts import ImagePrompts, mixture
from expunge.erase_ops.co_erasing.training import images_for, train_co_erasing
from expunge.erase_ops.training.draws import StreamDraws
from expunge.erase_ops.training.families import Conditioning, family_of
from expunge.erase_ops.training.loop import Callback
from expunge.erase_ops.training.trainer import PairTexts
from expunge.errors import InvalidInputError


@pytest.fixture
def config(tiny_sd: Callable[..., Any], image_encoder: Path, tmp_path: Path) -> Callable[..., CoErasingConfig]:
    """Factory of small settings."""
    torch.manual_seed(1)
    branch = ImageBranch.for_denoiser(tiny_sd().unet, embedding=12, tokens=3)
    path = tmp_path / "ip-adapter.safetensors"
    path.write_bytes(branch.file_bytes())

    def make(**changes: Any) -> CoErasingConfig:
        fields = {
            "prompts": ({"target": "a cat on the sofa", "neutral": "on the sofa"}, {"target": "a cat"}),
            "concepts": ("cat",),
            "image_encoder": str(image_encoder),
            "ip_adapter": str(path),
            "text_steps": 2,
            "max_train_steps": 2,
            "learning_rate": 1e-2,
            "batch_size": 2,
            "max_denoising_steps": 4,
            "drawn_images": 3,
            "selection": "esd-x",
            "text_selection": "esd-x-strict",
        }
        return CoErasingConfig.from_dict(fields | changes)

    return make


def test_both_stages_make_one_delta(
    config: Callable[..., CoErasingConfig], tiny_sd: Callable[..., Any], tmp_path: Path
) -> None:
    pipe, seen = tiny_sd(), list[int]()
    objects = [(id(item), item._version, item.requires_grad) for item in pipe.unet.parameters()]
    hooks = [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules()]
    delta = train_co_erasing(
        pipe, config(), output_dir=tmp_path / "out", progress=False, callback=lambda step, metrics: seen.append(step)
    )
    assert delta.settings["ip_adapter"] == "ip-adapter.safetensors" and str(tmp_path) not in json.dumps(delta.settings)
    assert seen == [1, 2, 3, 4] and (delta.method, delta.component) == ("co_erasing", "unet")
    assert set(delta.values) == {name for name, _ in pipe.unet.named_parameters() if ".attn2." in name}
    assert [(id(item), item._version, item.requires_grad) for item in pipe.unet.parameters()] == objects
    assert [len(module._forward_hooks) + len(module._forward_pre_hooks) for module in pipe.unet.modules()] == hooks
    text_only = train_co_erasing(pipe, config(max_train_steps=1, learning_rate=1e-12), progress=False)
    assert any(not torch.equal(value, text_only.values[name]) for name, value in delta.values.items())


def test_a_killed_run_resumes(
    config: Callable[..., CoErasingConfig], tiny_sd: Callable[..., Any], tmp_path: Path
) -> None:
    """In either stage."""
    pipe = tiny_sd()

    def run(folder: Path | None, callback: Callback | None) -> dict[str, Tensor]:
        kept = {} if folder is None else {"checkpointing_steps": 1, "resume_from_checkpoint": "latest"}
        return train_co_erasing(pipe, config(**kept), output_dir=folder, progress=False, callback=callback).values

    assert differing(run, (1, 3), tmp_path) == []


def test_which_prompts_see_an_image(config: Callable[..., CoErasingConfig], tiny_sd: Callable[..., Any]) -> None:
    family, tokens = family_of(tiny_sd()), torch.arange(4.0)[:, None, None].expand(4, 3, 32)
    for changes in ({}, {"refine": False, "unconditional_image": True, "image_scale": 0.5}):
        settings = config(**changes)
        texts = PairTexts.of(family, settings)
        prompts = ImagePrompts(texts, tokens, [torch.tensor([0, 2]), torch.tensor([1])], None, settings)
        pairs = torch.tensor([0, 1, 0])
        rows = prompts.drawn(pairs, StreamDraws(torch.Generator().manual_seed(0)))
        target, neutral = rows("target"), rows("neutral")
        assert torch.equal(target.states, texts.rows("target", pairs).states)
        assert target.image is not None and target.image_scale is not None
        assert target.image_scale.tolist() == [settings.image_scale] * 3
        assert (neutral.image is None) == settings.refine
        if not settings.refine:
            assert target.image[1].unique().tolist() == [1.0] and set(target.image[:, 0, 0].tolist()) <= {0.0, 1.0, 2.0}
        assert rows("unconditional").image is None


def test_drawn_images_belong_to_their_concept(config: Callable[..., CoErasingConfig]) -> None:
    targets = ("a cat", "the cat", "a dog", "the dog", "a bird")
    settings = config(prompts=[{"target": target} for target in targets], concepts=("cat", "dog"))
    found = images_for(settings, torch.tensor([0, 2, 3]))
    assert [images.tolist() for images in found] == [[0], [0], [1, 2], [1, 2], [0, 1, 2]]


def test_joining_rows_with_and_without_images() -> None:
    plain, shown = (
        Conditioning(torch.zeros(2, 4, 8)),
        Conditioning(torch.ones(1, 4, 8)).with_image(torch.ones(1, 3, 8), 0.7),
    )
    both = Conditioning.cat([plain, shown])
    assert both.image is not None and both.image_scale is not None and len(both) == 3
    assert both.image_scale.tolist() == pytest.approx([0, 0, 0.7]) and both.image[:, 0, 0].tolist() == [0, 0, 1]
    picked = both.rows([2, 0])
    assert picked.image is not None and picked.image[:, 0, 0].tolist() == [1, 0]


def test_prompt_banks_are_mixed_convexly(config: Callable[..., CoErasingConfig], tiny_sd: Callable[..., Any]) -> None:
    bank = Conditioning(torch.eye(4)[:, None, :], torch.eye(4))
    mixed = mixture(bank, torch.arange(200), config())
    assert mixed.pooled is not None and torch.equal(mixed.states[:, 0], mixed.pooled)
    assert bool((mixed.pooled >= 0).all())
    torch.testing.assert_close(mixed.pooled.sum(1), torch.ones(200))
    torch.testing.assert_close(mixed.pooled.mean(0), torch.full((4,), 0.25), atol=0.06, rtol=0)
    # Dirichlet(a, ..., a), a = 1 / 0.7: each weight has variance (1/4)(3/4) / (4 a + 1).
    torch.testing.assert_close(mixed.pooled.var(0), torch.full((4,), 0.1875 / (4 / 0.7 + 1)), atol=0.012, rtol=0)
    train_co_erasing(tiny_sd(), config(prompt_bank=("a cat", "the cat", "my cat")), progress=False)


def test_given_images(config: Callable[..., CoErasingConfig], tiny_sd: Callable[..., Any], tmp_path: Path) -> None:

    for index in range(3):
        Image.new("RGB", (20, 20), (80 * index, 0, 0)).save(tmp_path / f"{index}.png")
    delta = train_co_erasing(
        tiny_sd(), config(images=(str(tmp_path / "0.png"), str(tmp_path / "2.png"))), progress=False
    )
    assert delta.settings["images"] == ["0.png", "2.png"]


def test_bad_settings_are_named(config: Callable[..., CoErasingConfig]) -> None:
    bad: list[dict[str, Any]] = [
        {"ip_adapter": ""},
        {"student": "lora"},
        {"state_source": "drawn"},
        {"resume_from_checkpoint": "checkpoint-000001"},
        {"bank_temperature": 0.0},
        {"text_steps": 0},
    ]
    for changes in bad:
        with pytest.raises(InvalidInputError, match=next(iter(changes))):
            config(**changes)
