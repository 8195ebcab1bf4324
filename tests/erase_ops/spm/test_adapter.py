"""SPMAdapter: in memory, and every way to and from disk and the Hub."""

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, safe_open, save_file

from expunge.erase_ops.spm import Concept, Factors, SPMAdapter
from expunge.errors import (
    AdapterFormatError,
    InvalidInputError,
    NonFiniteError,
    UnsafePathError,
    UnsupportedOperationError,
)

FIXTURES = Path(__file__).resolve().parents[2] / "fixtures" / "spm"
FILE_A = FIXTURES / "official_spm_tiny.safetensors"
FILE_B = FIXTURES / "official_spm_tiny_b.safetensors"
TinyPipeline = Callable[..., StableDiffusionPipeline]


def make(unet: torch.nn.Module, **fields: Any) -> SPMAdapter:
    """An adapter of every attention site of a UNet, with ranks and alphas that differ from site to site."""
    factors = {}
    for index, (path, module) in enumerate(unet.named_modules()):
        if ".attentions." in path and isinstance(module, torch.nn.Linear | torch.nn.Conv2d):
            out, inner, *kernel = module.weight.shape
            rank = 1 + index % 3
            down, up = torch.randn(rank, inner, *kernel), torch.randn(out, rank, *(1 for _ in kernel))
            factors[path] = Factors(0.1 * down, 0.1 * up, alpha=1.0 if index % 2 else 0.3)
    states = torch.randn(2, 16, 32)
    concepts = [Concept("cat", states, (7, 3), (7, 3, 1), ("cat", "a cat")), Concept("Paris, Texas")]
    return SPMAdapter(factors, concepts, **fields)


def assert_equal(one: SPMAdapter, other: SPMAdapter) -> None:
    for name in (
        "neutral", "family", "component", "threshold", "calibration", "base_fingerprint", "text_encoder_fingerprint",
        "settings", "concepts",
    ):  # fmt: skip
        assert getattr(one, name) == getattr(other, name), name
    assert one.factors.keys() == other.factors.keys()
    for path, item in one.factors.items():
        assert torch.equal(item.down, other.factors[path].down) and torch.equal(item.up, other.factors[path].up)
        assert item.alpha == other.factors[path].alpha
    for first, second in zip(one.concept_list, other.concept_list, strict=True):
        assert (first.states is None) == (second.states is None)
        assert first.states is None or second.states is None or torch.equal(first.states, second.states)
        for name in ("text", "token_ids", "all_token_ids", "phrasings"):
            assert getattr(first, name) == getattr(second, name)


# ---------------------------------------------------------------------------------------------------------- in memory


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"factors": {}}, InvalidInputError),
        ({"factors": {"../x": Factors(torch.ones(1, 1), torch.ones(1, 1))}}, InvalidInputError),
        ({"concept_list": []}, InvalidInputError),
        ({"family": "flux"}, InvalidInputError),
        ({"component": "vae"}, InvalidInputError),
        ({"threshold": float("nan")}, InvalidInputError),
        ({"threshold": -1.0}, InvalidInputError),
        ({"name": "../x"}, UnsafePathError),
    ],
)
def test_adapters_are_checked(change: dict[str, Any], error: type[Exception]) -> None:
    valid = {"factors": {"a.b": Factors(torch.ones(1, 1), torch.ones(1, 1))}, "concept_list": [Concept("Van Gogh")]}
    assert SPMAdapter(**valid).name == "Van-Gogh"
    with pytest.raises(error):
        SPMAdapter(**{**valid, **change})


# ------------------------------------------------------------------------------------------------------- our own files


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_round_trip_keeps_every_bit(
    tmp_path: Path, tiny_sd: TinyPipeline, tiny_sdxl: TinyPipeline, family: str
) -> None:
    adapter = make(
        (tiny_sd if family == "sd" else tiny_sdxl)().unet,
        neutral="animal",
        family=family,
        threshold=0.1 + 0.2,
        calibration={"n_benign": 1000, "false_positive_rate": 0.01},
        base_fingerprint="a1:0",
        text_encoder_fingerprint="w1:0",
        settings={"lr": 1e-4, "pretrained_model_name_or_path": "a/b"},
    )
    folder = adapter.save_pretrained(tmp_path / "cat-spm")
    read = SPMAdapter.from_pretrained(folder)
    assert_equal(adapter, read)
    assert read.name == "cat-spm" and read.source == folder


def test_saving_twice_gives_equal_bytes(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    adapter = make(tiny_sd().unet)
    first = adapter.save_pretrained(tmp_path / "one")
    adapter.factors = dict(reversed(adapter.factors.items()))
    second = SPMAdapter.from_pretrained(adapter.save_pretrained(tmp_path / "two")).save_pretrained(tmp_path / "three")
    names = sorted(path.name for path in first.iterdir())
    assert len(names) == 6
    assert all((first / name).read_bytes() == (second / name).read_bytes() for name in names)


@given(alpha=st.floats(1e-30, 1e30), threshold=st.none() | st.floats(0, 2), text=st.text(min_size=1, max_size=20))
def test_any_number_and_text_round_trips(
    tmp_path_factory: pytest.TempPathFactory, alpha: float, threshold: float | None, text: str
) -> None:
    if not text.strip():
        text = "x"
    factors = {
        "a": Factors(torch.ones(1, 2), torch.ones(2, 1), alpha),
        "b": Factors(torch.ones(1, 2), torch.ones(2, 1)),
    }
    adapter = SPMAdapter(factors, [Concept(text)], neutral=text, threshold=threshold)
    folder = adapter.save_pretrained(tmp_path_factory.mktemp("any") / "x")
    assert_equal(adapter, SPMAdapter.from_pretrained(folder))


def test_an_artefact_keeps_its_own_concepts(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    folder = make(tiny_sd().unet).save_pretrained(tmp_path)
    assert SPMAdapter.from_pretrained(folder, concepts=["cat", "Paris, Texas"], neutral="").concepts[0] == "cat"
    with pytest.raises(InvalidInputError, match="keeps its own"):
        SPMAdapter.from_pretrained(folder, concepts="dog")
    with pytest.raises(InvalidInputError, match="keeps its own"):
        SPMAdapter.from_pretrained(folder, neutral="dog")


def test_nothing_broken_is_saved(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    adapter = make(tiny_sd().unet)
    adapter.save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    next(iter(adapter.factors.values())).down[0] = float("nan")
    with pytest.raises(NonFiniteError, match=r"factors\."):
        adapter.save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_the_card_says_what_a_reader_needs(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    adapter = make(
        tiny_sd().unet,
        threshold=0.75,
        neutral="`x` | <b>",
        calibration={"n_benign": 1000},
        settings={"pretrained_model_name_or_path": "owner/base"},
    )
    card = (adapter.save_pretrained(tmp_path) / "README.md").read_text()
    for words in ("`cat`, `Paris, Texas`", "`owner/base`", "| Gate threshold | 0.75 |", '"n_benign": 1000'):
        assert words in card
    for way in ("ErasedPipeline.from_pretrained", "pipe.load_lora_weights", "PeftModel.from_pretrained"):
        assert way in card
    assert "every prompt at full strength" in card and "`'x' \\| <b>`" in card


# ------------------------------------------------------------------------------------ as a LoRA, by others


def assert_applied(adapter: SPMAdapter, before: dict[str, torch.Tensor], unet: torch.nn.Module) -> None:
    for path, parameter in unet.named_parameters():
        site = path.removesuffix(".weight")
        expected = before[path] + (adapter.factors[site].delta() if site in adapter.factors else 0)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-6, rtol=1e-5, msg=path)


@pytest.mark.parametrize("family", ["sd", "sdxl"])
@pytest.mark.parametrize("library", ["diffusers", "peft", "kohya"])
def test_others_apply_the_same_delta(
    tmp_path: Path, tiny_sd: TinyPipeline, tiny_sdxl: TinyPipeline, family: str, library: str
) -> None:
    pipe = (tiny_sd if family == "sd" else tiny_sdxl)()
    adapter = make(pipe.unet)
    before = {name: parameter.detach().clone() for name, parameter in pipe.unet.named_parameters()}
    folder = adapter.save_pretrained(tmp_path / "spm")
    if library == "peft":
        unet = PeftModel.from_pretrained(pipe.unet, folder).merge_and_unload(safe_merge=True)
    else:
        adapter.concept_list = [Concept("cat")]
        pipe.load_lora_weights(folder if library == "diffusers" else adapter.save_reference(tmp_path / "x.safetensors"))
        pipe.fuse_lora()
        pipe.unload_lora_weights()
        unet = pipe.unet
    assert_applied(adapter, before, unet)


def test_a_loaded_lora_acts_on_images(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    pipe = tiny_sd()
    folder = make(pipe.unet).save_pretrained(tmp_path / "spm")

    def image() -> torch.Tensor:
        generator = torch.Generator().manual_seed(0)
        return torch.from_numpy(pipe("a dog", num_inference_steps=2, generator=generator, output_type="np").images)

    plain = image()
    pipe.load_lora_weights(folder, adapter_name="cat")
    assert not torch.equal(image(), plain)
    pipe.set_adapters("cat", 0.0)
    torch.testing.assert_close(image(), plain)


# -------------------------------------------------------------------------------------------------- the reference's


def test_reference_files_are_read_and_written_alike(tmp_path: Path) -> None:
    adapter = SPMAdapter.from_pretrained(FILE_B)
    assert adapter.concepts == ["mickey", "mickey mouse"] and adapter.name == "official_spm_tiny_b"
    assert (adapter.threshold, adapter.base_fingerprint, adapter.concept_list[0].states) == (None, None, None)
    path = adapter.save_reference(tmp_path / "again.safetensors")
    ours, theirs = load_file(path), load_file(FILE_B)
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    with safe_open(path, "pt") as one, safe_open(FILE_B, "pt") as other:
        assert one.metadata() == other.metadata()


def test_what_the_reference_layout_cannot_say(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    adapter = make(tiny_sd().unet)
    with pytest.raises(InvalidInputError, match="comma"):
        adapter.save_reference(tmp_path / "x.safetensors")
    adapter.concept_list = [Concept("cat")]
    with pytest.raises(InvalidInputError, match=r"\.safetensors"):
        adapter.save_reference(tmp_path / "x.pt")
    adapter.factors = {"some_layer.to_q": Factors(torch.ones(1, 1), torch.ones(1, 1))}
    with pytest.raises(UnsupportedOperationError, match="some_layer"):
        adapter.save_reference(tmp_path / "x.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_run_folder_of_the_reference(tmp_path: Path) -> None:
    run = tmp_path / "snoopy"
    run.mkdir()
    (run / "snoopy_last.safetensors").write_bytes(FILE_A.read_bytes())
    (run / "snoopy_500steps.safetensors").write_bytes(FILE_B.read_bytes())
    adapter = SPMAdapter.from_pretrained(run)
    assert adapter.concepts == ["snoopy"] and adapter.name == "snoopy"
    early = SPMAdapter.from_pretrained(run, weight_name="snoopy_500steps.safetensors")
    assert early.concepts == ["mickey", "mickey mouse"] and early.name == "snoopy_500steps"


def test_files_without_concepts_need_them(tmp_path: Path, tiny_sd: TinyPipeline) -> None:
    get_peft_model(tiny_sd().unet, LoraConfig(r=2, target_modules=["to_k"])).save_pretrained(tmp_path / "lora")
    with pytest.raises(InvalidInputError, match=r'pass concepts=\["\.\.\."\]'):
        SPMAdapter.from_pretrained(tmp_path / "lora")
    adapter = SPMAdapter.from_pretrained(tmp_path / "lora", concepts="cat", neutral="animal")
    assert (adapter.concepts, adapter.neutral, adapter.name) == (["cat"], "animal", "lora")
    assert SPMAdapter.from_pretrained(FILE_A, concepts=["dog", "wolf"], family="sdxl").concepts == ["dog", "wolf"]


@pytest.mark.parametrize("prompts", ["", ",", "a,,b", " "])
def test_metadata_with_empty_concepts(tmp_path: Path, prompts: str) -> None:
    save_file(load_file(FILE_A), tmp_path / "x.safetensors", {"prompts": prompts})
    with pytest.raises(AdapterFormatError, match=r"pass|Pass concepts"):
        SPMAdapter.from_pretrained(tmp_path / "x.safetensors")
    assert SPMAdapter.from_pretrained(tmp_path / "x.safetensors", concepts="cat").concepts == ["cat"]
    with pytest.raises(InvalidInputError):
        SPMAdapter.from_pretrained(tmp_path / "x.safetensors", concepts=[""])


def test_a_small_scale_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    adapter = SPMAdapter.from_pretrained(FILE_A)
    adapter.factors = {path: Factors(item.down, item.up, 1 / 16) for path, item in adapter.factors.items()}
    folder = adapter.save_pretrained(tmp_path / "weak")
    with caplog.at_level(logging.WARNING, logger="expunge"):
        SPMAdapter.from_pretrained(FILE_A)
        assert not caplog.records
        SPMAdapter.from_pretrained(folder)
    assert len(caplog.records) == 1 and "alpha / rank is only 0.0625" in caplog.text and "48 of 48" in caplog.text


# --------------------------------------------------------------------------------------------------------- paths, Hub


@pytest.mark.parametrize("path", ["nothing-here", "./a/b", "a/b.safetensors", "a\0b", "x" * 5000, "a/b/c"])
def test_no_such_path(path: str) -> None:
    with pytest.raises(InvalidInputError, match="path"):
        SPMAdapter.from_pretrained(path)


def test_a_file_has_no_subfolder() -> None:
    with pytest.raises(InvalidInputError, match="beside a file"):
        SPMAdapter.from_pretrained(FILE_A, subfolder="x")


def test_a_hub_repository(tmp_path: Path, tiny_sd: TinyPipeline, hub_cache: Callable[..., dict[str, Any]]) -> None:
    adapter = make(tiny_sd().unet)
    folder = adapter.save_pretrained(tmp_path / "x")
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    where = hub_cache("owner/cat-spm", {**files, "more/a.safetensors": FILE_A.read_bytes()})
    read = SPMAdapter.from_pretrained("owner/cat-spm", **where)
    assert_equal(adapter, read)
    assert read.name == "cat-spm"
    inner = SPMAdapter.from_pretrained("owner/cat-spm", subfolder="more", **where)
    assert (inner.concepts, inner.name) == (["snoopy"], "more")
    named = SPMAdapter.from_pretrained("owner/cat-spm", subfolder="more", weight_name="a.safetensors", **where)
    assert named.concepts == ["snoopy"] and named.name == "a"


def test_a_hub_repository_that_is_not_there(tmp_path: Path) -> None:
    where: dict[str, Any] = {"cache_dir": tmp_path, "local_files_only": True}
    with pytest.raises(InvalidInputError, match=r"owner/none.*can be reached"):
        SPMAdapter.from_pretrained("owner/none", **where)
    for arguments in ({"subfolder": "../x"}, {"weight_name": "/etc/x.safetensors"}):
        with pytest.raises(UnsafePathError):
            SPMAdapter.from_pretrained("owner/none", **arguments, **where)


def test_only_what_is_needed_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [
        "erasure.json",
        "a.safetensors",
        "a.bin",
        "unet/b.safetensors",
        "more/c.safetensors",
        "more/x/d.safetensors",
    ]
    taken: list[list[str]] = []

    def snapshot_download(repo_id: str, *, allow_patterns: Any, ignore_patterns: Any, **options: Any) -> str:
        patterns = {"allow_patterns": allow_patterns, "ignore_patterns": ignore_patterns}
        taken.append(list(huggingface_hub.utils.filter_repo_objects(names, **patterns)))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    (tmp_path / "more").mkdir()
    for arguments in ({}, {"subfolder": "more"}, {"weight_name": "unet/b.safetensors"}):
        with pytest.raises(AdapterFormatError):  # the folder is empty here
            SPMAdapter.from_pretrained("owner/name", **arguments)
    assert taken == [["erasure.json", "a.safetensors"], ["more/c.safetensors"], ["unet/b.safetensors"]]


def test_push_to_hub(tiny_sd: TinyPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, Any] = {}

    def create_repo(self: Any, repo_id: str, **options: Any) -> Any:
        seen.update(options)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/{repo_id}")

    def upload_folder(self: Any, *, repo_id: str, folder_path: Path, **options: Any) -> Any:
        seen.update(options, repo=repo_id, files=sorted(path.name for path in folder_path.iterdir()))
        return huggingface_hub.CommitInfo(
            commit_url="https://huggingface.co/o/x/commit/1", commit_message="", commit_description="", oid="1"
        )

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    address = make(tiny_sd().unet).push_to_hub("o/x", private=True, create_pr=True)
    assert address == "https://huggingface.co/o/x/commit/1"
    assert seen["repo"] == "o/x" and seen["private"] and seen["exist_ok"] and seen["create_pr"]
    assert len(seen["files"]) == 6 and "README.md" in seen["files"]
    assert seen["commit_message"] == "Upload SPM: cat, Paris, Texas"


def test_a_saved_folder_is_json_that_people_can_read(tmp_path: Path) -> None:
    folder = SPMAdapter.from_pretrained(FILE_B).save_pretrained(tmp_path)
    record = json.loads((folder / "erasure.json").read_text())
    assert [concept["text"] for concept in record["concepts"]] == ["mickey", "mickey mouse"]
    assert record["parameters"] == {"alpha": {"default": 1.0, "sites": {}}}
