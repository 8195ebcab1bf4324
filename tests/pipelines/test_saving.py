"""What save_pretrained writes: the clean base for everybody, and the erasures for ErasedPipeline."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from peft import LoraConfig

from expunge import ErasedPipeline, erase, restore
from expunge.errors import (
    AdapterFormatError,
    AdapterMismatchError,
    ErasureLostError,
    InvalidInputError,
    UnsafePathError,
    UnsupportedOperationError,
)
from expunge.pipelines.families import ErasedStableDiffusionXLPipeline

Pipe = Any
TinyPipe = Callable[..., Pipe]
Draw = Callable[..., torch.Tensor]


@pytest.fixture
def saved(erased: Pipe, tmp_path: Path) -> Path:
    erased.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def load(folder: Path, **kwargs: Any) -> Pipe:
    pipe = ErasedPipeline.from_pretrained(folder, **kwargs)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_it_comes_back_erased_bit_for_bit(erased: Pipe, saved: Path, draw: Draw) -> None:
    again = load(saved)
    assert type(again) is type(erased)
    for prompts in ("a cat", ["a cat", "a dog"]):
        assert torch.equal(draw(again, prompts), draw(erased, prompts))
    assert again.erasures.to_dict() == erased.erasures.to_dict()


def test_settings_and_order_come_back(tiny_sd: TinyPipe, cat: Any, van_gogh: Any, draw: Draw, tmp_path: Path) -> None:
    settings = {"combine": "official", "gate_threshold": 0.25, "multiplier": [2.0, 0.5], "gate_negative": False}
    pipe = erase(tiny_sd(), [van_gogh, cat], **settings)
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert torch.equal(draw(again, "a cat by van gogh"), draw(pipe, "a cat by van gogh"))
    assert again.erasures.to_dict() == pipe.erasures.to_dict()
    assert [row.multiplier for row in load(tmp_path, multiplier=1.0, combine="linear").erasures.rows] == [1.0, 1.0]


def test_a_plain_pipeline_opens_the_clean_base(saved: Path, tiny_sd: TinyPipe, draw: Draw, cat: Any) -> None:
    index = json.loads((saved / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionPipeline"
    pipe = DiffusionPipeline.from_pretrained(saved)
    pipe.set_progress_bar_config(disable=True)
    assert type(pipe) is StableDiffusionPipeline
    assert torch.equal(draw(pipe), draw(tiny_sd()))
    card = (saved / "README.md").read_text()
    assert "`cat`" in card and "without** any erasure" in card


def test_sdxl_comes_back(tiny_sdxl: TinyPipe, spm_for: Any, draw: Draw, tmp_path: Path) -> None:
    pipe = erase(tiny_sdxl(), spm_for(tiny_sdxl()))
    pipe.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again) is ErasedStableDiffusionXLPipeline and isinstance(again, StableDiffusionXLPipeline)
    assert torch.equal(draw(again), draw(pipe))


def test_made_anew_for_another_model_it_fits_that_one(tiny_sd: TinyPipe, cat: Any, draw: Draw, tmp_path: Path) -> None:
    pipe = erase(tiny_sd(seed=1), replace(cat, base_fingerprint="a1:" + "0" * 32), allow_mismatch=True)
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(load(tmp_path)), draw(pipe))


def test_saving_again_replaces_what_was_saved(erased: Pipe, van_gogh: Any, saved: Path, draw: Draw) -> None:
    (saved / "README.md").write_text("# My model\n\n" + (saved / "README.md").read_text() + "\nThe end\n")
    (saved / "erasures" / "notes.txt").write_text("mine")
    erase(erased, van_gogh).save_pretrained(saved)
    assert sorted(path.name for path in (saved / "erasures").iterdir()) == ["erasing.json", "notes.txt", "van-gogh"]
    assert torch.equal(draw(load(saved)), draw(erased))
    card = (saved / "README.md").read_text()
    assert card.count("ErasedPipeline.from_pretrained(") == 1 and "`cat`" not in card
    assert card.startswith("# My model") and "The end" in card


def test_adapters_of_one_name_are_all_saved(tiny_sd: TinyPipe, cat: Any, draw: Draw, tmp_path: Path) -> None:
    pipe = erase(tiny_sd(), [cat, replace(cat, threshold=0.5), cat], multiplier=[1.0, 0.5, 0.25])
    pipe.save_pretrained(tmp_path)
    assert torch.equal(draw(load(tmp_path)), draw(pipe))


def test_half_precision(tiny_sd: TinyPipe, cat: Any, draw: Draw, tmp_path: Path) -> None:
    pipe = erase(tiny_sd().to(torch.float16), cat)
    pipe.save_pretrained(tmp_path, variant="fp16")
    again = load(tmp_path, variant="fp16", torch_dtype=torch.float16)
    assert torch.equal(draw(again), draw(pipe))


def test_a_loaded_lora_is_refused_before_anything_is_written(erased: Pipe, tmp_path: Path) -> None:
    erased.unet.add_adapter(LoraConfig(r=2, target_modules=["to_k"]), adapter_name="style")
    with pytest.raises(UnsupportedOperationError, match=r"unet.*unload_lora_weights"):
        erased.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()
    erased.fuse_lora()
    erased.unload_lora_weights()
    erased.save_pretrained(tmp_path / "model")
    assert load(tmp_path / "model").erasures.rows


def test_a_lost_erasure_is_not_saved(erased: Pipe, tiny_sd: TinyPipe, tmp_path: Path) -> None:
    erased.unet = tiny_sd().unet
    with pytest.raises(ErasureLostError):
        erased.save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_restored_pipeline_saves_a_plain_model(erased: Pipe, tmp_path: Path) -> None:
    restore(erased).save_pretrained(tmp_path)
    assert not (tmp_path / "erasures").exists()
    with pytest.raises(InvalidInputError, match="neither"):
        ErasedPipeline.from_pretrained(tmp_path)


def test_two_sources_of_erasures_are_one_too_many(saved: Path, van_gogh: Any) -> None:
    with pytest.raises(InvalidInputError, match="both"):
        ErasedPipeline.from_pretrained(saved, erasures=[van_gogh])


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"format_version": 2}, AdapterFormatError),
        ({"settings": {}}, AdapterFormatError),
        ({"settings": {"combine": "linear"}}, AdapterFormatError),
        ({"erasures": "cat"}, AdapterFormatError),
        ({"erasures": ["dog"]}, AdapterFormatError),
        ({"erasures": []}, InvalidInputError),
        ({"erasures": ["../../cat"]}, UnsafePathError),
        ({"erasures": [3]}, UnsafePathError),
    ],
)
def test_a_damaged_list_of_erasures_is_named(change: dict[str, Any], error: type[Exception], saved: Path) -> None:
    file = saved / "erasures" / "erasing.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(error):
        ErasedPipeline.from_pretrained(saved)


def test_another_encoder_in_the_folder_is_noticed(saved: Path, tiny_sd: TinyPipe) -> None:
    tiny_sd(seed=1).text_encoder.save_pretrained(saved / "text_encoder")
    with pytest.raises(AdapterMismatchError, match="text encoders"):
        ErasedPipeline.from_pretrained(saved)


def test_what_goes_to_the_hub_has_the_erasures(
    erased: Pipe, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, draw: Draw
) -> None:
    uploaded: list[Path] = []

    def upload(folder_path: Any, **kwargs: Any) -> str:
        import shutil

        uploaded.append(Path(shutil.copytree(folder_path, tmp_path / f"upload-{len(uploaded)}")))
        return "done"

    class Repository:
        repo_id = "someone/model"

    class Card:
        data: Any = None

        def save(self, path: Any) -> None:
            Path(path).write_text("# a card of the host's\n")

    for module in ("diffusers.utils.hub_utils", "diffusers.pipelines.pipeline_utils"):
        monkeypatch.setattr(f"{module}.create_repo", lambda *args, **kwargs: Repository())
        monkeypatch.setattr(f"{module}.load_or_create_model_card", lambda *args, **kwargs: Card())
        monkeypatch.setattr(f"{module}.populate_model_card", lambda card, *args, **kwargs: card)
    monkeypatch.setattr("diffusers.utils.hub_utils.upload_folder", upload)
    erased.push_to_hub("someone/model")
    erased.save_pretrained(str(tmp_path / "model"), push_to_hub=True, repo_id="someone/model")
    assert len(uploaded) == 2
    for folder in uploaded:
        assert torch.equal(draw(load(folder)), draw(erased))
        assert (folder / "README.md").read_text().startswith("# a card of the host's")
        assert "`cat`" in (folder / "README.md").read_text()


def test_from_the_hub(saved: Path, erased: Pipe, monkeypatch: pytest.MonkeyPatch, draw: Draw, tmp_path: Path) -> None:
    """A repository as the Hub's cache would hold it."""
    cached = tmp_path / "hub" / "models--someone--model"
    snapshot = cached / "snapshots" / ("0" * 40)
    snapshot.parent.mkdir(parents=True)
    saved.rename(snapshot)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    (cached / "blobs").mkdir()
    offline = {"cache_dir": tmp_path / "hub", "local_files_only": True}
    pipe = ErasedPipeline.from_pretrained("someone/model", **offline)
    pipe.set_progress_bar_config(disable=True)
    assert torch.equal(draw(pipe), draw(erased))
    with pytest.raises(InvalidInputError, match="both"):
        ErasedPipeline.from_pretrained("someone/model", erasures=["someone/spm"], **offline)
