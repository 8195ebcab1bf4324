"""Settings of SPM training (arXiv 2312.16145): what to erase, towards what, in which states, against which anchors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from expunge.erase_ops.spm.gate_config import GateConfig
from expunge.erase_ops.spm.presets import PRESETS
from expunge.erase_ops.spm.reference_yaml import is_reference_document, read_reference
from expunge.erase_ops.training.config import About, read_yaml

AnchorSource = Literal["random", "prompts"]
AnchorLayout = Literal["fixed", "official"]


@dataclass(frozen=True, kw_only=True)
class SPMTrainingConfig(GateConfig):
    """Settings of `train_spm`; each field's type, default and meaning stand beside it (`help_for` reads them).

    Raises:
        InvalidInputError: if a value is outside its range or two do not fit; the message names the field.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = PRESETS

    # The adapter
    rank: Annotated[int, About("Rank of the factors.")] = 1
    alpha: Annotated[float, About("The adapter is scaled by alpha / rank.")] = 1.0
    coverage: Annotated[str, About("Which layers carry factors: a preset of erase_ops.sites.")] = "all"

    # The objective and its states
    anchor_weight: Annotated[float, About("lambda: weight of latent anchoring; 0 switches it off.")] = 1000.0
    rollout_gate_negative: Annotated[bool, About("Adapt the rollout's negative rows too, as at inference.")] = True

    # Anchors
    anchor_source: Annotated[AnchorSource, About("Anchors are random directions, or prompts.")] = "random"
    anchor_prompts: Annotated[tuple[str, ...], About("Prompts that must not change, for anchor_source=prompts.")] = ()
    anchors_per_step: Annotated[int, About("Anchors drawn for each step.")] = 4
    anchor_unconditional: Annotated[bool, About("Anchor the unconditional prompt in every step, besides.")] = True
    anchor_layout: Annotated[
        AnchorLayout, About("fixed: every anchor counts; official: the reference's batch, half of it unconditional.")
    ] = "fixed"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("rank", "anchors_per_step"):
            self.require(name, lambda value: value >= 1, "at least 1")
        self.require("alpha", lambda value: value > 0, "a number above 0")
        if self.anchor_source == "prompts" and self.needs_anchors:
            self.require("anchor_prompts", bool, "at least one prompt, since anchor_source is 'prompts'")

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> Self:
        """Reads a YAML file of these fields (optionally with `preset: NAME`), or one of the SPM reference's files.

        Of the reference both kinds are read: the config file, which names its prompt file, and a prompt file alone.

        Args:
            path: the file.
            overrides: fields that take precedence over the file's.

        Raises:
            InvalidInputError: if the file cannot be read, or a key or value is wrong.
        """
        document = read_yaml(path)
        if is_reference_document(document):
            return cls.preset("sd15", **(read_reference(document, Path(path)) | overrides))
        return cls.from_document(document, path, **overrides)
