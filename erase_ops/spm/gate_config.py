"""Settings of an SPM's gate: the texts that it compares with, and the prompts that its threshold is calibrated on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from expunge.erase_ops.training.config import About
from expunge.erase_ops.training.erasing import ErasingConfig


@dataclass(frozen=True, kw_only=True)
class GateConfig(ErasingConfig):
    """What an SPM remembers of its concepts, beside its factors.

    Raises:
        InvalidInputError: if a value is outside its range or two do not fit; the message names the field.
    """

    neutral: Annotated[str | None, About("Neutral text of the concepts; the pairs' if None and they share one.")] = None
    phrasings: Annotated[tuple[str, ...], About("Templates with {} whose text states the gate compares with.")] = (
        "{}",
    )
    benign_prompts: Annotated[tuple[str, ...], About("Prompts without the concept; they calibrate the threshold.")] = ()
    calibration_targets: Annotated[tuple[str, ...], About("Prompts with the concept; the targets if empty.")] = ()
    false_positive_rate: Annotated[float, About("Share of the benign prompts that may pass the threshold.")] = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require("false_positive_rate", lambda value: 0 <= value < 1, "in [0, 1)")

    def _check_prompts(self) -> None:
        super()._check_prompts()
        for name in ("benign_prompts", "calibration_targets"):
            self.require(name, lambda texts: all(text.strip() for text in texts), "texts that are not empty")
        self.require(
            "phrasings",
            lambda texts: texts and all("{}" in text for text in texts),
            "templates with {} for the concept",
        )

    @property
    def neutral_text(self) -> str:
        """The neutral text of the concepts: `neutral`, or what all pairs share, or ""."""
        if self.neutral is not None:
            return self.neutral
        shared = {pair.neutral for pair in self.prompts}
        return shared.pop() if len(shared) == 1 else ""
