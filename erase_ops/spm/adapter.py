"""SPMAdapter: one or several concepts erased by one set of low-rank factors, in memory and on disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from expunge.erase_ops.formats.factors import Factors, is_site_path
from expunge.erase_ops.spm.concepts import Concept
from expunge.errors import InvalidInputError

Family = Literal["sd", "sdxl"]


@dataclass(eq=False)
class SPMAdapter:
    """A concept-SemiPermeable Membrane (SPM): low-rank factors for a denoiser's layers and the concepts they erase.

    Args:
        factors: the factors of each site, keyed by the denoiser's dotted module path.
        concept_list: the concepts; the gate of the adapter is the largest of theirs.
        neutral: the prompt that the concepts were erased towards; "" for the unconditional one.
        family: `"sd"` (SD 1.x and 2.x) or `"sdxl"`.
        component: the pipeline's component that carries the sites.
        threshold: the calibrated gate threshold; None for files that have none.
        calibration: the record of that calibration.
        base_fingerprint: the architecture of the denoiser that it was trained for; None if unknown.
        text_encoder_fingerprint: the text encoders that the concept states come from; None if unknown.
        settings: how it was trained, in JSON's types.
        source: where it was read from.
        name: a short name, safe as a folder name and as a PEFT adapter name.

    Raises:
        InvalidInputError: if there is no site or no concept, or a site path or the family is not valid.
    """

    factors: dict[str, Factors]
    concept_list: list[Concept]
    neutral: str = ""
    family: Family = "sd"
    component: Literal["unet"] = "unet"
    threshold: float | None = None
    calibration: dict[str, Any] | None = None
    base_fingerprint: str | None = None
    text_encoder_fingerprint: str | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    name: str = ""

    def __post_init__(self) -> None:
        self.factors = dict(self.factors)
        self.concept_list = list(self.concept_list)
        bad = [path for path in self.factors if not is_site_path(path)]
        if bad or not self.factors:
            raise InvalidInputError(
                "SPMAdapter.factors",
                expected="at least one site, keyed by dotted module paths",
                found=f"{len(self.factors)} sites, not a path: {bad[:3]}",
                fix="Key the factors by the denoiser's named_modules() paths.",
            )
        if not self.concept_list:
            raise InvalidInputError(
                "SPMAdapter.concept_list",
                expected="at least one concept",
                found="none",
                fix="Pass the concepts that the factors erase.",
            )

    @property
    def concepts(self) -> list[str]:
        """The texts of the erased concepts."""
        return [concept.text for concept in self.concept_list]
