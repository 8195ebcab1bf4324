"""The layers that the SPM tuner puts around a Linear or Conv2d.

Formula (SPM, eq. 3): y = W x + b + sum over active adapters of scale * up (down x), scale = alpha / r.
Linear: down [r, in], up [out, r]. Conv2d: down [r, in, kh, kw] with the layer's stride, padding and dilation but not
its groups, up [out, r, 1, 1].
"""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn

from expunge.errors import NonFiniteError, UnsupportedOperationError


class SPMLayer(BaseTunerLayer):
    """What the Linear and the Conv2d layer share: parameters, scales, merging.

    Args:
        base_layer: a Linear or Conv2d, or another PEFT layer around one.
    """

    adapter_layer_names = ("spm_down", "spm_up")
    other_param_names = ("r", "alpha", "scaling")

    def __init__(self, base_layer: nn.Module) -> None:
        self.base_layer = base_layer
        self.r: dict[str, int] = {}
        self.alpha: dict[str, float] = {}
        self.scaling: dict[str, float] = {}
        self.spm_down = nn.ParameterDict({})
        self.spm_up = nn.ParameterDict({})
        self._disable_adapters = False
        self.merged_adapters: list[str] = []
        # The base weight from before merging. Taking the delta off again would not restore every bit of it.
        self._unmerged_weight: Tensor | None = None

    def shapes(self, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Shapes of down and up for a rank."""
        base = self.get_base_layer()
        if isinstance(base, nn.Conv2d):
            return (rank, base.in_channels, *base.kernel_size), (base.out_channels, rank, 1, 1)
        return (rank, base.in_features), (base.out_features, rank)

    def update_layer(
        self, adapter_name: str, rank: int, alpha: float, *, init_weights: bool = True, inference_mode: bool = False
    ) -> None:
        """Adds an adapter, or replaces the one of that name.

        Args:
            adapter_name: its name.
            rank: r.
            alpha: the scale is alpha / r.
            init_weights: up starts at zero; False draws it.
            inference_mode: whether the adapter is frozen.
        """
        self.r[adapter_name], self.alpha[adapter_name] = rank, alpha
        self.scaling[adapter_name] = alpha / rank
        down, up = (nn.Parameter(torch.empty(shape)) for shape in self.shapes(rank))
        nn.init.kaiming_uniform_(down, a=math.sqrt(5))
        if init_weights:
            nn.init.zeros_(up)
        else:
            nn.init.kaiming_uniform_(up, a=math.sqrt(5))
        self.spm_down[adapter_name], self.spm_up[adapter_name] = down, up
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters, inference_mode=inference_mode)

    # ---------------------------------------------------------------------------------------------------------- scales

    def set_scale(self, adapter: str, scale: float) -> None:
        """Sets an adapter's multiplier: the delta is scaled by `scale * alpha / r`."""
        if adapter in self.scaling:
            self.scaling[adapter] = scale * self.alpha[adapter] / self.r[adapter]

    def scale_layer(self, scale: float) -> None:
        """Multiplies the scale of every active adapter."""
        for adapter in self._present():
            self.scaling[adapter] *= scale

    def unscale_layer(self, scale: float | None = None) -> None:
        """Takes a multiplier off the active adapters; None resets them to alpha / r."""
        for adapter in self._present():
            if scale is None:
                self.set_scale(adapter, 1.0)
            else:
                self.scaling[adapter] /= scale

    # --------------------------------------------------------------------------------------------------------- merging

    def get_delta_weight(self, adapter: str) -> Tensor:
        """The weight change of one adapter.

        Returns:
            `[out, in]` or `[out, in, kh, kw]`, float32.
        """
        down, up = self.spm_down[adapter], self.spm_up[adapter]
        product = up.float().flatten(1) @ down.float().flatten(1)  # [out, r] @ [r, in*kh*kw]
        return (self.scaling[adapter] * product).reshape(up.shape[0], *down.shape[1:])  # [out, in(, kh, kw)]

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Adds adapters to the base weight; `unmerge` restores every bit of it, from a copy that is kept meanwhile.

        Args:
            safe_merge: refuse a result with NaN or infinity, leaving the weight as it was.
            adapter_names: which; None for the active ones.

        Raises:
            NonFiniteError: with `safe_merge`, if the merged weight is not finite.
            UnsupportedOperationError: for grouped convolutions and for weights that are not floating point.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.spm_down]
        if not names:
            return
        base = self.get_base_layer()
        self._check_mergeable(base)
        original = base.weight.data if self._unmerged_weight is None else self._unmerged_weight.to(base.weight.device)
        total = original.float()
        for name in (*self.merged_adapters, *names):
            total = total + self.get_delta_weight(name).detach()
        merged = total.to(base.weight.dtype)
        if safe_merge and not bool(torch.isfinite(merged).all()):
            raise NonFiniteError(
                f"adapters {names}", expected="finite merged weights", found="NaN or infinity", fix="Do not merge them."
            )
        self._unmerged_weight = original
        base.weight.data = merged
        self.merged_adapters.extend(names)

    def unmerge(self) -> None:
        """Restores the base weight from before merging, bit for bit."""
        if not self.merged or self._unmerged_weight is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        weight = self.get_base_layer().weight
        weight.data = self._unmerged_weight.to(weight.device, weight.dtype)
        self._unmerged_weight = None
        self.merged_adapters.clear()

    def supports_lora_conversion(self, adapter_name: str = "default") -> bool:
        """Whether PEFT can convert the adapter to a LoRA: always, it is one."""
        return True

    @staticmethod
    def _check_mergeable(base: nn.Linear | nn.Conv2d) -> None:
        grouped = isinstance(base, nn.Conv2d) and base.groups > 1
        if grouped or not base.weight.is_floating_point():
            raise UnsupportedOperationError(
                type(base).__name__,
                expected="a floating-point weight without groups",
                found="groups" if grouped else str(base.weight.dtype),
                fix="Use the adapter unmerged.",
            )

    # --------------------------------------------------------------------------------------------------------- forward

    def _present(self) -> list[str]:
        return [name for name in self.active_adapters if name in self.spm_down]

    def adapt(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The base layer's output plus that of the active adapters (`forward` of both layers)."""
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        result = self.base_layer(x, *args, **kwargs)
        if self.merged:
            return result
        for name in self._present():
            down, up = self.spm_down[name], self.spm_up[name]
            change = self._low_rank(self._cast_input_dtype(x, down.dtype), down, up * self.scaling[name])
            result = result + change.to(result.dtype)
        return result

    def _low_rank(self, x: Tensor, down: Tensor, up: Tensor) -> Tensor:
        base = self.get_base_layer()
        if isinstance(base, nn.Linear):
            return F.linear(F.linear(x, down), up)  # [..., in] -> [..., r] -> [..., out]
        if base.padding_mode != "zeros":
            x = F.pad(x, base._reversed_padding_repeated_twice, mode=base.padding_mode)
        padding = base.padding if base.padding_mode == "zeros" else 0
        return F.conv2d(F.conv2d(x, down, None, base.stride, padding, base.dilation), up)


# nn.Module comes first, and BaseTunerLayer has no forward of its own: each class has to define it.


class Linear(nn.Module, SPMLayer):
    """SPM adapters around a Linear layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **settings: Any) -> None:
        super().__init__()
        SPMLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **settings)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        return self.adapt(x, *args, **kwargs)

    def __repr__(self) -> str:
        return "spm." + super().__repr__()


class Conv2d(nn.Module, SPMLayer):
    """SPM adapters around a Conv2d layer."""

    def __init__(self, base_layer: nn.Module, adapter_name: str, **settings: Any) -> None:
        super().__init__()
        SPMLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, **settings)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """`[B, in, H, W]` to `[B, out, H', W']`."""
        return self.adapt(x, *args, **kwargs)

    def __repr__(self) -> str:
        return "spm." + super().__repr__()
