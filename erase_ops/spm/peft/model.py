"""The SPM tuner's model: which layers get adapters, and of which rank."""

from __future__ import annotations

from typing import Any

from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import get_pattern_key
from torch import nn

from expunge.erase_ops.sites import find_sites
from expunge.erase_ops.spm.peft.config import SPMConfig
from expunge.erase_ops.spm.peft.layer import Conv2d, Linear, SPMLayer
from expunge.errors import UnsupportedOperationError


class SPMModel(BaseTuner):
    """SPM adapters in a model, as `peft.get_peft_model(model, SPMConfig(...))` makes it.

    Raises:
        UnsupportedOperationError: if a target is neither Linear nor Conv2d, or no targets are named and Expunge does
            not know the model.
    """

    prefix = "spm_"
    tuner_layer_cls = SPMLayer
    target_module_mapping: dict[str, list[str]] = {}  # noqa: RUF012  # PEFT's own form

    def _prepare_adapter_config(self, peft_config: SPMConfig, model_config: dict[str, Any]) -> SPMConfig:
        return peft_config  # its targets follow from the model itself, see below

    def _prepare_model(self, peft_config: SPMConfig, model: nn.Module) -> None:
        if peft_config.target_modules is None:
            peft_config.target_modules = list(find_sites(model, peft_config.coverage))

    def _create_and_replace(
        self,
        peft_config: SPMConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        ranks, alphas = peft_config.rank_pattern, peft_config.alpha_pattern
        settings = {
            "rank": ranks.get(get_pattern_key(ranks, current_key), peft_config.r),
            "alpha": alphas.get(get_pattern_key(alphas, current_key), peft_config.alpha),
            "init_weights": peft_config.init_weights,
            "inference_mode": peft_config.inference_mode,
        }
        if isinstance(target, SPMLayer):
            target.update_layer(adapter_name, **settings)
            return
        layer = _layer(target, current_key)(target, adapter_name, **settings)
        if adapter_name not in self.active_adapters:
            layer.requires_grad_(False)  # a further adapter is not trained until it is activated
        self._replace_module(parent, target_name, layer, target)


def _layer(target: nn.Module, path: str) -> type[Linear] | type[Conv2d]:
    base = target.get_base_layer() if isinstance(target, BaseTunerLayer) else target
    if isinstance(base, nn.Linear):
        return Linear
    if isinstance(base, nn.Conv2d):
        return Conv2d
    raise UnsupportedOperationError(
        path, expected="Linear or Conv2d", found=type(base).__name__, fix="Leave it out of target_modules."
    )
