"""Bad files of every layout are refused by a named error that says what is wrong."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expunge.erase_ops.sae.files import load_rows, load_sae
from expunge.errors import AdapterFormatError, InvalidInputError, NonFiniteError

Changed = Callable[..., Path]
NAN = torch.full((40,), torch.nan)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("sparsify/layers.4", {"activation": "groupmax"}, "activation to be 'topk'.*groupmax picks"),
        ("sparsify/layers.4", {"transcode": True}, "transcode to be False"),
        ("sparsify/layers.4", {"skip_connection": True}, "skip_connection to be False"),
        ("sparsify/layers.4", {"signed": True}, "signed to be False"),
        ("sparsify/layers.4", {"num_latents": -1}, "num_latents to be a whole number"),
        ("sparsify/layers.4", {"num_latents": 0, "expansion_factor": 0}, "expansion_factor to be a whole number"),
        ("sparsify/layers.4", {"num_latents": 0, "expansion_factor": 32}, r"shape \[192, 6\]"),
        ("sparsify/layers.4", {"rotary": 1}, "options whose meaning is known, found rotary"),
        ("openai_itd", {"normalize": True}, "normalize to be False"),
        ("openai_itd", {"tied": True}, "tied to be False"),
        ("openai_itd", {"k": None}, "k to be a whole number from 1, found None"),
        ("openai_itd", {"n_dirs_local": 400}, r"shape \[400, 6\]"),
        ("openai_itd", {"gelu": True}, "found gelu"),
        ("dictionary_learning_topk", {"trainer": {"dict_class": "GatedAutoEncoder"}}, "dict_class to be one of"),
        ("dictionary_learning_topk", {"trainer": None}, "dict_class to be one of"),
        ("dictionary_learning_topk", {"trainer": {"dict_class": "AutoEncoderTopK"}}, "k to be a whole number"),
    ],
)
def test_configurations(changed: Changed, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(AdapterFormatError, match=message):
        load_sae(changed(name, options))


@pytest.mark.parametrize(
    ("name", "tensors", "message"),
    [
        ("saelens_topk", {"b_enc": None}, r"missing: \['b_enc'\]"),
        ("saelens_topk", {"W_skip": torch.zeros(6, 6)}, r"unknown: \['W_skip'\]"),
        ("saelens_topk", {"W_dec": torch.zeros(6, 40)}, r"'W_dec' to be floating point of shape \[40, 6\]"),
        ("saelens_topk", {"b_dec": torch.zeros(6, dtype=torch.int64)}, "'b_dec' to be floating point.*another dtype"),
        ("saelens_jumprelu", {"threshold": None}, r"missing: \['threshold'\]"),
        ("sparsify/layers.4", {"W_dec": torch.zeros(6, 40)}, r"'W_dec' to be floating point of shape \[40, 6\]"),
        ("openai_itd", {"decoder.weight": torch.zeros(40, 6)}, r"'decoder.weight' to be .* \[6, 40\]"),
        ("dictionary_learning_batchtopk", {"threshold": torch.zeros(40)}, "'threshold' to be one number"),
        ("dictionary_learning_batchtopk", {"threshold": torch.tensor(-1.0)}, "thresholds from 0.*found negative"),
        ("dictionary_learning_topk", {"k": torch.tensor(5, dtype=torch.int32)}, "k to be 3"),
        ("saelens_topk_rescaled", {"W_dec": torch.zeros(40, 6)}, "decoder rows that are not zero"),
    ],
)
def test_tensors(changed: Changed, name: str, tensors: dict[str, Tensor | None], message: str) -> None:
    with pytest.raises(AdapterFormatError, match=message):
        load_sae(changed(name, None, tensors))


@pytest.mark.parametrize("read", [load_sae, lambda folder: load_rows(folder, [3])])
def test_nan_is_refused(changed: Changed, read: Callable[[Path], Any]) -> None:
    with pytest.raises(NonFiniteError, match="finite values in 'b_enc', found 40 of 40"):
        read(changed("saelens_topk", None, {"b_enc": NAN}))


def test_folders_without_an_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="an empty folder"):
        load_sae(tmp_path)
    with pytest.raises(InvalidInputError, match="nowhere', which is none"):
        load_sae(tmp_path / "nowhere")
    (tmp_path / "cfg.json").write_text("{}")
    with pytest.raises(AdapterFormatError, match="found a file"):
        load_sae(tmp_path / "cfg.json")
    with pytest.raises(AdapterFormatError, match=r"found cfg\.json"):
        load_sae(tmp_path)


@pytest.mark.parametrize("cut", [0, 7, 60, 1000])
def test_truncated_files(changed: Changed, cut: int) -> None:
    folder = changed("saelens_topk")
    weights = folder / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut])
    with pytest.raises(AdapterFormatError):
        load_sae(folder)


def test_pickles_under_another_name(changed: Changed) -> None:
    folder = changed("saelens_topk")
    torch.save({"W_enc": torch.zeros(2)}, folder / "sae_weights.safetensors")
    with pytest.raises(AdapterFormatError, match="pickled data under another name"):
        load_sae(folder)


def test_ids_that_are_no_features(changed: Changed) -> None:
    folder = changed("saelens_topk")
    for ids in ([40], [3, 3], [-1]):
        with pytest.raises(InvalidInputError, match="distinct ids from 0 to 39"):
            load_rows(folder, ids)
