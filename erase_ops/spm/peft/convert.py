"""Between SPMAdapter and a model with PEFT adapters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel, get_peft_model
from torch import nn

from expunge.erase_ops.fingerprint import architecture_fingerprint
from expunge.erase_ops.formats.factors import Factors
from expunge.erase_ops.formats.folders import slug
from expunge.erase_ops.formats.peft_config import peft_config
from expunge.erase_ops.sites import walk
from expunge.erase_ops.spm.adapter import Family, SPMAdapter
from expunge.erase_ops.spm.concepts import Concept
from expunge.erase_ops.spm.peft.config import SPMConfig
from expunge.erase_ops.spm.peft.layer import SPMLayer
from expunge.errors import AdapterMismatchError, InvalidInputError


def load_spm(model: nn.Module, adapter: SPMAdapter, adapter_name: str = "default") -> PeftModel:
    """Puts an SPM into a model as an ungated PEFT adapter.

    Args:
        model: a denoiser, or a PeftModel around one, which then gets a further adapter.
        adapter: the SPM.
        adapter_name: its name in the model; a further adapter is not activated.

    Returns:
        The PeftModel.

    Raises:
        AdapterMismatchError: if a site is not in the model or of other shapes; nothing is changed then.
        InvalidInputError: if the name is taken.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    _check_sites(base, adapter)
    shared = peft_config(adapter.factors)
    config = SPMConfig(
        r=shared["r"],
        alpha=float(shared["lora_alpha"]),
        target_modules=shared["target_modules"],
        rank_pattern=shared["rank_pattern"],
        alpha_pattern=shared["alpha_pattern"],
        concepts=adapter.concepts,
        neutral=adapter.neutral,
    )
    if not isinstance(model, PeftModel):
        model = get_peft_model(model, config, adapter_name=adapter_name)
    elif adapter_name in model.peft_config:
        raise InvalidInputError(
            "adapter_name",
            expected="a name that is free",
            found=repr(adapter_name),
            fix="Choose another, or delete it.",
        )
    else:
        model.add_adapter(adapter_name, config)
    layers = _layers(model, adapter_name)
    with torch.no_grad():
        for path, item in adapter.factors.items():
            layers[path].spm_down[adapter_name].copy_(item.down)
            layers[path].spm_up[adapter_name].copy_(item.up)
    return model


def export_spm(
    model: nn.Module,
    adapter_name: str = "default",
    *,
    concepts: Sequence[str] | None = None,
    family: Family = "sd",
    settings: dict[str, Any] | None = None,
) -> SPMAdapter:
    """The SPMAdapter of a PEFT adapter, to be saved or gated.

    Args:
        model: a PeftModel, or a model that PEFT adapters were injected into.
        adapter_name: which.
        concepts: what it erases; those of its configuration if left out.
        family: `"sd"` or `"sdxl"`.
        settings: how it was trained.

    Returns:
        The adapter with float32 copies of the factors on the CPU.

    Raises:
        InvalidInputError: if there is no such adapter, or its concepts are not known.
    """
    layers = _layers(model, adapter_name)
    config = getattr(model, "peft_config", {}).get(adapter_name)
    if not layers or not isinstance(config, SPMConfig):
        raise InvalidInputError(
            "adapter_name",
            expected="the name of an SPM adapter in the model",
            found=repr(adapter_name),
            fix="Check it.",
        )
    texts = list(config.concepts if concepts is None else concepts)
    if not texts:
        raise InvalidInputError(
            "concepts", expected="what the adapter erases", found="none", fix='Pass concepts=["..."].'
        )
    return SPMAdapter(
        {
            path: Factors(
                _copy(layer.spm_down[adapter_name]), _copy(layer.spm_up[adapter_name]), layer.alpha[adapter_name]
            )
            for path, layer in layers.items()
        },
        [Concept(text) for text in texts],
        neutral=config.neutral,
        family=family,
        base_fingerprint=architecture_fingerprint(model.get_base_model() if isinstance(model, PeftModel) else model),
        settings=dict(settings or {}),
        name=slug("-".join(texts)),
    )


def _copy(parameter: torch.Tensor) -> torch.Tensor:
    return parameter.detach().to("cpu", torch.float32, copy=True)


def _layers(model: nn.Module, adapter_name: str) -> dict[str, SPMLayer]:
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    return {
        path.replace(".base_layer", ""): module
        for path, module in base.named_modules()
        if isinstance(module, SPMLayer) and adapter_name in module.spm_down
    }


def _check_sites(model: nn.Module, adapter: SPMAdapter) -> None:
    modules = dict(walk(model))
    missing, wrong = [], []
    for path, item in adapter.factors.items():
        module = modules.get(path)
        if isinstance(module, nn.Linear):
            expected: tuple[int, ...] = (module.out_features, module.in_features)
        elif isinstance(module, nn.Conv2d):
            expected = (module.out_channels, module.in_channels, *module.kernel_size)
        else:
            missing.append(path)
            continue
        found = (item.out_features, *item.down.shape[1:])
        if found != expected:
            wrong.append(f"{path} {list(found)} for {list(expected)}")
    if missing or wrong:
        raise AdapterMismatchError(
            adapter.name,
            expected=f"{len(adapter.factors)} sites of {type(model).__name__}",
            found=f"{len(missing)} not in the model {missing[:3]}, {len(wrong)} of other shapes {wrong[:3]}",
            fix="Use the base model that the adapter was trained for.",
        )
