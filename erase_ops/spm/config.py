"""Settings of SPM training (arXiv 2312.16145): what to erase, towards what, in which states, against which anchors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from expunge.erase_ops.spm.reference_yaml import is_reference_document, read_reference
from expunge.erase_ops.training.config import About, TrainingConfig, coerce_fields, read_yaml
from expunge.errors import InvalidInputError

AnchorSource = Literal["random", "prompts"]
AnchorLayout = Literal["fixed", "official"]


@dataclass(frozen=True)
class PromptPair:
    """One prompt to erase and what it is erased towards.

    Args:
        target: the prompt whose prediction the adapter changes.
        neutral: the prompt that it is erased towards. It should keep what is to stay: "a cat in noto style" towards
            "noto style", not towards nothing.
        positive: the prompt that is pushed away from; `target` if None.
        unconditional: the negative prompt of the denoising rollout, and the anchor that stands for "no prompt".
        guidance_scale: eta of this pair; the config's if None.
        anchor_weight: lambda of this pair; the config's if None, no anchoring if 0.

    Raises:
        InvalidInputError: if the target is empty, or a number is negative.
    """

    target: str
    neutral: str = ""
    positive: str | None = None
    unconditional: str = ""
    guidance_scale: float | None = None
    anchor_weight: float | None = None

    def __post_init__(self) -> None:
        coerce_fields(self)
        if not self.target.strip():
            raise InvalidInputError(
                "PromptPair.target", expected="a prompt that is not empty", found=repr(self.target), fix="Name it."
            )
        for name in ("guidance_scale", "anchor_weight"):
            value = getattr(self, name)
            if value is not None and value < 0:
                raise InvalidInputError(
                    f"PromptPair({self.target!r}).{name}", expected="0 or more", found=repr(value), fix="Raise it."
                )


@dataclass(frozen=True, kw_only=True)
class SPMTrainingConfig(TrainingConfig):
    """Settings of `train_spm`; each field's type, default and meaning stand beside it (`help_for` reads them).

    Raises:
        InvalidInputError: if a value is outside its range or two do not fit; the message names the field.
    """

    # What is erased
    prompts: Annotated[tuple[PromptPair, ...], About("Pairs of a prompt to erase and what it is erased towards.")] = ()
    concepts: Annotated[
        tuple[str, ...], About("Texts of the erased concepts, for the gate; the targets if empty.")
    ] = ()
    neutral: Annotated[str | None, About("Neutral text of the concepts; the pairs' if None and they share one.")] = None
    phrasings: Annotated[tuple[str, ...], About("Templates with {} whose text states the gate compares with.")] = (
        "{}",
    )
    name: Annotated[str, About("Name of the adapter; made from the concepts if empty.", free=True)] = ""

    # The adapter
    rank: Annotated[int, About("Rank of the factors.")] = 1
    alpha: Annotated[float, About("The adapter is scaled by alpha / rank.")] = 1.0
    coverage: Annotated[str, About("Which layers carry factors: a preset of erase_ops.sites.")] = "all"

    # The objective
    guidance_scale: Annotated[float, About("eta: how far beyond the neutral prompt the target is pushed.")] = 1.0
    anchor_weight: Annotated[float, About("lambda: weight of latent anchoring; 0 switches it off.")] = 1000.0

    # Training states
    batch_size: Annotated[int, About("Latents, each with its own prompt pair, in one step.")] = 1
    max_denoising_steps: Annotated[int, About("Steps T of the rollout's DDIM grid.")] = 30
    min_denoising_steps: Annotated[int, About("Fewest steps before a state is taken; 0 includes pure noise.")] = 1
    states_per_rollout: Annotated[int, About("Training states taken from each rollout.")] = 1
    rollout_guidance_scale: Annotated[float, About("Classifier-free guidance of the rollout; 1 switches it off.")] = 3.0
    rollout_gate_negative: Annotated[bool, About("Adapt the rollout's negative rows too, as at inference.")] = True
    resolution: Annotated[int | None, About("Side of the images in pixels; the model's own if None.")] = None
    dynamic_resolution: Annotated[bool, About("Draw the side from resolution / 2 to resolution, in steps of 64.")] = (
        False
    )
    dynamic_crops: Annotated[bool, About("SDXL: draw the original size and the crop of its size conditioning.")] = False
    clip_skip: Annotated[int | None, About("Layers of the text encoder to skip, as in the pipelines.")] = None

    # Anchors
    anchor_source: Annotated[AnchorSource, About("Anchors are random directions, or prompts.")] = "random"
    anchor_prompts: Annotated[tuple[str, ...], About("Prompts that must not change, for anchor_source=prompts.")] = ()
    anchors_per_step: Annotated[int, About("Anchors drawn for each step.")] = 4
    anchor_unconditional: Annotated[bool, About("Anchor the unconditional prompt in every step, besides.")] = True
    anchor_layout: Annotated[
        AnchorLayout, About("fixed: every anchor counts; official: the reference's batch, half of it unconditional.")
    ] = "fixed"

    # The gate's threshold
    benign_prompts: Annotated[tuple[str, ...], About("Prompts without the concept; they calibrate the threshold.")] = ()
    calibration_targets: Annotated[tuple[str, ...], About("Prompts with the concept; the targets if empty.")] = ()
    false_positive_rate: Annotated[float, About("Share of the benign prompts that may pass the threshold.")] = 0.01

    offload_text_encoders: Annotated[
        bool, About("Keep the text encoders on the CPU once the prompts are encoded.", free=True)
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_prompts()
        for name in ("rank", "batch_size", "max_denoising_steps", "states_per_rollout", "anchors_per_step"):
            self.require(name, lambda value: value >= 1, "at least 1")
        for name in ("guidance_scale", "anchor_weight", "min_denoising_steps"):
            self.require(name, lambda value: value >= 0, "0 or more")
        for name in ("resolution", "clip_skip"):
            self.require(name, lambda value: value is None or value >= 1, "None or at least 1")
        self.require("alpha", lambda value: value > 0, "a number above 0")
        self.require("rollout_guidance_scale", lambda value: value >= 1, "at least 1")
        self.require("false_positive_rate", lambda value: 0 <= value < 1, "in [0, 1)")
        room = self.max_denoising_steps - self.min_denoising_steps
        self.require("states_per_rollout", lambda value: value <= room, f"at most {room}, the steps to choose from")
        if self.anchor_source == "prompts" and self.needs_anchors:
            self.require("anchor_prompts", bool, "at least one prompt, since anchor_source is 'prompts'")
        if self.dynamic_resolution and self.resolution is not None:
            self.require("resolution", lambda value: value >= 128 and value % 64 == 0, "a multiple of 64 from 128 up")

    def _check_prompts(self) -> None:
        self.require("prompts", bool, "at least one PromptPair")
        for name in ("concepts", "benign_prompts", "calibration_targets"):
            self.require(name, lambda texts: all(text.strip() for text in texts), "texts that are not empty")
        self.require(
            "phrasings",
            lambda texts: texts and all("{}" in text for text in texts),
            "templates with {} for the concept",
        )

    @property
    def needs_anchors(self) -> bool:
        """Whether any pair is anchored."""
        return any(self.anchor_weight_of(pair) > 0 for pair in self.prompts)

    def guidance_scale_of(self, pair: PromptPair) -> float:
        """eta of a pair."""
        return self.guidance_scale if pair.guidance_scale is None else pair.guidance_scale

    def anchor_weight_of(self, pair: PromptPair) -> float:
        """lambda of a pair."""
        return self.anchor_weight if pair.anchor_weight is None else pair.anchor_weight

    @property
    def concept_texts(self) -> tuple[str, ...]:
        """The texts of the erased concepts: `concepts`, or the distinct targets."""
        return self.concepts or tuple(dict.fromkeys(pair.target for pair in self.prompts))

    @property
    def neutral_text(self) -> str:
        """The neutral text of the concepts: `neutral`, or what all pairs share, or ""."""
        if self.neutral is not None:
            return self.neutral
        shared = {pair.neutral for pair in self.prompts}
        return shared.pop() if len(shared) == 1 else ""

    @classmethod
    def preset(cls, preset: str, /, **fields: Any) -> Self:
        """The preset ("demo", "sd15" or "sdxl") with these fields set.

        Example:
            >>> config = SPMTrainingConfig.preset("sd15", prompts=[PromptPair("snoopy")])
            >>> config.max_train_steps
            3000

        Raises:
            InvalidInputError: if there is no such preset, or a field is unknown or wrong.
        """
        if preset not in PRESETS:
            raise InvalidInputError(
                "preset", expected=" or ".join(PRESETS), found=repr(preset), fix="Name one of the presets."
            )
        return cls.from_dict(PRESETS[preset] | fields)

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
        if not isinstance(document, Mapping):
            raise InvalidInputError(
                str(path),
                expected="a mapping of settings",
                found=type(document).__name__,
                fix="Write `key: value` lines.",
            )
        fields = {key: value for key, value in document.items() if key != "preset"} | overrides
        return cls.preset(document["preset"], **fields) if "preset" in document else cls.from_dict(fields)


def prompt_pairs(
    concept: str, templates: Sequence[str | tuple[str, str]], *, neutral: str = "", **fields: Any
) -> tuple[PromptPair, ...]:
    """One pair for each template, with the concept in place of `{}`.

    Args:
        concept: the word or phrase to erase.
        templates: either (target, neutral) templates, such as `("a {} in noto style", "noto style")`, of which the
            neutral one may hold `{}` for `neutral`; or one template for both, whose neutral prompt is the template with
            `neutral` in place of `{}`, or "" if `neutral` is empty.
        neutral: what the concept is erased towards.
        fields: further fields of every `PromptPair`.

    Example:
        >>> prompt_pairs("snoopy", ["a photo of {}"], neutral="a dog")[0].neutral
        'a photo of a dog'

    Raises:
        InvalidInputError: if a target template has no `{}`.
    """
    pairs = []
    for template in templates:
        target, without = (template, template if neutral else "") if isinstance(template, str) else template
        pairs.append(PromptPair(fill(target, concept), without.replace("{}", neutral), **fields))
    return tuple(dict.fromkeys(pairs))


def fill(template: str, word: str) -> str:
    """`template` with `word` in place of `{}`.

    Raises:
        InvalidInputError: if there is no `{}`.
    """
    if "{}" not in template:
        raise InvalidInputError("template", expected="{} where the word goes", found=repr(template), fix="Add {}.")
    return template.replace("{}", word)


# sd15: the reference's values. It draws anchors as "official" says, which counts the empty prompt as half of them.
_REFERENCE: dict[str, Any] = {
    "max_train_steps": 3000,
    "learning_rate": 1e-4,
    "lr_scheduler": "cosine_with_restarts",
    "lr_warmup_steps": 500,
    "lr_num_cycles": 3,
    "max_grad_norm": 0.0,
    "max_denoising_steps": 30,
    "resolution": 512,
    "dynamic_resolution": True,
    "checkpointing_steps": 500,
}
# demo: the bundled model is small and its adapters are short, so a high rate and several states per rollout pay. An eta
# of 1 pushes the erased object's pictures out of their style as well (100 % to 72 %, cat); 0.3 leaves it and still
# erases; 0 leaves a few per cent of the neutral prompt's own objects.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "max_train_steps": 250,
        "learning_rate": 1e-2,
        "guidance_scale": 0.3,
        "batch_size": 8,
        "max_denoising_steps": 20,
        "states_per_rollout": 4,
        "anchor_source": "prompts",
        "anchors_per_step": 8,
        "anchor_weight": 10.0,
    },
    "sd15": _REFERENCE,
    "sdxl": _REFERENCE | {"resolution": 1024, "dynamic_resolution": False, "gradient_checkpointing": True},
}
