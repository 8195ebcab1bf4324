"""Settings of EAR; the defaults are the published ones where the paper's scripts have any."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

from expunge.erase_ops.ear.objective import Space
from expunge.erase_ops.ear.pairs import ConceptPair, load_pairs
from expunge.erase_ops.ear.streams import PrefixMode
from expunge.erase_ops.janus.decoding import Sampling
from expunge.erase_ops.training.config import About, TrainingConfig
from expunge.kernels.loss_gate import Granularity

StudentKind = Literal["selected", "lora"]
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")


@dataclass(frozen=True, kw_only=True)
class EARConfig(TrainingConfig):
    """What to erase from an autoregressive model, and how.

    `max_train_steps` is set by `train_ear`: one step for each window of each rollout, skipped ones included. Presets:
    "paper" (the published numbers, which are the defaults) and "demo" for the bundled model.

    Raises:
        InvalidInputError: if a value is outside its range or two do not fit; the message names the field.
    """

    PRESETS: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {},
        "demo": {
            "window": 8,
            "layers": (0, 1),
            "learning_rate": 3e-4,
            "eta": 0.5,
            "rollout_guidance_scale": 1.5,
            "temperature": 0.5,
            "retain_weight": 16.0,
            "retain_per_rollout": 8,
        },
    }

    # What is erased
    prompts: Annotated[tuple[ConceptPair, ...], About("Pairs of a prompt with the concept and one without it.")] = ()
    pairs: Annotated[str | None, About("A .json or .csv file of pairs, in the place of prompts.", free=True)] = None
    concepts: Annotated[tuple[str, ...], About("Texts of the erased concepts; the pairs' own if empty.")] = ()
    name: Annotated[str, About("Name of the erasure; made from the concepts if empty.", free=True)] = ""
    eta: Annotated[float, About("How far beyond the replacement the target is pushed away from the concept.")] = 1.0
    space: Annotated[Space, About("What is compared: hidden states or the image head's logits.")] = "hidden"

    # Windows and their masking
    window: Annotated[int, About("Image tokens whose losses are accumulated into one update.")] = 48
    prefix_mode: Annotated[
        PrefixMode,
        About("aligned: all streams see the same tokens; independent: each its own; stateless: as published."),
    ] = "aligned"
    granularity: Annotated[Granularity, About("What a loss threshold masks: whole windows, tokens or elements.")] = (
        "window"
    )
    threshold: Annotated[float, About("Losses up to it are masked; 0 masks nothing but exact zeros.")] = 0.05
    threshold_quantile: Annotated[
        float | None, About("The share of a rollout's losses that is masked, in the place of `threshold`.")
    ] = None
    random_skip: Annotated[
        float, About("Control: share of all windows that are skipped at random, whatever they cost.")
    ] = 0.0

    # What must not change
    retain: Annotated[tuple[str, ...], About("Prompts that the model must draw as before.")] = ()
    retain_weight: Annotated[float, About("Weight of that against the erasing loss.")] = 1.0
    retain_per_rollout: Annotated[int, About("Prompts of `retain` in each rollout.")] = 1

    # Rollouts
    passes: Annotated[int, About("Passes over the pairs.")] = 1
    batch_size: Annotated[int, About("Pairs, each with its own picture, in one rollout.")] = 1
    rollout_guidance_scale: Annotated[float, About("Classifier-free guidance of the rollouts; 1 switches it off.")] = (
        5.0
    )
    temperature: Annotated[float, About("Temperature of the rollouts.")] = 1.0

    # What is trained
    student: Annotated[
        StudentKind, About("selected: the layers' weights themselves; lora: low-rank factors beside them.")
    ] = "selected"
    layers: Annotated[tuple[int, ...], About("Decoder layers whose attention is trained.")] = (0, 1, 2, 3, 4)
    projections: Annotated[tuple[str, ...], About("Which of q_proj, k_proj, v_proj and o_proj.")] = PROJECTIONS
    rank: Annotated[int, About("Rank of the low-rank factors.")] = 16
    alpha: Annotated[float, About("Low-rank factors are scaled by alpha / rank.")] = 16.0

    # The published optimiser is Adam without weight decay or clipping.
    adam_weight_decay: Annotated[float, About("AdamW's weight decay.")] = 0.0
    max_grad_norm: Annotated[float, About("Gradients are clipped to this norm; 0 switches clipping off.")] = 0.0

    def __post_init__(self) -> None:
        if self.pairs is not None and not self.prompts:
            object.__setattr__(self, "prompts", tuple(load_pairs(self.pairs)))
        super().__post_init__()
        self.require("prompts", bool, "at least one pair, or the file `pairs`")
        self.require("concepts", lambda texts: all(text.strip() for text in texts), "texts that are not empty")
        self.require("retain", lambda texts: all(text.strip() for text in texts), "prompts that are not empty")
        for name in ("window", "passes", "batch_size", "rank", "retain_per_rollout"):
            self.require(name, lambda value: value >= 1, "at least 1")
        for name in ("eta", "threshold", "retain_weight"):
            self.require(name, lambda value: value >= 0, "0 or more")
        for name in ("alpha", "temperature"):
            self.require(name, lambda value: value > 0, "a number above 0")
        self.require("rollout_guidance_scale", lambda value: value > 0, "a number above 0; 1 for none")
        self.require(
            "threshold_quantile", lambda value: value is None or 0 <= value < 1, "None or a share from 0 up to 1"
        )
        self.require("random_skip", lambda value: 0 <= value < 1, "a share from 0 up to 1")
        self.require("layers", lambda value: bool(value) and min(value) >= 0, "at least one layer, counted from 0")
        self.require(
            "projections", lambda value: bool(value) and set(value) <= set(PROJECTIONS), ", ".join(PROJECTIONS)
        )
        if self.space == "logits":
            self.require("granularity", lambda value: value != "element", "window or token, for logits")
        if not self.concept_texts:
            self.require("concepts", bool, "the erased concepts, which the pairs do not say")

    @property
    def concept_texts(self) -> tuple[str, ...]:
        """`concepts`, or the distinct ones of the pairs."""
        return self.concepts or tuple(dict.fromkeys(pair.concept for pair in self.prompts if pair.concept))

    @property
    def sampling(self) -> Sampling:
        """How rollouts are drawn: from the full distribution, as in the published scripts."""
        return Sampling(guidance_scale=self.rollout_guidance_scale, temperature=self.temperature)

    def windows(self, image_tokens: int) -> int:
        """Windows of a picture; the last may be shorter."""
        return math.ceil(image_tokens / self.window)

    def steps(self, image_tokens: int) -> int:
        """Windows of the whole training."""
        rollouts = math.ceil(self.passes * len(self.prompts) / self.batch_size)
        return rollouts * self.windows(image_tokens)

    def sites(self, layers: int) -> tuple[str, ...]:
        """Paths of the trained projections in a language model of so many layers.

        Raises:
            InvalidInputError: if a layer is not there.
        """
        self.require("layers", lambda value: max(value) < layers, f"layers from 0 to {layers - 1}, as the model has")
        return tuple(f"layers.{i}.self_attn.{name}" for i in sorted(set(self.layers)) for name in self.projections)
