"""Low-rank factors from files in anyone's naming, and back.

| naming | keys | alpha |
|---|---|---|
| kohya, SPM reference | `lora_unet_<path with _>.lora_down.weight`, `.lora_up.weight` | `.alpha`, else the rank |
| diffusers | `unet.<path>.lora_A.weight`, `.lora_B.weight` (once `.lora.down.weight`, `.lora.up.weight`) | metadata |
| PEFT LoRA | `base_model.model.<path>.lora_A.weight`, `.lora_B.weight` | `adapter_config.json` |
| PEFT SPM (ours) | `base_model.model.<path>.spm_down`, `.spm_up` | `adapter_config.json` |

Every key of a file is used, or an error lists what is missing and what is unexpected.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from expunge.erase_ops.formats.factors import Factors, commonest_alpha, is_site_path
from expunge.erase_ops.formats.tensors import check_weights
from expunge.erase_ops.formats.unet_names import flatten, unflatten
from expunge.errors import AdapterFormatError, InvalidInputError, NonFiniteError, UnsupportedOperationError

Naming = Literal["kohya", "diffusers", "peft"]
KOHYA_PREFIX = "lora_unet_"
PEFT_PREFIX = "base_model.model."
DIFFUSERS_PREFIX = "unet."


class Part(NamedTuple):
    """What a key stands for: a site and which of its tensors."""

    site: str
    role: Literal["down", "up", "alpha"]


# ------------------------------------------------------------------------------------------------------- key grammars

_ROLES: dict[str, Literal["down", "up", "alpha"]] = {
    "lora_down.weight": "down",
    "lora_up.weight": "up",
    "lora_A.weight": "down",
    "lora_B.weight": "up",
    "lora.down.weight": "down",
    "lora.up.weight": "up",
    "spm_down": "down",
    "spm_up": "up",
    "alpha": "alpha",
}
_KEYS: dict[Naming, re.Pattern[str]] = {
    "kohya": re.compile(r"lora_unet_(\w+)\.(lora_down\.weight|lora_up\.weight|alpha)", re.ASCII),
    "diffusers": re.compile(r"(?:unet\.)?([\w.]+?)\.(lora_[AB]\.weight|lora\.(?:down|up)\.weight|alpha)", re.ASCII),
    "peft": re.compile(r"base_model\.model\.([\w.]+?)\.(lora_[AB]\.weight|spm_(?:down|up))", re.ASCII),
}
_OLD_PROCESSOR = re.compile(r"\.processor\.(to_q|to_k|to_v|to_out)_lora\.(down|up)\.weight$")


def naming_of(keys: Iterable[str]) -> Naming | None:
    """The naming that a file's keys follow, judged by the first that is known; None if none is."""
    for key in keys:
        if key.startswith(("lora_unet_", "lora_te")):
            return "kohya"
        if key.startswith(PEFT_PREFIX):
            return "peft"
        if key.startswith((DIFFUSERS_PREFIX, "text_encoder.", "text_encoder_2.")) or parse_key("diffusers", key):
            return "diffusers"
    return None


def parse_key(naming: Naming, key: str) -> Part | None:
    """What `key` stands for in that naming; None if it stands for nothing."""
    if naming == "diffusers":
        key = _OLD_PROCESSOR.sub(_from_old_processor, key)
    match = _KEYS[naming].fullmatch(key)
    if match is None:
        return None
    site = unflatten(match[1]) if naming == "kohya" else match[1]
    return None if site is None or not is_site_path(site) else Part(site, _ROLES[match[2]])


def _from_old_processor(match: re.Match[str]) -> str:
    projection = "to_out.0" if match[1] == "to_out" else match[1]
    return f".{projection}.lora.{match[2]}.weight"


# ------------------------------------------------------------------------------------------------------------ reading


def read_factors(
    subject: str,
    tensors: Mapping[str, Tensor],
    naming: Naming,
    alpha_of: Callable[[str, int], float] | None = None,
) -> dict[str, Factors]:
    """Builds every site's factors from a file's tensors.

    Args:
        subject: the file, for errors.
        tensors: the file's tensors.
        naming: how its keys are named.
        alpha_of: the alpha of a site, given its path and rank, for files that keep it elsewhere than in keys.

    Returns:
        Float32 factors by dotted site path, in the order of the paths.

    Raises:
        AdapterFormatError: if a key is unknown or lacks its partner, a shape does not fit or a dtype is no weight's.
        NonFiniteError: if a weight or an alpha is NaN or infinite.
    """
    sites, unexpected = _sort_keys(tensors, naming)
    alphas_in_keys = any("alpha" in keys for keys in sites.values())
    if alphas_in_keys and alpha_of is not None:
        unexpected += sorted(keys["alpha"] for keys in sites.values() if "alpha" in keys)
    roles = ("down", "up", "alpha") if alphas_in_keys else ("down", "up")
    missing = [f"{role} of {site}" for site in sorted(sites) for role in roles if role not in sites[site]]
    if missing or unexpected or not sites:
        raise AdapterFormatError(
            subject,
            expected=f"only whole sites in {naming} naming, {' and '.join(roles)} each",
            found=f"missing: {_some(missing)}; unexpected: {_some(unexpected)}",
            fix=_hint(unexpected),
        )
    result = {}
    for site in sorted(sites):
        keys = sites[site]
        pair = {keys[role]: tensors[keys[role]] for role in ("down", "up")}
        check_weights(subject, pair)
        down, up = (tensor.to(torch.float32) for tensor in pair.values())
        rank = int(down.shape[0]) if down.ndim else 1
        if alphas_in_keys:
            alpha = _alpha(subject, keys["alpha"], tensors[keys["alpha"]])
        else:
            alpha = float(rank) if alpha_of is None else alpha_of(site, rank)
        result[site] = _factors(subject, site, down, up, alpha)
    return result


def _sort_keys(tensors: Mapping[str, Tensor], naming: Naming) -> tuple[dict[str, dict[str, str]], list[str]]:
    sites: dict[str, dict[str, str]] = {}
    unexpected = []
    for key in sorted(tensors):
        part = parse_key(naming, key)
        if part is None or part.role in sites.get(part.site, {}):  # unknown, or a second key for the same tensor
            unexpected.append(key)
        else:
            sites.setdefault(part.site, {})[part.role] = key
    return sites, unexpected


def check_alpha(subject: str, where: str, alpha: float) -> float:
    """Checks an alpha that a file states.

    Raises:
        NonFiniteError: if it is NaN or infinite.
        AdapterFormatError: if it is not above zero, which would make the adapter do nothing or the opposite.
    """
    if not math.isfinite(alpha):
        raise NonFiniteError(
            subject, expected=f"a finite alpha in {where}", found=str(alpha), fix="The file is broken; do not use it."
        )
    if alpha <= 0:
        raise AdapterFormatError(
            subject, expected=f"an alpha above 0 in {where}", found=str(alpha), fix="Export the adapter again."
        )
    return alpha


def check_delta(subject: str, site: str, factors: Factors) -> Factors:
    """Checks that finite factors and a finite alpha make a finite weight change.

    Raises:
        NonFiniteError: if the change could overflow float32.
    """
    largest = factors.scale * factors.rank * float(factors.down.abs().max()) * float(factors.up.abs().max())
    if not largest <= torch.finfo(torch.float32).max:
        raise NonFiniteError(
            subject,
            expected=f"a weight change within float32 at {site}",
            found=f"up to {largest:.3g}",
            fix="The file is broken; do not use it.",
        )
    return factors


def _alpha(subject: str, key: str, tensor: Tensor) -> float:
    # kohya's trainer stores an integer tensor where alpha was left at the rank.
    if tensor.numel() != 1 or tensor.dtype == torch.bool:
        raise AdapterFormatError(
            subject,
            expected=f"one number in {key!r}",
            found=f"{list(tensor.shape)} {tensor.dtype}",
            fix="Export the adapter again.",
        )
    return check_alpha(subject, repr(key), float(tensor.item()))


def _factors(subject: str, site: str, down: Tensor, up: Tensor, alpha: float) -> Factors:
    try:
        return check_delta(subject, site, Factors(down, up, alpha))
    except InvalidInputError as error:
        raise AdapterFormatError(
            subject, expected=f"for {site}: {error.expected}", found=error.found, fix="Export the adapter again."
        ) from error


def _some(names: list[str]) -> str:
    shown = ", ".join(name if len(name) <= 120 else name[:120] + "..." for name in names[:5])
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"[{shown}]{more}" if names else "nothing"


def _hint(unexpected: list[str]) -> str:
    if any(key.startswith(("lora_te", "text_encoder")) for key in unexpected):
        return "An erasure changes the denoiser only: remove the text encoder's tensors if that is meant."
    if any(word in key for key in unexpected for word in ("dora", "magnitude", "hada", "lokr", "lora_mid", "oft")):
        return "Only plain low-rank adapters can be read; this is another method."
    return "The file is incomplete or for another architecture: export the adapter again."


# ------------------------------------------------------------------------------------------------------------ writing


def kohya_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of a kohya file, which is also the SPM reference's layout.

    All sites get the commonest alpha; where a site's is another, the ratio is folded into `lora_up`: diffusers 0.42
    ignores alphas of single attention layers in such files.

    Raises:
        UnsupportedOperationError: if a site's name could not be read back.
    """
    tensors = {}
    alpha = commonest_alpha(factors)
    for site, item in factors.items():
        if unflatten(flatten(site)) != site:
            raise UnsupportedOperationError(
                site,
                expected="a layer of a diffusers UNet",
                found="a name that kohya's naming cannot carry",
                fix="Use save_pretrained, whose files keep dotted names.",
            )
        prefix = KOHYA_PREFIX + flatten(site)
        tensors[f"{prefix}.lora_down.weight"] = item.down.detach().float()
        tensors[f"{prefix}.lora_up.weight"] = item.up.detach().float() * (item.alpha / alpha)
        tensors[f"{prefix}.alpha"] = torch.tensor(alpha, dtype=torch.float32)
    return tensors


def diffusers_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of a diffusers LoRA file, with the scale folded into `lora_B`.

    Readers take such a file's scale as 1 where they find no alpha: diffusers of any version, ComfyUI and others agree
    on that, and on nothing else, for a scale that differs from site to site.
    """
    tensors = {}
    for site, item in factors.items():
        tensors[f"{DIFFUSERS_PREFIX}{site}.lora_A.weight"] = item.down.detach().float()
        tensors[f"{DIFFUSERS_PREFIX}{site}.lora_B.weight"] = item.up.detach().float() * item.scale
    return tensors


def peft_tensors(factors: Mapping[str, Factors]) -> dict[str, Tensor]:
    """The tensors of a PEFT LoRA file; ranks and alphas go into its configuration, see `peft_config`."""
    tensors = {}
    for site, item in factors.items():
        tensors[f"{PEFT_PREFIX}{site}.lora_A.weight"] = item.down.detach().float()
        tensors[f"{PEFT_PREFIX}{site}.lora_B.weight"] = item.up.detach().float()
    return tensors
