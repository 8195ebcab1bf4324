"""Settings of ESD: `selection` is the paper's choice of weights (esd-x, esd-x-strict, esd-u, full)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from expunge.erase_ops.esd.objective import RECIPE
from expunge.erase_ops.training.erasing import DEMO, SD15, DeltaTrainingConfig
from expunge.erase_ops.training.trainer import Recipe


@dataclass(frozen=True, kw_only=True)
class ESDConfig(DeltaTrainingConfig):
    """Settings of ESD; each field's type, default and meaning stand beside it (`help_for` reads them).

    Presets: "paper" (the paper's numbers), "sd15" (those of its later code's alternative: fewer steps, higher rate),
    and "demo" for the bundled model.

    Raises:
        InvalidInputError: if a value is outside its range or two do not fit; the message names the field.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "demo": DEMO | {"batch_size": 8, "learning_rate": 3e-4, "max_train_steps": 60},
        "paper": SD15 | {"max_train_steps": 1000, "learning_rate": 1e-5},
        "sd15": SD15,
    }

    def recipe(self) -> Recipe:
        return RECIPE
