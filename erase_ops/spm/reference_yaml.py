"""Reads the YAML files of the SPM reference implementation (Con6924/SPM): a config file and a list of prompts.

The result is a mapping of `SPMTrainingConfig` fields. Keys that the reference accepts but never uses are read and
reported in the log; a key that it does not know is an error.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expunge.erase_ops.training.config import read_yaml, refuse_unknown_keys
from expunge.errors import InvalidInputError

logger = logging.getLogger(__name__)

# Section of the config file -> its key -> our field; None: of no effect here (or, as noted, in the reference either).
_SECTIONS: dict[str, dict[str, str | None]] = {
    "pretrained_model": {
        "name_or_path": "pretrained_model_name_or_path",
        "v2": None,
        "v_pred": None,
        "clip_skip": None,
    },
    "network": {"rank": "rank", "alpha": "alpha"},
    "train": {
        "precision": "mixed_precision",
        "noise_scheduler": None,  # checked below
        "iterations": "max_train_steps",
        "batch_size": None,  # the prompt file's counts
        "lr": "learning_rate",
        "unet_lr": None,
        "text_encoder_lr": None,
        "optimizer_type": "optimizer",
        "optimizer_args": None,  # checked below
        "lr_scheduler": "lr_scheduler",
        "lr_warmup_steps": "lr_warmup_steps",
        "lr_scheduler_num_cycles": "lr_num_cycles",
        "lr_scheduler_power": None,
        "lr_scheduler_args": None,
        "max_grad_norm": "max_grad_norm",
        "max_denoising_steps": "max_denoising_steps",
    },
    "save": {"name": "name", "path": "output_dir", "per_steps": "checkpointing_steps", "precision": None},
    "logging": {
        "use_wandb": None,
        "run_name": None,
        "verbose": None,
        "interval": "validation_steps",
        "prompts": "validation_prompts",
        "negative_prompt": "validation_negative_prompt",
        "anchor_prompt": None,
        "width": None,
        "height": None,
        "num_inference_steps": "validation_inference_steps",
        "guidance_scale": "validation_guidance_scale",
        "seed": "validation_seed",  # of the images; the reference never seeds its training
        "generate_num": "num_validation_images",
        "eval_num": None,
    },
    "other": {"use_xformers": None},
}
_PRECISIONS = {"float32": "no", "fp32": "no", "float16": "fp16", "fp16": "fp16", "bfloat16": "bf16", "bf16": "bf16"}
_ACTIONS = ("erase", "erase_with_la")
_PROMPT_DEFAULTS: dict[str, Any] = {
    "positive": None,  # the target
    "unconditional": "",
    "neutral": None,  # the unconditional
    "action": "erase",
    "guidance_scale": 1.0,
    "resolution": 512,
    "dynamic_resolution": False,
    "batch_size": 1,
    "dynamic_crops": False,
    "use_template": False,  # of no effect in the reference
    "la_strength": 1000.0,
    "sampling_batch_size": 4,
    "seed": None,  # of no effect in the reference
    "case_number": 0,  # of no effect in the reference
}
# One value for the whole run: key of a prompt -> our field.
_SHARED = {
    "resolution": "resolution",
    "dynamic_resolution": "dynamic_resolution",
    "batch_size": "batch_size",
    "dynamic_crops": "dynamic_crops",
    "sampling_batch_size": "anchors_per_step",
}


def is_reference_document(document: Any) -> bool:
    """Whether a parsed YAML file is one of the reference's: a list of prompts, or a config with its sections."""
    if isinstance(document, Sequence) and not isinstance(document, str):
        return True
    return isinstance(document, Mapping) and ("prompts_file" in document or any(key in document for key in _SECTIONS))


def read_reference(document: Any, path: Path) -> dict[str, Any]:
    """The settings of a parsed reference file, as fields of `SPMTrainingConfig`.

    Args:
        document: the parsed YAML: a list of prompts, or a config that names its prompt file.
        path: where it was read from; a relative prompt file is looked for in the working directory, then beside it.

    Raises:
        InvalidInputError: if a key is unknown, the prompt file is missing, or a setting cannot be reproduced.
    """
    if not isinstance(document, Mapping):
        return _read_prompts(document, path)
    refuse_unknown_keys(str(path), document, ["prompts_file", "inference", *_SECTIONS])
    fields: dict[str, Any] = {}
    for section, names in _SECTIONS.items():
        values = document.get(section) or {}
        _require_mapping(values, f"{path}: {section}")
        refuse_unknown_keys(f"{path}: {section}", values, list(names))
        fields |= {name: values[key] for key, name in names.items() if name and values.get(key) is not None}
        unused = [key for key, value in values.items() if names[key] is None and value]
        if unused:
            logger.info("%s: %s of %s has no effect", path, ", ".join(unused), section)
    _translate_training(fields, document.get("train") or {}, path)
    if fields.get("validation_steps") and not fields.get("validation_prompts"):
        del fields["validation_steps"]  # the reference logs nothing without prompts
    prompts_path = _find_prompts(document.get("prompts_file"), path)
    return fields | _read_prompts(read_yaml(prompts_path), prompts_path)


def _translate_training(fields: dict[str, Any], train: Mapping[str, Any], path: Path) -> None:
    if "mixed_precision" in fields:
        fields["mixed_precision"] = _one_of(f"{path}: train.precision", fields["mixed_precision"], _PRECISIONS)
    optimizers = {"adamw": "adamw", "adamw8bit": "adamw8bit"}
    kind = str(fields.get("optimizer", "AdamW8bit")).lower()
    fields["optimizer"] = _one_of(f"{path}: train.optimizer_type", kind, optimizers)
    _one_of(f"{path}: train.noise_scheduler", train.get("noise_scheduler", "ddim"), {"ddim": "ddim"})
    if train.get("optimizer_args"):
        raise InvalidInputError(
            f"{path}: train.optimizer_args",
            expected="none",
            found=repr(train["optimizer_args"]),
            fix="Remove them and set adam_beta1, adam_beta2, adam_weight_decay or adam_epsilon instead.",
        )


def _find_prompts(name: Any, path: Path) -> Path:
    if isinstance(name, str):
        candidates = [Path(name), path.parent / name, path.parent / Path(name).name]
        for candidate in candidates:
            if candidate.is_file():
                return candidate
        found = f"no file at {', '.join(map(str, candidates))}"
    else:
        found = repr(name)
    raise InvalidInputError(
        f"{path}: prompts_file", expected="the prompt file", found=found, fix="Correct the path of the prompt file."
    )


def _read_prompts(entries: Any, path: Path) -> dict[str, Any]:
    """The pairs of a prompt file, and the settings that its entries share."""
    if not isinstance(entries, Sequence) or isinstance(entries, str) or not entries:
        raise InvalidInputError(
            str(path),
            expected="a list of prompts",
            found=repr(entries)[:80],
            fix="List at least one entry with a target.",
        )
    filled = []
    for index, entry in enumerate(entries):
        subject = f"{path}: entry {index + 1}"
        _require_mapping(entry, subject)
        refuse_unknown_keys(subject, entry, ["target", *_PROMPT_DEFAULTS])
        if "target" not in entry:
            raise InvalidInputError(subject, expected="target", found="none", fix="Name the prompt to erase.")
        values = _PROMPT_DEFAULTS | dict(entry)
        _one_of(f"{subject}: action", values["action"], dict.fromkeys(_ACTIONS))
        filled.append(values)
        if values["use_template"]:
            logger.info("%s: use_template has no effect, as in the reference", subject)
    fields: dict[str, Any] = {"prompts": [_pair(values) for values in filled], "anchor_layout": "official"}
    for key, field in _SHARED.items():
        different = sorted({str(values[key]) for values in filled})
        if len(different) > 1:
            raise InvalidInputError(
                f"{path}: {key}",
                expected="the same value in every entry",
                found=", ".join(different),
                fix="Train entries with different values in separate runs.",
            )
        fields[field] = filled[0][key]
    return fields


def _pair(values: Mapping[str, Any]) -> dict[str, Any]:
    neutral = values["unconditional"] if values["neutral"] is None else values["neutral"]
    return {
        "target": values["target"],
        "neutral": neutral,
        "positive": values["positive"],
        "unconditional": values["unconditional"],
        "guidance_scale": values["guidance_scale"],
        "anchor_weight": values["la_strength"] if values["action"] == "erase_with_la" else 0.0,
    }


def _one_of(subject: str, value: Any, known: Mapping[str, Any]) -> Any:
    if not isinstance(value, str) or value not in known:
        raise InvalidInputError(subject, expected=" or ".join(known), found=repr(value), fix="Use one of these.")
    return known[value]


def _require_mapping(value: Any, subject: str) -> None:
    if not isinstance(value, Mapping):
        raise InvalidInputError(
            subject, expected="a mapping of settings", found=repr(value)[:80], fix="Write `key: value` lines."
        )
