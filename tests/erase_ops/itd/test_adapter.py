"""ItDAdapter in memory and on disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from expunge import ItDAdapter
from expunge.erase_ops.itd.classifier import calibrate_scores
from expunge.erase_ops.kinds import load_erasure
from expunge.errors import AdapterFormatError, InvalidInputError, NonFiniteError, UnsafePathError

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def made(pipe: Any, itd_for: Make) -> Any:
    return itd_for(pipe, "cat", "monet", fields={"strength": -8.0, "settings": {"n": 32}})


@pytest.fixture
def adapter(made: Any) -> Any:
    return replace(made)


@pytest.fixture(params=["topk", "jumprelu"])
def either(request: Any, pipe: Any, itd_for: Make) -> Any:
    return itd_for(pipe, "cat", activation=request.param)


def assert_same(one: Any, other: Any) -> None:
    for name in ("ids", "W_enc", "b_enc", "W_dec", "b_dec", "threshold"):
        mine, theirs = getattr(one.rows, name), getattr(other.rows, name)
        assert (mine is None and theirs is None) or torch.equal(mine, theirs)
    for name in ("threshold", "calibration", "strength", "detection_strength", "score", "family", "settings"):
        assert getattr(one, name) == getattr(other, name)
    assert one.rows.config == other.rows.config and one.concepts == other.concepts
    assert all(torch.equal(one.concept_features[name], other.concept_features[name]) for name in one.concepts)
    assert (one.hot is None and other.hot is None) or torch.equal(one.hot, other.hot)


def test_it_comes_back_bit_for_bit(either: Any, tmp_path: Path) -> None:
    folder = either.save_pretrained(tmp_path / "cat")
    again = ItDAdapter.from_pretrained(folder)
    assert_same(again, either)
    assert again.sae is None and type(load_erasure(folder)) is ItDAdapter and again.name == "cat"
    second = again.save_pretrained(tmp_path / "again")
    assert (folder / "erasure.safetensors").read_bytes() == (second / "erasure.safetensors").read_bytes()
    assert (folder / "erasure.json").read_bytes() == (second / "erasure.json").read_bytes()


def test_under_a_threshold_only_the_erased_rows_are_kept(pipe: Any, itd_for: Make, tmp_path: Path) -> None:
    adapter = itd_for(pipe, "cat", activation="jumprelu")
    tensors = load_file(adapter.save_pretrained(tmp_path) / "erasure.safetensors")
    assert tensors["sae.W_enc"].shape == tensors["sae.W_dec"].shape == (len(adapter.rows.ids), 32)


def test_the_card_says_what_it_is(adapter: Any, tmp_path: Path) -> None:
    card = (adapter.save_pretrained(tmp_path) / "README.md").read_text()
    for part in ("`cat`", "`monet`", "2503.09446", f"{adapter.threshold:.6g}", "benign_sha256", '"n": 32'):
        assert part in card


def test_facts_are_json(adapter: Any) -> None:
    facts = json.loads(json.dumps(adapter.facts()))
    assert facts["features"] == {name: len(ids) for name, ids in adapter.concept_features.items()}
    assert facts["layer"] == 1 and facts["dictionary"] == 256 and facts["bytes"] == adapter.rows.nbytes


def test_concepts_are_added_and_removed_by_name(adapter: Any) -> None:
    alone = ItDAdapter.from_sae(adapter.sae, {"cat": adapter.concept_features["cat"]})
    adapter.remove_concept("monet")
    assert adapter.concepts == ["cat"] and adapter.threshold is None and adapter.calibration is None
    assert torch.equal(adapter.rows.W_dec, alone.rows.W_dec)
    adapter.add_concept("dog", [250, 3])
    assert adapter.concepts == ["cat", "dog"] and adapter.concept_features["dog"].tolist() == [3, 250]
    assert torch.equal(adapter.rows.ids[adapter.places("dog")], torch.tensor([3, 250]))
    for name in ("monet", "dog"):
        with pytest.raises(InvalidInputError, match=name) if name == "monet" else pytest.MonkeyPatch.context():
            adapter.remove_concept(name)
    with pytest.raises(InvalidInputError, match="only one"):
        adapter.remove_concept("cat")


def test_the_order_of_concepts_does_not_matter(adapter: Any) -> None:
    features = adapter.concept_features
    other = ItDAdapter.from_sae(adapter.sae, {name: features[name].flip(0) for name in reversed(list(features))})
    assert torch.equal(other.rows.ids, adapter.rows.ids) and torch.equal(other.rows.W_dec, adapter.rows.W_dec)


def test_without_the_whole_autoencoder_known_features_can_be_regrouped(adapter: Any) -> None:
    small = replace(adapter, sae=None)
    known = small.rows.ids[:3]
    small.add_concept("some", known)
    assert small.concepts == ["cat", "monet", "some"]
    small.remove_concept("cat")
    assert set(small.rows.ids.tolist()) == {*known.tolist(), *small.concept_features["monet"].tolist()}
    unknown = next(i for i in range(256) if i not in small.rows.ids)
    with pytest.raises(InvalidInputError, match="whole autoencoder"):
        small.add_concept("x", [unknown])
    with pytest.raises(InvalidInputError, match="whole autoencoder"):
        small.whole(torch.device("cpu"))


def test_calibrating_sets_the_threshold_and_says_how(adapter: Any, pipe: Any) -> None:
    benign, encoder = ["a tree", "a house", "a dog on a beach"], {"text_encoder": pipe.text_encoder}
    encoder["tokenizer"] = pipe.tokenizer
    threshold = adapter.calibrate(benign, target=["a cat"], target_fpr=0.34, **encoder)
    scores = adapter.prompt_scores(prompts=benign, **encoder)
    expected, record = calibrate_scores(scores, 0.34, adapter.prompt_scores(prompts=["a cat"], **encoder))
    assert (threshold, adapter.threshold) == (expected, expected)
    assert adapter.calibration.items() >= record.items() and adapter.calibration["score"] == "max"
    assert adapter.prompt_scores(prompts=[], **encoder).shape == (0,)


@pytest.mark.parametrize("score", ["max", "mean", "official"])
def test_scores_do_not_depend_on_batch_or_padding(score: Any, adapter: Any, pipe: Any) -> None:
    adapter.score = score
    adapter.detection_strength = -8.0
    prompts = ["a cat", "a photo of a cat on a sofa", "a dog", "a painting of a house by monet"]
    together = adapter.prompt_scores(pipe.text_encoder, pipe.tokenizer, prompts)
    alone = torch.cat([adapter.prompt_scores(pipe.text_encoder, pipe.tokenizer, [one]) for one in prompts])
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=0)
    assert together[0] > 0


@pytest.mark.parametrize(
    "changes",
    [
        {"threshold": -1.0},
        {"threshold": float("nan")},
        {"strength": 1.0},
        {"strength": float("inf")},
        {"detection_strength": 1.0},
        {"score": "median"},
        {"family": "sd3"},
        {"concept_features": {}},
        {"concept_features": {"cat": [1, 2]}},
    ],
)
def test_bad_fields(changes: dict[str, Any], adapter: Any) -> None:
    with pytest.raises(InvalidInputError):
        replace(adapter, **changes)


def test_bad_features(adapter: Any) -> None:
    for name, ids in [("", [1]), ("x", []), ("x", [1.5]), ("x", [[1]]), ("x", [256]), ("x", [-1])]:
        with pytest.raises(InvalidInputError):
            ItDAdapter.from_sae(adapter.sae, {name: ids})
    with pytest.raises(InvalidInputError, match="at least one concept"):
        ItDAdapter.from_sae(adapter.sae, {})
    with pytest.raises(UnsafePathError):
        replace(adapter, name="../x")


def edit(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        file = folder / "erasure.json"
        record = json.loads(file.read_text())
        change(record)
        file.write_text(json.dumps(record))

    return apply


def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Callable[[Path], None]:
    """Changes the tensors, with a checksum that fits."""

    def apply(folder: Path) -> None:
        import hashlib

        file = folder / "erasure.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        data = file.read_bytes()
        entry = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        edit(lambda record: record["files"].update({file.name: entry}))(folder)

    return apply


DAMAGES: dict[str, Callable[[Path], None]] = {
    "another kind": edit(lambda r: r.update(kind="spm")),
    "no parameters": edit(lambda r: r.update(parameters={})),
    "an unknown parameter": edit(lambda r: r["parameters"].update(x=1)),
    "no autoencoder": edit(lambda r: r["parameters"].update(sae=None)),
    "an autoencoder without k": edit(lambda r: r["parameters"]["sae"].update(k=None)),
    "an unknown field of it": edit(lambda r: r["parameters"]["sae"].update(x=1)),
    "another component": edit(lambda r: r.update(component="text_encoder_2")),
    "no layer": edit(lambda r: r["parameters"]["sae"].update(layer=None)),
    "features as text": edit(lambda r: r["concepts"][0].update(features="1,2")),
    "a feature twice": edit(lambda r: r["concepts"][0]["features"].append(r["concepts"][0]["features"][0])),
    "a feature that is none": edit(lambda r: r["concepts"][0].update(features=[256])),
    "a feature that is true": edit(lambda r: r["concepts"][0].update(features=[True])),
    "other features": edit(lambda r: r["concepts"][0].update(features=[0])),
    "two concepts of one name": edit(lambda r: r["concepts"][1].update(text="cat")),
    "a strength of text": edit(lambda r: r["parameters"].update(strength="0")),
    "a strength that is true": edit(lambda r: r["parameters"].update(strength=True)),
    "a strength of one": edit(lambda r: r["parameters"].update(strength=1.0)),
    "an unknown score": edit(lambda r: r["parameters"].update(score="median")),
    "a negative threshold": edit(lambda r: r.update(threshold=-1)),
    "hot features of text": edit(lambda r: r["parameters"].update(hot=["1"])),
    "too few hot features": edit(lambda r: r["parameters"].update(hot=[1])),
    "a source of text": edit(lambda r: r["parameters"].update(source="sae")),
    "a tensor too few": rewrite(lambda t: t.pop("sae.b_dec")),
    "a tensor too many": rewrite(lambda t: t.update(x=torch.zeros(1))),
    "a row too few": rewrite(lambda t: t.update({"sae.W_dec": t["sae.W_dec"][1:]})),
    "a transposed encoder": rewrite(lambda t: t.update({"sae.W_enc": t["sae.W_enc"].T.contiguous()})),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_artefact_is_named(name: str, adapter: Any, tmp_path: Path) -> None:
    folder = adapter.save_pretrained(tmp_path / "cat")
    DAMAGES[name](folder)
    with pytest.raises(AdapterFormatError):
        ItDAdapter.from_pretrained(folder)


def test_infinite_weights(adapter: Any, tmp_path: Path) -> None:
    folder = adapter.save_pretrained(tmp_path / "cat")
    rewrite(lambda tensors: tensors["sae.W_dec"].fill_(float("inf")))(folder)
    with pytest.raises(NonFiniteError):
        ItDAdapter.from_pretrained(folder)


def test_a_source_outside_is_refused(adapter: Any, tmp_path: Path) -> None:
    folder = adapter.save_pretrained(tmp_path / "cat")
    edit(lambda r: r["parameters"].update(source={"name": "../../sae", "sha256": "0"}))(folder)
    with pytest.raises(UnsafePathError):
        ItDAdapter.from_pretrained(folder)


def test_what_is_no_artefact(tmp_path: Path, adapter: Any) -> None:
    with pytest.raises(AdapterFormatError, match=r"erasure\.json"):
        ItDAdapter.from_pretrained(tmp_path)
    with pytest.raises(InvalidInputError):
        ItDAdapter.from_pretrained(tmp_path / "absent")
    adapter.save_pretrained(tmp_path)
    with pytest.raises(InvalidInputError, match="overwrite"):
        adapter.save_pretrained(tmp_path, overwrite=False)
    with pytest.raises(InvalidInputError, match="sae_source"):
        adapter.save_pretrained(tmp_path, embed=False)


def test_what_goes_to_the_hub_is_whole(adapter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    def upload(folder: Path, repo_id: str, **kwargs: Any) -> str:
        seen.append((ItDAdapter.from_pretrained(folder), repo_id, kwargs["commit_message"]))
        return "https://hub/commit"

    monkeypatch.setattr("expunge.erase_ops.formats.hub.upload", upload)
    assert adapter.push_to_hub("me/cat") == "https://hub/commit"
    found, repo, message = seen[0]
    assert_same(found, adapter)
    assert repo == "me/cat" and "cat, monet" in message
