"""Adapter files that others write: SPM reference files and run folders, kohya, diffusers and PEFT LoRA."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, NoReturn

from expunge.erase_ops.formats.factors import Factors
from expunge.erase_ops.formats.folders import check_relative, files_with_suffix, locate
from expunge.erase_ops.formats.lora import KOHYA_PREFIX, naming_of, read_factors
from expunge.erase_ops.formats.peft_config import RankAlpha, read_peft_config
from expunge.erase_ops.formats.tensors import TensorFile, parse_json, read_json, read_tensors, refuse_pickle
from expunge.erase_ops.formats.unet_names import is_sgm
from expunge.errors import AdapterFormatError

PEFT_CONFIG = "adapter_config.json"
PEFT_MODEL = "adapter_model.safetensors"
DIFFUSERS_LORA = "pytorch_lora_weights.safetensors"
_DIFFUSERS_METADATA = "lora_adapter_metadata"
_LATER_BLOCK = re.compile(r"\.transformer_blocks\.[1-9]")
_SDXL_TEXT_WIDTH = 2048


class ForeignFile(NamedTuple):
    """An SPM or LoRA file that is not ours.

    Args:
        factors: float32 factors by site.
        concepts: what the caller or the file names; empty if neither does.
        neutral: what the file names; "" if nothing.
        family: "sd" or "sdxl", judged by the sites.
    """

    factors: dict[str, Factors]
    concepts: list[str]
    neutral: str
    family: Literal["sd", "sdxl"]


def find_weights(folder: Path, weight_name: str | None) -> Path:
    """The weights' file in a folder that is not an artefact.

    Args:
        folder: a PEFT folder, a run folder of the reference (`<dir>/<dir>_last.safetensors`), a diffusers LoRA folder,
            or any with a single safetensors file.
        weight_name: the file to take; None to choose by these rules, in this order.

    Raises:
        AdapterFormatError: if there is no such file, only pickled ones, or several and none is told.
        UnsafePathError: if the file leads out of the folder.
    """
    names = (PEFT_MODEL, f"{folder.resolve().name}_last.safetensors", DIFFUSERS_LORA)
    for name in (str(check_relative(weight_name, "weight_name")),) if weight_name is not None else names:
        path = locate(folder, name)
        if path is not None:
            return path
    found = files_with_suffix(folder, ".safetensors")
    if weight_name is None and len(found) == 1:
        path = locate(folder, found[0])
        if path is not None:
            return path
    if weight_name is None and not found:
        for name in [name for suffix in (".bin", ".pt", ".pth", ".ckpt") for name in files_with_suffix(folder, suffix)]:
            refuse_pickle(folder / name)
    expected = f"the file {weight_name!r}" if weight_name is not None else "an adapter's weights (.safetensors)"
    _refuse(str(folder), expected, f"{found[:8]}", "Name one of the files with weight_name.")


def read_foreign(path: Path, concepts: Sequence[str] | None = None) -> ForeignFile:
    """Reads a reference, kohya, diffusers or PEFT file.

    Args:
        path: the file; PEFT's needs its configuration beside it.
        concepts: what it erases, instead of what its metadata says.

    Raises:
        AdapterFormatError, NonFiniteError, UnsafePathError: if the file or its configuration is not what it should be.
    """
    file = read_tensors(path)
    naming = naming_of(file.tensors)
    if naming is None:
        first = ", ".join(sorted(file.tensors)[:3])
        fix = "Convert it to kohya, diffusers or PEFT naming; adapters for other architectures cannot be read yet."
        _refuse(str(path), "keys in kohya's, diffusers' or PEFT's naming", first, fix)
    neutral, alpha_of = "", None
    found = [] if concepts is not None else _reference_concepts(path, file.metadata)
    if naming == "peft":
        config_path = locate(path.parent, PEFT_CONFIG)
        if config_path is None:
            _refuse(str(path), f"{PEFT_CONFIG} beside it, which holds the alpha", "none", "Keep both files together.")
        config = read_json(config_path)
        alpha_of = read_peft_config(config, str(config_path)).alpha_of
        found, neutral = _peft_concepts(config_path, config)
    elif naming == "diffusers":
        ranks = _diffusers_ranks(path, file)
        alpha_of = None if ranks is None else ranks.alpha_of
    factors = read_factors(str(path), file.tensors, naming, alpha_of)
    sgm = naming == "kohya" and any(is_sgm(key.partition(".")[0].removeprefix(KOHYA_PREFIX)) for key in file.tensors)
    family: Literal["sd", "sdxl"] = "sdxl" if sgm or _looks_like_sdxl(factors) else "sd"
    return ForeignFile(factors, list(found if concepts is None else concepts), neutral, family)


def _reference_concepts(path: Path, metadata: Mapping[str, str]) -> list[str]:
    if "prompts" not in metadata:
        return []
    concepts = [text.strip() for text in metadata["prompts"].split(",")]  # as the reference splits them
    if not all(concepts):
        fix = "Pass concepts=[...] to say what the file erases."
        _refuse(str(path), "concepts in the metadata 'prompts'", repr(metadata["prompts"][:100]), fix)
    return concepts


def _peft_concepts(path: Path, config: Mapping[str, Any]) -> tuple[list[str], str]:
    concepts, neutral = config.get("concepts", []), config.get("neutral", "")
    texts = isinstance(concepts, list) and all(isinstance(text, str) and text.strip() for text in concepts)
    if not texts or not isinstance(neutral, str):
        _refuse(str(path), "concepts as a list of texts, neutral as a text", repr(concepts)[:100], "Save it again.")
    return list(concepts), neutral


def _diffusers_ranks(path: Path, file: TensorFile) -> RankAlpha | None:
    if _DIFFUSERS_METADATA not in file.metadata:
        return None
    subject = f"{path} (metadata {_DIFFUSERS_METADATA})"
    settings = parse_json(file.metadata[_DIFFUSERS_METADATA], subject)
    if not isinstance(settings, dict):
        _refuse(subject, "a JSON object", type(settings).__name__, "Save the adapter again.")
    if any(key.startswith("unet.") for key in file.tensors):
        settings = {key[len("unet.") :]: value for key, value in settings.items() if key.startswith("unet.")}
    return read_peft_config(settings, subject) if settings else None


def _looks_like_sdxl(factors: Mapping[str, Factors]) -> bool:
    # SD 1.x and 2.x have one transformer block an attention, and text states of 768 or 1024.
    return any(
        _LATER_BLOCK.search(site) or (site.endswith("attn2.to_k") and item.in_features == _SDXL_TEXT_WIDTH)
        for site, item in factors.items()
    )


def _refuse(subject: str, expected: str, found: str, fix: str) -> NoReturn:
    raise AdapterFormatError(subject, expected=expected, found=found, fix=fix)
