"""What an ItD keeps in an artefact: the erased features' rows, and the encoder or a reference to it.

| tensor | what |
|---|---|
| `sae.W_dec` `[m, d]`, `sae.b_dec` `[d]` | decoder rows of the erased features, ascending by id; the bias |
| `sae.W_enc`, `sae.b_enc` | under TopK the whole encoder, `[h, d]` and `[h]`, unless it is referred to; under a threshold the rows `[m, d]` and `[m]` |
| `sae.threshold` `[m]` | under a threshold |

Each concept's entry in the manifest has the ids of its `features`. A reference names a folder beside the artefact's and
the sha256 of its weights: the autoencoder is then read from there, the encoder alone.
"""  # noqa: E501

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor

from expunge.erase_ops.artefact import CARD, Artefact, Manifest, read_artefact, write_artefact
from expunge.erase_ops.formats.folders import check_name
from expunge.erase_ops.itd.card import render_card
from expunge.erase_ops.itd.concepts import concept_ids, union_of
from expunge.erase_ops.sae.config import SAEConfig
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.erase_ops.sae.rows import SAERows
from expunge.errors import AdapterFormatError, InvalidInputError

if TYPE_CHECKING:
    from expunge.erase_ops.itd.adapter import ItDAdapter

_SETTINGS = ("strength", "detection_strength", "score", "tokens")
_TEXTS = ("score", "tokens")  # those of them that are texts
_TENSORS = ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")
_BLOCK = 2**24  # bytes hashed at a time


@dataclass(frozen=True)
class SAESource:
    """The folder of an autoencoder, as an artefact refers to it.

    Args:
        folder: where it is.
        sha256: of its weights' file.
    """

    folder: Path
    sha256: str

    @classmethod
    def of(cls, folder: str | Path) -> SAESource:
        """The source that a folder is; reads it once, to hash it.

        Raises:
            AdapterFormatError: if it holds no autoencoder.
            UnsafePathError: if its name is not one that `formats.folders.check_name` accepts.
        """
        path = Path(folder).expanduser()
        check_name(path.resolve().name, str(path))
        return cls(path, _digest(path))


def write_itd(adapter: ItDAdapter, folder: Path, *, embed: bool, overwrite: bool) -> None:
    """Writes an artefact of kind "itd"; raises as `artefact.write_artefact` does."""
    rows, source = adapter.rows, adapter.sae_source
    refers = not embed and rows.threshold is None
    stored = {name: tensor for name in _TENSORS if (tensor := getattr(rows, name)) is not None}
    if refers:
        del stored["W_enc"], stored["b_enc"]
    parameters: dict[str, Any] = {"sae": rows.config.to_dict(), "source": None}
    if refers and source is not None:
        parameters["source"] = {"name": source.folder.resolve().name, "sha256": source.sha256}
    parameters |= {name: getattr(adapter, name) for name in _SETTINGS}
    parameters["hot"] = None if adapter.hot is None else adapter.hot.tolist()
    manifest = Manifest(
        kind="itd",
        method="itd",
        family=adapter.family,
        component=adapter.component,
        concepts=[{"text": name, "features": ids.tolist()} for name, ids in adapter.concept_features.items()],
        threshold=adapter.threshold,
        calibration=adapter.calibration,
        text_encoder_fingerprint=adapter.text_encoder_fingerprint,
        settings=adapter.settings,
        parameters=parameters,
    )
    tensors = {f"sae.{name}": tensor.detach().cpu() for name, tensor in stored.items()}
    others = {CARD: render_card(adapter).encode(errors="replace")}
    write_artefact(folder, manifest, tensors, others, overwrite=overwrite)


def read_itd(folder: Path, sae: SparseAutoencoder | str | Path | None) -> dict[str, Any]:
    """The fields of an `ItDAdapter` from an artefact.

    Args:
        folder: the artefact's.
        sae: the whole autoencoder or its folder; None: not needed, or beside the artefact.

    Raises:
        AdapterFormatError: if tensors and manifest do not belong together, or the autoencoder is another one.
        InvalidInputError: if the encoder is referred to and is not there.
    """
    artefact = read_artefact(folder, "itd")
    parameters = artefact.manifest.parameters
    expected = {"sae", "source", "hot", *_SETTINGS}
    if set(parameters) != expected:
        _refuse(folder, f"the parameters {', '.join(sorted(expected))}", ", ".join(sorted(parameters)))
    config = _config(folder, parameters["sae"], artefact.manifest)
    concepts = {entry["text"]: _features(folder, entry, config) for entry in artefact.manifest.concepts}
    if len(concepts) != len(artefact.manifest.concepts):
        _refuse(folder, "concepts of different names", "two of one name")
    source = _source(folder, parameters["source"])
    whole = _whole(sae)
    rows = _rows(artefact, config, union_of(concepts), source, whole)
    return {
        "rows": rows,
        "concept_features": concepts,
        "threshold": artefact.manifest.threshold,
        "calibration": artefact.manifest.calibration,
        "hot": _hot(folder, parameters["hot"], config),
        "sae": whole,
        "sae_source": source,
        "family": artefact.manifest.family,
        "settings": artefact.manifest.settings,
    } | {name: _setting(folder, name, parameters[name]) for name in _SETTINGS}


def _whole(sae: SparseAutoencoder | str | Path | None) -> SparseAutoencoder | None:
    if not isinstance(sae, str | Path):
        return sae
    from expunge.erase_ops.sae.files import load_sae

    return load_sae(sae)


def _rows(
    artefact: Artefact, config: SAEConfig, ids: Tensor, source: SAESource | None, whole: SparseAutoencoder | None
) -> SAERows:
    """The erased rows, with the encoder from wherever it is; what is stored must be what that autoencoder has."""
    folder, stored = artefact.folder, dict(artefact.tensors)
    shapes = _shapes(config, len(ids), embedded=source is None)
    found = {name: tuple(tensor.shape) for name, tensor in stored.items()}
    if found != shapes:
        _refuse(folder, f"the tensors {shapes}", f"{found}")
    own = {name.removeprefix("sae."): tensor for name, tensor in stored.items()}
    if whole is not None and (whole.config.width, whole.config.d_in) != (config.width, config.d_in):
        _refuse(folder, "the autoencoder that it was made with", "one of another size", "Pass that one as sae=.")
    if source is None:
        rows = SAERows(config, ids, **own)
    elif whole is None:
        from expunge.erase_ops.sae.files import load_rows

        rows = dataclasses.replace(load_rows(_beside(source), ids), config=config)
    else:
        rows = dataclasses.replace(whole.rows(ids), config=config)
    other = rows if whole is None else whole.rows(ids)
    if not all(torch.equal(getattr(other, name).cpu().float(), tensor.float()) for name, tensor in own.items()):
        _refuse(folder, "the autoencoder that it was made with", "other weights", "Pass that one as sae=.")
    return rows


def _shapes(config: SAEConfig, m: int, *, embedded: bool) -> dict[str, tuple[int, ...]]:
    """The tensors that an artefact has to hold, and their shapes."""
    d = config.d_in
    shapes: dict[str, tuple[int, ...]] = {"sae.W_dec": (m, d), "sae.b_dec": (d,)}
    if config.uses_threshold:
        return shapes | {"sae.W_enc": (m, d), "sae.b_enc": (m,), "sae.threshold": (m,)}
    return shapes | ({"sae.W_enc": (config.width, d), "sae.b_enc": (config.width,)} if embedded else {})


def _beside(source: SAESource) -> Path:
    """The folder that a source names, its weights still those that were meant."""
    if not source.folder.is_dir():
        raise InvalidInputError(
            str(source.folder),
            expected="the folder of the autoencoder that the artefact refers to",
            found="nothing",
            fix="Put it beside the artefact's folder, or pass sae=.",
        )
    found = _digest(source.folder)
    if found != source.sha256:
        _refuse(source.folder, f"weights with sha256 {source.sha256[:12]}...", f"{found[:12]}...")
    return source.folder


def _digest(folder: Path) -> str:
    """The sha256 of the weights in an autoencoder's folder."""
    from expunge.erase_ops.sae.files.load import layout_of

    digest = hashlib.sha256()
    with (folder / layout_of(folder).weights).open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _config(folder: Path, values: Any, manifest: Manifest) -> SAEConfig:
    if not isinstance(values, dict):
        _refuse(folder, "an object as parameters.sae", repr(values)[:100])
    try:
        config = SAEConfig.from_dict(values)
    except InvalidInputError as error:
        _refuse(folder, f"{error.subject} to be {error.expected}", error.found)
    belongs = (config.component, config.fingerprint) == (manifest.component, manifest.text_encoder_fingerprint)
    if not belongs or config.layer is None:
        _refuse(folder, "an autoencoder of a block of the artefact's component", f"{config.component} {config.layer}")
    return config


def _features(folder: Path, entry: Mapping[str, Any], config: SAEConfig) -> Tensor:
    ids = entry.get("features")
    if set(entry) != {"text", "features"} or not isinstance(ids, list) or not _are_ids(ids, config):
        _refuse(folder, f"text and features, ids below {config.width}, of each concept", repr(dict(entry))[:100])
    return concept_ids(entry["text"], ids)


def _hot(folder: Path, ids: Any, config: SAEConfig) -> Tensor | None:
    if ids is None:
        return None
    enough = isinstance(ids, list) and _are_ids(ids, config) and len(ids) >= (config.k or 1)
    if not enough:
        _refuse(folder, f"null or at least k ids below {config.width} as parameters.hot", repr(ids)[:100])
    return torch.tensor(ids)


def _are_ids(ids: list[Any], config: SAEConfig) -> bool:
    return (
        bool(ids) and len(set(map(str, ids))) == len(ids) and all(type(i) is int and 0 <= i < config.width for i in ids)
    )


def _source(folder: Path, value: Any) -> SAESource | None:
    if value is None:
        return None
    texts = (
        isinstance(value, dict) and set(value) == {"name", "sha256"} and all(isinstance(t, str) for t in value.values())
    )
    if not texts:
        _refuse(folder, "null or name and sha256 as parameters.source", repr(value)[:100])
    return SAESource(folder.parent / check_name(value["name"], str(folder)), value["sha256"])


def _setting(folder: Path, name: str, value: Any) -> Any:
    valid = isinstance(value, str) if name in _TEXTS else isinstance(value, int | float) and not isinstance(value, bool)
    if not valid:
        _refuse(folder, f"{'a text' if name in _TEXTS else 'a number'} as parameters.{name}", repr(value)[:100])
    return value


def _refuse(subject: Path, expected: str, found: str, fix: str = "Save the adapter again.") -> NoReturn:
    raise AdapterFormatError(str(subject), expected=expected, found=found, fix=fix)
