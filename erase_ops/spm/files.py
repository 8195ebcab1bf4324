"""What an SPM keeps in an artefact: its factors, alphas and concepts, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

from torch import Tensor

from expunge.erase_ops.artefact import Artefact
from expunge.erase_ops.formats.factors import Factors, commonest_alpha
from expunge.erase_ops.formats.lora import check_alpha, check_delta
from expunge.erase_ops.spm.concepts import MAX_TOKEN_ID, Concept
from expunge.errors import AdapterFormatError, InvalidInputError


def spm_parts(artefact: Artefact) -> tuple[dict[str, Factors], list[Concept]]:
    """The factors and concepts of an artefact of kind "spm".

    Raises:
        AdapterFormatError: if its tensors and manifest do not belong together.
        NonFiniteError: if an alpha is not finite.
    """
    subject = str(artefact.folder)
    manifest = artefact.manifest
    alphas = _alphas(subject, manifest.parameters)
    left = dict(artefact.tensors)
    factors = {}
    for site in sorted({key[len("factors.") :].rpartition(".")[0] for key in left if key.startswith("factors.")}):
        down, up = left.pop(f"factors.{site}.down", None), left.pop(f"factors.{site}.up", None)
        if down is None or up is None:
            _refuse(subject, f"factors.{site}.down and .up", "one of them", "Save the adapter again.")
        try:
            factors[site] = check_delta(subject, site, Factors(down, up, alphas[1].pop(site, alphas[0])))
        except InvalidInputError as error:
            _refuse(subject, f"for {site}: {error.expected}", error.found, "Save the adapter again.")
    concepts = [_concept(subject, index, entry, left) for index, entry in enumerate(manifest.concepts)]
    if left or alphas[1]:
        _refuse(subject, "only factors and concepts", f"{sorted([*left, *alphas[1]])[:5]}", "Save the adapter again.")
    return factors, concepts


def spm_manifest_parts(
    factors: Mapping[str, Factors], concepts: Sequence[Concept]
) -> tuple[dict[str, Tensor], dict[str, Any], list[dict[str, Any]]]:
    """The tensors, parameters and concepts that `spm_parts` reads back bit for bit."""
    tensors: dict[str, Tensor] = {}
    for site, item in factors.items():
        tensors[f"factors.{site}.down"] = item.down.detach().float()
        tensors[f"factors.{site}.up"] = item.up.detach().float()
    entries = []
    for index, concept in enumerate(concepts):
        if concept.states is not None:
            tensors[f"concepts.{index}.states"] = concept.states
        entries.append(
            {
                "text": concept.text,
                "phrasings": list(concept.phrasings),
                "token_ids": None if concept.token_ids is None else list(concept.token_ids),
                "all_token_ids": None if concept.all_token_ids is None else list(concept.all_token_ids),
            }
        )
    default = commonest_alpha(factors)
    sites = {site: float(item.alpha) for site, item in factors.items() if item.alpha != default}
    return tensors, {"alpha": {"default": default, "sites": sites}}, entries


def _alphas(subject: str, parameters: Mapping[str, Any]) -> tuple[float, dict[str, float]]:
    alpha = parameters.get("alpha")
    if set(parameters) != {"alpha"} or not isinstance(alpha, dict) or set(alpha) != {"default", "sites"}:
        _refuse(subject, "parameters.alpha with default and sites", repr(parameters)[:100], "Save the adapter again.")
    values = {"default": alpha["default"], **alpha["sites"]} if isinstance(alpha["sites"], dict) else {"sites": None}
    for where, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            _refuse(subject, f"a number as alpha of {where}", repr(value)[:100], "Save the adapter again.")
        check_alpha(subject, where, value)
    return float(alpha["default"]), {site: float(value) for site, value in alpha["sites"].items()}


def _concept(subject: str, index: int, entry: Mapping[str, Any], tensors: dict[str, Tensor]) -> Concept:
    where = f"concepts[{index}]"
    phrasings, tokens, all_tokens = (entry.get(name) for name in ("phrasings", "token_ids", "all_token_ids"))
    if set(entry) != {"text", "phrasings", "token_ids", "all_token_ids"}:
        _refuse(subject, f"text, phrasings, token_ids, all_token_ids in {where}", f"{sorted(entry)}", "Save it again.")
    if not isinstance(phrasings, list) or not phrasings or not all(isinstance(text, str) for text in phrasings):
        _refuse(subject, f"a list of texts as phrasings of {where}", repr(phrasings)[:100], "Save it again.")
    for ids in (tokens, all_tokens):
        if ids is not None and not (
            isinstance(ids, list) and all(type(i) is int and 0 <= i < MAX_TOKEN_ID for i in ids)
        ):
            _refuse(subject, f"null or a list of token ids in {where}", repr(ids)[:100], "Save it again.")
    try:
        return Concept(
            entry["text"],
            tensors.pop(f"concepts.{index}.states", None),
            None if tokens is None else tuple(tokens),
            None if all_tokens is None else tuple(all_tokens),
            tuple(phrasings),
        )
    except InvalidInputError as error:
        _refuse(subject, f"in {where}: {error.expected}", error.found, "Save the adapter again.")


def _refuse(subject: str, expected: str, found: str, fix: str) -> NoReturn:
    raise AdapterFormatError(subject, expected=expected, found=found, fix=fix)
