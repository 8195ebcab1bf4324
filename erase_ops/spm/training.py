"""Training of SPMs (one-dimensional adapters, arXiv 2312.16145) with Latent Anchoring.

Each step takes a partially denoised latent of a prompt to erase (`states`), asks the frozen denoiser once what the
adapted one should say (`objective`), and asks the adapted one once, for the target and the anchors together. Compared
with the reference nothing is computed that the loss does not use: no classifier-free guidance at scale 1, no anchors
that are thrown away, and the positive prompt shares the frozen denoiser's forward with the neutral one.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expunge.erase_ops.artefact import check_target
from expunge.erase_ops.attach import Attachment, attach, attachment_of, detach
from expunge.erase_ops.formats.factors import Factors
from expunge.erase_ops.spm.adapter import SPMAdapter
from expunge.erase_ops.spm.anchors import Anchors, AnchorSampler
from expunge.erase_ops.spm.config import SPMTrainingConfig
from expunge.erase_ops.spm.objective import erasing_target, spm_loss
from expunge.erase_ops.spm.states import StateSampler, TrainingState
from expunge.erase_ops.spm.untrained import new_adapter, recorded_settings
from expunge.erase_ops.training.borrowed import deterministic, frozen, text_encoders_on_cpu
from expunge.erase_ops.training.families import Conditioning, StableDiffusion, family_of
from expunge.erase_ops.training.loop import Callback, TrainingLoop, make_accelerator
from expunge.erase_ops.training.sampling import noise_grid
from expunge.erase_ops.training.validation import Validation
from expunge.errors import InvalidInputError, UnsupportedOperationError

logger = logging.getLogger(__name__)

_WEAK_SCALE = 0.25


def train_spm(
    pipe: Any,
    config: SPMTrainingConfig,
    *,
    output_dir: str | Path | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> SPMAdapter:
    """Trains an SPM that makes a pipeline's denoiser forget.

    The pipeline is given back as it was: its layers, their flags and its text encoders' device.

    Args:
        pipe: a text-to-image pipeline of a Stable Diffusion 1.x, 2.x or SDXL model, where it is to be trained
            (`pipe.to("cuda")` first). It must not be erased.
        config: what to erase and how.
        output_dir: where the adapter, `checkpoint-*` folders, `validation/*.png` and `training_log.json` go; the
            config's if None. Without either nothing is written.
        progress: whether to show a progress bar.
        callback: called after every step with the number of steps done and `{"loss": ..., "erase": ..., "anchor": ...,
            "learning_rate": ...}`. An exception that it raises ends the training.

    Returns:
        The adapter, on the CPU, with its concepts and, if the config has benign prompts, its calibrated threshold.

    Raises:
        UnsupportedOperationError: if the model is of another family, is erased already, or bitsandbytes is missing.
        InvalidInputError: if the config does not fit the model, or needs an output folder that is not given.
        NonFiniteError: if a loss or a weight stops being finite.
        AdapterFormatError: if the checkpoint to resume from is damaged.
        AdapterMismatchError: if it belongs to another model or other settings.

    Example:
        config = SPMTrainingConfig.preset("sd15", prompts=[PromptPair("snoopy")])
        adapter = train_spm(pipe, config, output_dir="snoopy-spm")
    """
    folder = _output_folder(config, output_dir)
    family = family_of(pipe, clip_skip=config.clip_skip)
    _check_model(family, config)
    accelerator = make_accelerator(config, family.device)
    if accelerator.num_processes > 1:
        pipe.to(accelerator.device)  # each process on its own device
    adapter = new_adapter(family, config)
    text = EncodedText.of(family, config, progress=progress and accelerator.is_main_process)
    validation = Validation.of(family, config) if config.validation_steps else None
    with (
        deterministic(family.device),
        frozen(family.denoiser, config.gradient_checkpointing),
        text_encoders_on_cpu(family, config.offload_text_encoders),
    ):
        attachment = attach(family.denoiser, [adapter], trainable=True)
        try:
            method = SPMTraining(family, attachment, adapter, text, config)
            loop = TrainingLoop(method, config, accelerator, folder, progress, callback)
            if validation is not None and folder is not None and accelerator.is_main_process:
                loop.validate = lambda step: validation.draw(attachment, folder / "validation", step)
            history = loop.run()
        finally:
            detach(family.denoiser)
    adapter.factors = {
        path: Factors(factors.down.detach().cpu(), factors.up.detach().cpu(), factors.alpha)
        for path, factors in adapter.factors.items()
    }
    adapter.settings = recorded_settings(pipe, config) | {"final_losses": history[-1] if history else {}}
    if folder is not None and accelerator.is_main_process:
        adapter.save_pretrained(folder)
    return adapter


# --------------------------------------------------------------------------------------------------- one step's losses


@dataclass(frozen=True, eq=False)
class EncodedText:
    """Every prompt's conditioning, encoded once: one row a pair, and one an anchor prompt."""

    targets: Conditioning
    neutrals: Conditioning
    positives: Conditioning
    negatives: Conditioning
    anchors: Conditioning | None

    @classmethod
    def of(cls, family: StableDiffusion, config: SPMTrainingConfig, *, progress: bool = False) -> EncodedText:
        """Encodes the prompts of a config, each once."""
        targets = [pair.target for pair in config.prompts]
        neutrals = [pair.neutral for pair in config.prompts]
        positives = [pair.target if pair.positive is None else pair.positive for pair in config.prompts]
        anchors = list(config.anchor_prompts) if config.anchor_source == "prompts" and config.needs_anchors else []
        prompts = list(dict.fromkeys([*targets, *neutrals, *positives, *anchors]))
        encoded, row = family.encode(prompts, progress=progress), {prompt: row for row, prompt in enumerate(prompts)}

        def rows(texts: Sequence[str]) -> Conditioning:
            return encoded.rows([row[text] for text in texts])

        negatives = family.encode_negative([pair.unconditional for pair in config.prompts])
        return cls(rows(targets), rows(neutrals), rows(positives), negatives, rows(anchors) if anchors else None)


class SPMTraining:
    """The method that the training loop runs: an SPM's trained tensors and the losses of one batch.

    Args:
        family: the model; its denoiser carries the adapter.
        attachment: the adapter's attachment, whose gates are forced here.
        adapter: the adapter; its factors are trained in place.
        text: the encoded prompts.
        config: the settings.
    """

    def __init__(
        self,
        family: StableDiffusion,
        attachment: Attachment,
        adapter: SPMAdapter,
        text: EncodedText,
        config: SPMTrainingConfig,
    ) -> None:
        self.family, self.attachment, self.adapter, self.text, self.config = family, attachment, adapter, text, config
        self.guidance_scales = torch.tensor([config.guidance_scale_of(pair) for pair in config.prompts])  # [pairs]
        self.anchor_weights = torch.tensor([config.anchor_weight_of(pair) for pair in config.prompts])  # [pairs]
        grid = noise_grid(family.pipe.scheduler, config.max_denoising_steps)
        self.states = StateSampler(family, grid, text.targets, text.negatives, self._predict_rollout, config)
        self.anchors = AnchorSampler(
            text.targets,
            text.negatives,
            text.anchors,
            config.anchors_per_step,
            config.anchor_layout,
            config.anchor_unconditional,
        )

    def parameters(self) -> dict[str, Tensor]:
        """The factors: "SITE.down" and "SITE.up"."""
        return {
            f"{path}.{name}": tensor
            for path, factors in self.adapter.factors.items()
            for name, tensor in (("down", factors.down), ("up", factors.up))
        }

    def losses(self, generator: torch.Generator) -> dict[str, Tensor]:
        """The losses of one batch: "loss", and its parts "erase" and "anchor"."""
        state = self.draw_state(generator)
        weights = self.anchor_weights[state.pairs]
        anchors = self.anchors.draw(state.pairs, generator) if bool(weights.any()) else None
        return self.losses_at(state, anchors)

    def draw_state(self, generator: torch.Generator) -> TrainingState:
        """The next training state.

        A whole rollout shares the factors, so that they are merged into the weights once; unless memory is short, as
        gradient checkpointing says, since that takes a second copy of the weights.
        """
        with self.attachment.force(1.0, merge=not self.config.gradient_checkpointing):
            return self.states.draw(generator)

    def losses_at(self, state: TrainingState, anchors: Anchors | None) -> dict[str, Tensor]:
        """The losses for a given state and anchors: one forward of the frozen and one of the adapted denoiser."""
        rows, pairs, device = len(state.latents), state.pairs, state.latents.device
        targets = self.text.targets.rows(pairs)
        teacher_text = [self.text.neutrals.rows(pairs), self.text.positives.rows(pairs)]
        student_text, teacher_rows, student_rows = [targets], torch.arange(rows).repeat(2), torch.arange(rows)
        if anchors is not None:
            teacher_text.append(anchors.conditioning)
            student_text.append(anchors.conditioning)
            teacher_rows = torch.cat([teacher_rows, anchors.state_rows])  # [2B + A]
            student_rows = torch.cat([student_rows, anchors.state_rows])  # [B + A]
        with torch.no_grad():
            teacher = self._predict(0.0, state.rows(teacher_rows), Conditioning.cat(teacher_text))
        student = self._predict(1.0, state.rows(student_rows), Conditioning.cat(student_text))
        neutral, positive, anchor_teacher = teacher[:rows], teacher[rows : 2 * rows], teacher[2 * rows :]
        loss = spm_loss(
            student[:rows],
            erasing_target(neutral, positive, self.guidance_scales[pairs].to(device)),
            student[rows:],
            anchor_teacher,
            anchors.weights if anchors is not None else torch.zeros(0),
            self.anchor_weights[pairs],
        )
        return {"loss": loss.total, "erase": loss.erase, "anchor": loss.anchor}

    def _predict(self, gate: float, state: TrainingState, conditioning: Conditioning) -> Tensor:
        with self.attachment.force(gate):
            return self.family.predict(state.latents, state.timesteps, conditioning, state.size)

    def _predict_rollout(
        self, latents: Tensor, timesteps: Tensor, conditioning: Conditioning, size: Tensor | None
    ) -> Tensor:
        if self.config.rollout_gate_negative or self.config.rollout_guidance_scale == 1:
            return self.family.predict(latents, timesteps, conditioning, size)
        negative, positive = torch.zeros(len(latents) // 2, 1), torch.ones(len(latents) // 2, 1)
        with self.attachment.force(torch.cat([negative, positive])):  # [2B, 1]
            return self.family.predict(latents, timesteps, conditioning, size)

    def state_dict(self) -> dict[str, Tensor]:
        """The states of the current rollout that are still to come."""
        return self.states.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Restores what `state_dict` returned."""
        self.states.load_state_dict(tensors)


# ---------------------------------------------------------------------------------------- around the training


def _output_folder(config: SPMTrainingConfig, output_dir: str | Path | None) -> Path | None:
    chosen = output_dir if output_dir is not None else config.output_dir
    wants = [name for name in ("checkpointing_steps", "validation_steps") if getattr(config, name) is not None]
    if chosen is None and wants:
        raise InvalidInputError(
            "output_dir", expected=f"a folder, since {wants[0]} is set", found="None", fix="Pass output_dir."
        )
    if chosen is None:
        return None
    folder = Path(chosen).expanduser()
    check_target(folder, "spm")  # before the training, not after it
    return folder


def _check_model(family: StableDiffusion, config: SPMTrainingConfig) -> None:
    if attachment_of(family.denoiser) is not None:
        raise UnsupportedOperationError(
            "pipe", expected="a pipeline without erasures", found="an erased one", fix="Call restore(pipe) first."
        )
    if any(parameter.is_meta for parameter in family.denoiser.parameters()):
        raise UnsupportedOperationError(
            "pipe.unet",
            expected="weights in memory",
            found="weights kept elsewhere by sequential offloading",
            fix="Call pipe.remove_all_hooks() and pipe.to(device) before training.",
        )
    resolution = config.resolution or family.native_resolution
    sides: Sequence[int] = range(-(-resolution // 128) * 64, resolution + 1, 64)
    for side in sides if config.dynamic_resolution else [resolution]:
        family.latent_shape(side)
    if config.dynamic_resolution and (resolution < 128 or resolution % 64):
        raise InvalidInputError(
            "dynamic_resolution",
            expected="a resolution that is a multiple of 64 from 128 up",
            found=f"{resolution} (the model's own)",
            fix="Set resolution, or dynamic_resolution=False.",
        )
    if config.alpha / config.rank < _WEAK_SCALE:
        logger.warning(
            "alpha / rank is %.3g: the adapter learns slowly. Raise alpha with the rank.", config.alpha / config.rank
        )
