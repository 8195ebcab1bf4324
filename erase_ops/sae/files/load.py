"""Reading an autoencoder of any layout: whole, or as an eraser keeps it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from expunge.erase_ops.formats.folders import locate
from expunge.erase_ops.formats.source import resolve_source
from expunge.erase_ops.formats.tensors import read_json
from expunge.erase_ops.sae.files import dictionary_learning, openai, saelens, sparsify
from expunge.erase_ops.sae.files.source import Plan, Source, check_plan, open_source, read_tensor
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.erase_ops.sae.rows import SAERows
from expunge.errors import AdapterFormatError, InvalidInputError
from expunge.kernels.sae_encoder import check_ids

NORM_ROWS = 4096  # decoder rows whose norms are taken at a time


@dataclass(frozen=True)
class Layout:
    """How one library stores autoencoders.

    Args:
        name: the library.
        config: the configuration's file.
        weights: the tensors' file, safetensors.
        pickled: the pickled files that the library itself writes instead.
        plan: makes the plan of a file from its path, configuration and the names of its tensors.
    """

    name: str
    config: str
    weights: str
    pickled: tuple[str, ...]
    plan: Callable[[Path, Mapping[str, Any], set[str]], Plan]


LAYOUTS = (
    Layout("SAELens", saelens.CONFIG, saelens.WEIGHTS, (), saelens.plan),
    Layout("sparsify", sparsify.CONFIG, sparsify.WEIGHTS, (), sparsify.plan),
    Layout(
        "dictionary_learning",
        dictionary_learning.CONFIG,
        dictionary_learning.WEIGHTS,
        (dictionary_learning.PICKLED,),
        dictionary_learning.plan,
    ),
    Layout("OpenAI and ItD", openai.CONFIG, openai.WEIGHTS, (openai.PICKLED,), openai.plan),
)


def load_sae(
    path_or_repo: str | Path,
    *,
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> SparseAutoencoder:
    """Reads an autoencoder; the layout is told by the files that are there.

    Args:
        path_or_repo: a folder of SAELens, sparsify, dictionary_learning or OpenAI's layout, or owner/name of a
            repository on the Hub that holds one. The last two layouts are read after `convert_pickle`; of a
            repository, pickled files are not even fetched.
        subfolder: where in the folder or repository, such as "layers.8"; nothing else is fetched.
        revision, token, cache_dir, local_files_only: as of `SPMAdapter.from_pretrained`.

    Returns:
        The autoencoder, on the CPU, in the file's dtype.

    Raises:
        AdapterFormatError: if the layout is unknown, a file is missing or malformed, or an option of the configuration
            is unknown or makes it compute something else than `SparseAutoencoder` does.
        NonFiniteError: if a tensor holds NaN or infinity.
        UnsafePathError: if `subfolder` leads out of the folder.
        InvalidInputError: if there is no such path or repository.
    """
    hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
    hub["local_files_only"] = local_files_only
    folder, _ = resolve_source(path_or_repo, subfolder=subfolder, **hub)
    with opened(folder) as (plan, source):
        return sae_of(plan, source, saelens.read_firing(folder, plan.config.width))


def load_rows(folder: str | Path, ids: Tensor | Sequence[int]) -> SAERows:
    """Reads what an eraser of some features keeps, and nothing else: their decoder rows, and under TopK the encoder.

    Args:
        folder: the autoencoder's own, on this machine.
        ids: `[m]`, distinct.

    Raises:
        AdapterFormatError, NonFiniteError: as `load_sae`, for what is read.
        InvalidInputError: if an id is not a feature or stands twice.
    """
    chosen = torch.as_tensor(ids, dtype=None if len(ids) else torch.int64)
    with opened(Path(folder)) as (plan, source):
        config = plan.config
        check_ids("load_rows", "ids", chosen, config.width)
        own = chosen if config.uses_threshold else None
        w_enc, b_enc = read_tensor(plan, source, "W_enc", own), read_tensor(plan, source, "b_enc", own)
        w_dec, b_dec = read_tensor(plan, source, "W_dec", chosen), read_tensor(plan, source, "b_dec")
        threshold = read_tensor(plan, source, "threshold", own) if config.uses_threshold else None
        if plan.fold_norms:
            norms = decoder_norms(plan, source)
            w_enc, b_enc = scaled(w_enc, norms), scaled(b_enc, norms)
            w_dec = scaled(w_dec, norms[chosen].reciprocal())
    return SAERows(config, chosen, w_enc, b_enc, w_dec, b_dec, threshold)


def sae_of(plan: Plan, source: Source, firing: Tensor | None = None) -> SparseAutoencoder:
    """The whole autoencoder of a checked plan."""
    tensors = {name: read_tensor(plan, source, name) for name in plan.tensors}
    if plan.fold_norms:
        norms = decoder_norms(plan, source)
        for name in tensors.keys() & {"W_enc", "b_enc"}:
            tensors[name] = scaled(tensors[name], norms)
        tensors["W_dec"] = scaled(tensors["W_dec"], norms.reciprocal())
    return SparseAutoencoder(plan.config, tensors, firing=firing)


def decoder_norms(plan: Plan, source: Source) -> Tensor:
    """The norms of the decoder's rows, `[h]` float32, read a few rows at a time.

    Raises:
        AdapterFormatError: if a row is zero, so that its direction is lost.
    """
    parts = torch.arange(plan.config.width).split(NORM_ROWS)
    rows = (read_tensor(plan, source, "W_dec", part).float() for part in parts)
    norms = torch.cat([torch.linalg.vector_norm(part, dim=1) for part in rows])
    if bool((norms == 0).any()):
        raise AdapterFormatError(
            str(source.path),
            expected="decoder rows that are not zero, since scores are multiplied by their norms",
            found=f"{int((norms == 0).sum())} that are",
            fix="Export the autoencoder with its norms folded.",
        )
    return norms


def scaled(tensor: Tensor, factors: Tensor) -> Tensor:
    """Rows times factors, in float32, rounded to the tensor's dtype."""
    factors = factors[:, None] if tensor.ndim == 2 else factors
    return (tensor.float() * factors).to(tensor.dtype)


@contextmanager
def opened(folder: Path) -> Iterator[tuple[Plan, Source]]:
    """A folder's plan, checked against its file, which is open inside the `with` block."""
    layout = layout_of(folder)
    config, weights = locate(folder, layout.config), locate(folder, layout.weights)
    assert config is not None and weights is not None
    values = read_json(config)
    with open_source(weights) as source:
        yield checked_plan(layout, config, values, source), source


def checked_plan(layout: Layout, config: Path, values: Mapping[str, Any], source: Source) -> Plan:
    """The plan of a configuration, checked against the tensors.

    Raises:
        AdapterFormatError: if the two do not fit, or the configuration is not one that can be read.
    """
    try:
        plan = layout.plan(config, values, source.names())
    except InvalidInputError as error:  # of SAEConfig: a value outside its range
        raise AdapterFormatError(
            str(config), expected=error.expected, found=f"{error.found} ({error.subject})", fix="Export it again."
        ) from error
    check_plan(plan, source)
    if plan.config.activation == "batchtopk" and bool((read_tensor(plan, source, "threshold") < 0).any()):
        raise AdapterFormatError(
            str(source.path),
            expected="thresholds from 0, which a BatchTopK autoencoder is used with",
            found="negative ones: none had been measured when it was saved",
            fix="Train it further; without a threshold a token's features depend on its batch.",
        )
    if plan.config.activation == "topk" and "k" in source.names() and int(source.read("k")) != plan.config.k:
        raise AdapterFormatError(
            str(source.path),
            expected=f"k to be {plan.config.k}, as {config.name} says",
            found=str(int(source.read("k"))),
            fix="The two files belong to different autoencoders.",
        )
    return plan


def layout_of(folder: Path) -> Layout:
    """The layout of a folder, told by its files.

    Raises:
        AdapterFormatError: if there is none, or its tensors are pickled.
    """
    if not folder.is_dir():
        _unknown(folder, "a file" if folder.is_file() else "no such folder")
    for layout in LAYOUTS:
        if locate(folder, layout.config) is not None and locate(folder, layout.weights) is not None:
            return layout
    for layout in LAYOUTS:
        for name in layout.pickled:
            if locate(folder, name) is not None:
                raise AdapterFormatError(
                    str(folder / name),
                    expected="safetensors",
                    found=f"a pickled file of {layout.name}, which can run code when it is loaded",
                    fix="Convert it once with expunge.erase_ops.sae.files.convert_pickle(folder, output).",
                )
    _unknown(folder, ", ".join(sorted(entry.name for entry in folder.iterdir())[:8]) or "an empty folder")


def _unknown(folder: Path, found: str) -> NoReturn:
    names = "; ".join(f"{layout.config} and {layout.weights} ({layout.name})" for layout in LAYOUTS)
    raise AdapterFormatError(
        str(folder),
        expected=names,
        found=found,
        fix="Pass the autoencoder's own folder, or name it by subfolder. Pickled files are not fetched from the Hub: "
        "download such a folder yourself and convert it with convert_pickle.",
    )
