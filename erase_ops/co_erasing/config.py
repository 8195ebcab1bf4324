"""Settings of Co-Erasing: those of the image stage, and what differs in the text stage before it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from expunge.erase_ops.co_erasing.objective import RECIPE
from expunge.erase_ops.esd.config import ESDConfig
from expunge.erase_ops.training.config import About, field_names
from expunge.erase_ops.training.erasing import DEMO, SD15, DeltaTrainingConfig
from expunge.erase_ops.training.trainer import Recipe


@dataclass(frozen=True, kw_only=True)
class CoErasingConfig(DeltaTrainingConfig):
    """Settings of Co-Erasing; each field's type, default and meaning stand beside it (`help_for` reads them).

    `images` shows the concepts; without any, the frozen model draws `drawn_images` of them. Presets: "paper", "demo".

    Raises:
        InvalidInputError: if a value is outside its range or two do not fit; the message names the field.
    """

    image_encoder: Annotated[str, About("A CLIPVisionModelWithProjection, folder or Hub id.", path=True)] = ""
    ip_adapter: Annotated[str, About("A diffusers IP-Adapter (.safetensors), linear projection.", path=True)] = ""
    selection: Annotated[str, About("Which weights the image stage trains.")] = "noxattn"
    text_selection: Annotated[str, About("Which weights the text stage trains.")] = "noxattn"
    text_steps: Annotated[int, About("Optimiser steps of the text stage.")] = 1000
    rollout_guidance_scale: Annotated[float, About("Guidance of the rollouts, which see text alone.")] = 1.0
    image_scale: Annotated[float, About("How strongly the image tokens are seen.")] = 1.0
    refine: Annotated[bool, About("Refine the image tokens by the concept's text.")] = True
    unconditional_image: Annotated[bool, About("Whether the neutral prompt sees the image too.")] = False
    prompt_bank: Annotated[tuple[str, ...], About("Prompts of the concept whose states are mixed at random.")] = ()
    bank_temperature: Annotated[float, About("The mixture's weights are drawn from Dirichlet(1 / this).")] = 0.7

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "demo": DEMO
        | {"selection": "esd-x", "text_selection": "esd-x", "text_steps": 50, "max_train_steps": 30}
        | {"batch_size": 8, "learning_rate": 5e-4, "drawn_images": 16},
        "paper": SD15 | {"learning_rate": 1e-5, "max_train_steps": 1000, "drawn_images": 100},
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("image_encoder", "ip_adapter", "text_selection"):
            self.require(name, bool, "a value")
        self.require("text_steps", lambda value: value >= 1, "at least 1")
        self.require("bank_temperature", lambda value: value > 0, "a number above 0")
        self.require("student", lambda kind: kind == "selected", "'selected'")
        self.require("state_source", lambda kind: kind == "rollout", "'rollout'")
        self.require("resume_from_checkpoint", lambda name: name in (None, "latest"), "None or 'latest'")

    def recipe(self) -> Recipe:
        return RECIPE

    @property
    def text_stage(self) -> ESDConfig:
        """The settings of the text stage."""
        shared = {
            name: getattr(self, name) for name in field_names(ESDConfig) if name not in ("images", "validation_steps")
        }
        return ESDConfig.from_dict(shared | {"selection": self.text_selection, "max_train_steps": self.text_steps})
