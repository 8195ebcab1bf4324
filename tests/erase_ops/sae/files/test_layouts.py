"""Files that the libraries wrote: same activations, same support and same reconstruction as their own code."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from expunge.erase_ops.sae.files import load_rows, load_sae
from expunge.errors import AdapterFormatError, InvalidInputError, UnsafePathError

TOPK = ["dictionary_learning_topk", "openai_itd", "saelens_topk", "saelens_topk_rescaled", "saelens_topk_unapplied"]
TOPK += ["sparsify/layers.4", "sparsify_expansion/layers.4"]
BATCHTOPK = ["dictionary_learning_batchtopk", "dictionary_learning_matryoshka"]
JUMPRELU = ["dictionary_learning_jumprelu", "dictionary_learning_standard", "dictionary_learning_standard_new"]
JUMPRELU += ["saelens_batchtopk", "saelens_jumprelu", "saelens_standard"]


def test_every_fixture_is_tested(fixture_folders: dict[str, Path]) -> None:
    assert sorted(fixture_folders) == sorted(TOPK + BATCHTOPK + JUMPRELU)


@pytest.mark.parametrize("name", TOPK + BATCHTOPK + JUMPRELU)
def test_the_librarys_own_activations_and_support(fixture_folders: dict[str, Path], name: str) -> None:
    folder = fixture_folders[name]
    sae, reference = load_sae(folder), load_file(folder / "reference.safetensors")
    activation = "topk" if name in TOPK else "batchtopk" if name in BATCHTOPK else "jumprelu"
    assert sae.config.activation == activation and sae.W_enc.shape == (sae.config.width, 6)
    values, indices = sae.encode(reference["x"])
    acts = torch.zeros_like(reference["acts"]).scatter_add(1, indices, values)
    assert torch.equal(acts != 0, reference["acts"] != 0) and (acts != 0).any(1).all()
    torch.testing.assert_close(acts, reference["acts"], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sae(reference["x"]), reference["rebuilt"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", TOPK + BATCHTOPK + JUMPRELU)
def test_rows_read_alone_are_those_of_the_whole(fixture_folders: dict[str, Path], name: str) -> None:
    folder, ids = fixture_folders[name], torch.tensor([39, 2, 17, 25])
    x = load_file(folder / "reference.safetensors")["x"]
    rows, whole = load_rows(folder, ids), load_sae(folder).rows(ids)
    for tensor in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(rows, tensor), getattr(whole, tensor)), tensor
    assert torch.equal(rows.membership(x), whole.membership(x))
    assert torch.equal(rows.erase(x)[0], whole.erase(x)[0])
    assert (rows.W_enc.shape[0] == 4) == rows.config.uses_threshold


def test_what_a_file_says_of_its_place(fixture_folders: dict[str, Path]) -> None:
    assert load_sae(fixture_folders["saelens_topk"]).config.layer == 8
    assert load_sae(fixture_folders["saelens_topk"]).config.model == "tiny"
    assert load_sae(fixture_folders["sparsify/layers.4"]).config.layer == 4
    assert load_sae(fixture_folders["dictionary_learning_topk"]).config.layer == 8
    assert load_sae(fixture_folders["openai_itd"]).config.layer is None


def test_sparsify_without_a_number_of_latents_takes_the_expansion_factor(fixture_folders: dict[str, Path]) -> None:
    """Trap: num_latents 0 is not a width of 0."""
    assert load_sae(fixture_folders["sparsify_expansion/layers.4"]).config.width == 42


def test_an_autoencoder_on_the_hub(
    fixture_folders: dict[str, Path], hub_cache: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    """One repository with several in folders of their own, as sparsify and SAELens upload them."""
    folders = {"layers.4": fixture_folders["sparsify/layers.4"], "deep/er": fixture_folders["saelens_topk"]}
    files = {f"{name}/{file.name}": file.read_bytes() for name, place in folders.items() for file in place.iterdir()}
    where = hub_cache("owner/saes", files | {"old/config.json": b"{}", "old/state_dict.pth": b"never read"})
    for name, folder in folders.items():
        there, here = load_sae("owner/saes", subfolder=name, **where), load_sae(folder)
        assert there.config == here.config and torch.equal(there.W_enc, here.W_enc)
    with pytest.raises(AdapterFormatError, match=r"found deep, layers\.4, old.*subfolder"):
        load_sae("owner/saes", **where)
    with pytest.raises(AdapterFormatError, match="pickled file of OpenAI"):
        load_sae("owner/saes", subfolder="old", **where)
    with pytest.raises(UnsafePathError):
        load_sae("owner/saes", subfolder="../..", **where)
    with pytest.raises(InvalidInputError, match="can be reached"):
        load_sae("owner/none", **where)
