"""PEFT's `adapter_config.json`: the rank and alpha of every site, and what else would change the arithmetic."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from expunge.erase_ops.formats.factors import Factors, commonest_alpha, commonest_rank
from expunge.erase_ops.formats.lora import check_alpha
from expunge.errors import AdapterFormatError

# Fields that change nothing about what a trained LoRA computes. Any other that is set is refused, so that an option of
# a future PEFT is never ignored.
_HARMLESS = frozenset(
    {
        "peft_type",
        "auto_mapping",
        "base_model_name_or_path",
        "revision",
        "task_type",
        "inference_mode",
        "peft_version",
        "lora_dropout",
        "target_modules",
        "exclude_modules",
        "layers_to_transform",
        "layers_pattern",
        "runtime_config",
        "megatron_core",
        "qalora_group_size",
        "eva_config",
        "concepts",
        "neutral",
        "coverage",
        "init_weights",
    }
)
_READ = frozenset({"r", "lora_alpha", "alpha", "rank_pattern", "alpha_pattern", "use_rslora", "init_lora_weights"})
_OFF = (None, False, "none", 0)
# The other initialisations (PiSSA, OLoRA, CorDA, LoftQ, ...) change the base weights as well.
_INITIALISATIONS = ("gaussian", "eva", "orthogonal")
# PEFT takes a pattern's keys for regular expressions; only plain paths are read here, so that a file cannot stall.
_PLAIN_KEY = re.compile(r"\^?((?:\w|\\?\.)+)\$?", re.ASCII)


@dataclass(frozen=True)
class RankAlpha:
    """Ranks and alphas by site, as an adapter configuration states them.

    Args:
        subject: the file, for errors.
        rank: of sites that no pattern names; None if the file does not say.
        alpha: of sites that no pattern names.
        rank_pattern: ranks by path or end of a path; the first match holds.
        alpha_pattern: alphas likewise.
        rank_stabilised: whether the scale is alpha / sqrt(r) (rsLoRA) instead of alpha / r.
    """

    subject: str
    rank: int | None
    alpha: float
    rank_pattern: Mapping[str, int]
    alpha_pattern: Mapping[str, float]
    rank_stabilised: bool

    def alpha_of(self, site: str, rank: int) -> float:
        """The alpha for which alpha / r is the site's scale.

        Args:
            site: dotted path.
            rank: the rank of the tensors in the file.

        Raises:
            AdapterFormatError: if the configuration states another rank.
        """
        stated = _match(self.rank_pattern, site, self.rank)
        if stated is not None and stated != rank:
            raise AdapterFormatError(
                self.subject,
                expected=f"rank {stated} at {site}, as the configuration says",
                found=f"tensors of rank {rank}",
                fix="Use the configuration that was saved with these tensors.",
            )
        alpha = float(_match(self.alpha_pattern, site, self.alpha))
        return alpha * math.sqrt(rank) if self.rank_stabilised else alpha


def read_peft_config(config: Mapping[str, Any], subject: str) -> RankAlpha:
    """Reads ranks and alphas, and refuses whatever would make the adapter compute something else.

    Args:
        config: the content of `adapter_config.json` (peft_type LORA, or SPM as Expunge's tuner writes it).
        subject: the file, for errors.

    Raises:
        AdapterFormatError: for another method, an option that is not plain LoRA, or a field of a wrong type.
        NonFiniteError: if an alpha is not finite.
    """
    method = config.get("peft_type", "LORA")
    if method not in ("LORA", "SPM"):
        _refuse(subject, "peft_type LORA or SPM", repr(method), "Only low-rank adapters can be read.")
    for name, value in config.items():
        plain = name in _HARMLESS or name in _READ or (not value if isinstance(value, dict | list) else value in _OFF)
        if not plain:
            _refuse(subject, f"plain LoRA without {name}", repr(value), "Merge or export it as plain LoRA with PEFT.")
    initialisation = config.get("init_lora_weights", True)
    if not isinstance(initialisation, bool) and initialisation not in _INITIALISATIONS:
        fix = "It changes the base weights as well: convert it to plain LoRA when saving it with PEFT."
        _refuse(subject, f"init_lora_weights true, false or one of {_INITIALISATIONS}", repr(initialisation), fix)
    alpha_name = "alpha" if method == "SPM" else "lora_alpha"
    alpha = _number(subject, alpha_name, config.get(alpha_name, 1.0 if method == "SPM" else 8))
    rank = config.get("r")
    if rank is not None:
        rank = _rank(subject, "r", rank)
    ranks = {key: _rank(subject, key, value) for key, value in _pattern(subject, config, "rank_pattern").items()}
    alphas = {key: _number(subject, key, value) for key, value in _pattern(subject, config, "alpha_pattern").items()}
    return RankAlpha(subject, rank, alpha, ranks, alphas, bool(config.get("use_rslora", False)))


def peft_config(factors: Mapping[str, Factors]) -> dict[str, Any]:
    """The `adapter_config.json` with which vanilla PEFT applies `lora.peft_tensors(factors)`.

    The commonest rank and alpha are the defaults; sites that differ are named by their whole path.
    """
    rank, alpha = commonest_rank(factors), commonest_alpha(factors)
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": _plain(alpha),
        "rank_pattern": {site: item.rank for site, item in factors.items() if item.rank != rank},
        "alpha_pattern": {site: _plain(item.alpha) for site, item in factors.items() if item.alpha != alpha},
        "target_modules": sorted(factors),
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
    }


def _plain(alpha: float) -> float | int:
    return int(alpha) if float(alpha).is_integer() else float(alpha)


def _match(pattern: Mapping[str, Any], site: str, default: Any) -> Any:
    return next((value for key, value in pattern.items() if site == key or site.endswith("." + key)), default)


def _pattern(subject: str, config: Mapping[str, Any], name: str) -> dict[str, Any]:
    pattern = config.get(name) or {}
    if not isinstance(pattern, dict):
        _refuse(subject, f"{name} as an object", type(pattern).__name__, "Save the adapter again.")
    result = {}
    for key, value in pattern.items():
        match = _PLAIN_KEY.fullmatch(key)
        if match is None:
            fix = "Write the patterns as module paths or their ends, without wildcards."
            _refuse(subject, f"plain module paths in {name}", repr(key[:100]), fix)
        result[match[1].replace("\\", "")] = value
    return result


def _number(subject: str, name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        _refuse(subject, f"a number for {name}", repr(value), "Save the adapter again.")
    try:
        return check_alpha(subject, name, float(value))
    except OverflowError:  # an integer beyond float64
        return check_alpha(subject, name, math.inf)


def _rank(subject: str, name: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        _refuse(subject, f"a rank of at least 1 for {name}", repr(value), "Save the adapter again.")
    return int(value)


def _refuse(subject: str, expected: str, found: str, fix: str) -> NoReturn:
    raise AdapterFormatError(subject, expected=expected, found=found[:200], fix=fix)
