"""Adapters with random factors for any denoiser, and the fixtures that the SPM reference wrote."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from safetensors.torch import load_file
from torch import Tensor, nn

from expunge.erase_ops.attach import attachment_of
from expunge.erase_ops.entry import CallInfo
from expunge.erase_ops.formats.factors import Factors
from expunge.erase_ops.sites import find_sites
from expunge.erase_ops.spm import Concept, SPMAdapter

FIXTURES = Path(__file__).parent.parent / "fixtures" / "spm"


def _random_factors(layer: nn.Module, rank: int, alpha: float, generator: torch.Generator) -> Factors:
    if isinstance(layer, nn.Conv2d):
        down, up = (rank, layer.in_channels, *layer.kernel_size), (layer.out_channels, rank, 1, 1)
    else:
        assert isinstance(layer, nn.Linear)
        down, up = (rank, layer.in_features), (layer.out_features, rank)
    fan_in = math.prod(down[1:])
    return Factors(
        torch.randn(down, generator=generator) / fan_in**0.5,
        torch.randn(up, generator=generator) * 0.5,
        alpha,
    )


def _random_adapter(
    denoiser: nn.Module,
    *,
    seed: int = 1,
    rank: int = 1,
    alpha: float | None = None,
    coverage: str = "all",
    paths: Sequence[str] | None = None,
    states: Tensor | None = None,
    threshold: float | None = None,
    text: str = "cat",
) -> SPMAdapter:
    generator = torch.Generator().manual_seed(seed)
    sites = find_sites(denoiser, coverage) if paths is None else {path: denoiser.get_submodule(path) for path in paths}
    factors = {path: _random_factors(layer, rank, alpha or float(rank), generator) for path, layer in sites.items()}
    if states is None:
        states = torch.randn(1, 7, 32, generator=generator)
    concept = Concept(text, states=states, phrasings=tuple(f"{text} {i}" for i in range(len(states))))
    return SPMAdapter(factors, [concept], threshold=threshold, name=f"random-{seed}")


@pytest.fixture(scope="session")
def random_adapter() -> Callable[..., SPMAdapter]:
    """Factory: an SPM with random factors of an effect that shows, for the sites of a denoiser."""
    return _random_adapter


@pytest.fixture(scope="session")
def fixtures() -> Path:
    """The folder of files that the SPM reference wrote."""
    return FIXTURES


@pytest.fixture(scope="session")
def reference() -> dict[str, Tensor]:
    """Inputs and the reference's noise predictions; see the folder's README."""
    return load_file(FIXTURES / "reference.safetensors")


@pytest.fixture
def unet() -> UNet2DConditionModel:
    """The fixtures' tiny UNet, fresh."""
    return UNet2DConditionModel.from_pretrained(FIXTURES / "tiny_unet").eval()


@pytest.fixture
def inputs(reference: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """Sample, timestep and text states of two rows for the fixtures' UNet."""
    return reference["sample"], reference["timestep"], reference["encoder_hidden_states"]


@pytest.fixture
def adapter(unet: UNet2DConditionModel) -> SPMAdapter:
    """A rank-2 adapter for all sites of the fixtures' UNet."""
    return _random_adapter(unet, rank=2)


@torch.no_grad()
def _predict(denoiser: Any, inputs: tuple[Tensor, ...]) -> Tensor:
    out: Tensor = denoiser(*inputs, return_dict=False)[0]
    return out


def _predict_merged(denoiser: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    attachment = attachment_of(denoiser)
    assert attachment is not None
    with attachment.call(CallInfo(len(inputs[0]))):
        _predict(denoiser, inputs)  # offloaded weights come in during the first call, so that the second is merged
        return _predict(denoiser, inputs)


def _bake(unet: UNet2DConditionModel, adapter: SPMAdapter) -> UNet2DConditionModel:
    baked = copy.deepcopy(unet)
    for path, factors in adapter.factors.items():
        weight = baked.get_submodule(path).weight
        weight.data += factors.delta().view_as(weight)
    return baked


def _assert_kept(denoiser: nn.Module, oracle: nn.Module, inputs: tuple[Tensor, ...], tolerance: float = 2e-5) -> None:
    expected = _predict(oracle, inputs)
    torch.testing.assert_close(_predict(denoiser, inputs), expected, atol=tolerance, rtol=tolerance)
    torch.testing.assert_close(_predict_merged(denoiser, inputs), expected, atol=tolerance, rtol=tolerance)


@pytest.fixture(scope="session")
def predict() -> Callable[[Any, tuple[Tensor, ...]], Tensor]:
    """`predict(denoiser, inputs)`: a noise prediction without gradients."""
    return _predict


@pytest.fixture(scope="session")
def predict_merged() -> Callable[[Any, tuple[Tensor, ...]], Tensor]:
    """`predict_merged(denoiser, inputs)`: the same inside a pipeline call of an erased denoiser."""
    return _predict_merged


@pytest.fixture(scope="session")
def bake() -> Callable[[UNet2DConditionModel, SPMAdapter], UNet2DConditionModel]:
    """`bake(unet, adapter)`: the oracle of an erasure, a copy of a plain UNet with W + delta in its weights."""
    return _bake


@pytest.fixture(scope="session")
def assert_kept() -> Callable[..., None]:
    """`assert_kept(denoiser, oracle, inputs, tolerance)`: the erasure holds, by the low-rank way and merged."""
    return _assert_kept


@pytest.fixture
def hub_cache(tmp_path: Path) -> Callable[[str, Mapping[str, bytes]], dict[str, Any]]:
    """`hub_cache("owner/name", files)`: a repository in the Hub's cache, as `snapshot_download` leaves it (blobs, a
    snapshot of links, a branch); gives the arguments that read it from there."""

    def make(repo_id: str, files: Mapping[str, bytes]) -> dict[str, Any]:
        root, commit = tmp_path / "hub", "0" * 40
        repo = root / f"models--{repo_id.replace('/', '--')}"
        (repo / "refs").mkdir(parents=True)
        (repo / "refs" / "main").write_text(commit)
        (repo / "blobs").mkdir()
        for index, (name, content) in enumerate(files.items()):
            (repo / "blobs" / str(index)).write_bytes(content)
            link = repo / "snapshots" / commit / name
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(Path(*[".."] * (2 + name.count("/")), "blobs", str(index)))
        return {"cache_dir": root, "local_files_only": True}

    return make
