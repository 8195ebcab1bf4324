"""`train_ear`: EAR on a Janus model, written as a delta of its language model."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from expunge.erase_ops.attach import attach, attachment_of, detach
from expunge.erase_ops.delta.adapter import DeltaAdapter
from expunge.erase_ops.delta.attach import delta_of
from expunge.erase_ops.ear.config import EARConfig
from expunge.erase_ops.ear.method import EARTraining
from expunge.erase_ops.ear.streams import EncodedPairs
from expunge.erase_ops.fingerprint import architecture_fingerprint
from expunge.erase_ops.janus.family import JanusFamily
from expunge.erase_ops.spm.adapter import SPMAdapter
from expunge.erase_ops.spm.concepts import Concept
from expunge.erase_ops.spm.untrained import new_factors
from expunge.erase_ops.training.borrowed import deterministic, frozen
from expunge.erase_ops.training.draws import seeded_generator
from expunge.erase_ops.training.loop import Callback, TrainingLoop, make_accelerator
from expunge.erase_ops.training.student import FactorStudent, ParameterStudent
from expunge.erase_ops.training.trainer import output_folder, recorded_settings
from expunge.errors import UnsupportedOperationError


def train_ear(
    pipe: Any,
    config: EARConfig,
    *,
    output_dir: str | Path | None = None,
    progress: bool = True,
    callback: Callback | None = None,
) -> DeltaAdapter:
    """Makes an autoregressive model forget; the model is given back as it was.

    Args:
        pipe: a `JanusPipeline`, or anything with a `model` and a `processor` of Janus, where it is to be trained. It
            must not be erased.
        config: what to erase and how. Its `max_train_steps` is set to the number of windows.
        output_dir: where the delta, `checkpoint-*` folders and `training_log.json` go; the config's if None. Without
            either nothing is written.
        progress: whether to show a progress bar.
        callback: called after every window with their number and `{"loss": ..., "erase": ..., "kept": ...,
            "skipped": ..., "learning_rate": ...}`; "loss" is missing where the window was skipped. An exception that it
            raises ends the training.

    Returns:
        The delta of the component "language_model", on the CPU.

    Raises:
        UnsupportedOperationError: if the model is no Janus, is erased already, or a setting asks for what is not there:
            several processes, gradient checkpointing, gradient accumulation beside the windows' own, validation
            pictures, another number of steps than there are windows.
        InvalidInputError: if the config does not fit the model.
        NonFiniteError: if a window's loss or a weight stops being finite.
        AdapterFormatError: if the checkpoint to resume from is damaged.
        AdapterMismatchError: if it belongs to another model or other settings.

    Example:
        config = EARConfig(prompts=load_pairs("train_church.json"), retain=["a castle", "a bridge"])
        delta = train_ear(pipe, config, output_dir="church-ear")
    """
    folder = output_folder(config, output_dir, "delta")
    family = JanusFamily(pipe.model, pipe.processor)
    sites = config.sites(family.language_model.config.num_hidden_layers)
    accelerator = make_accelerator(config, family.device)
    _check_supported(family, config, accelerator.num_processes)
    config = config.replace(max_train_steps=_windows(config, family.image_tokens))
    pairs = config.prompts
    originals, modified = [pair.original for pair in pairs], [pair.modified for pair in pairs]
    text = EncodedPairs.of(family, originals, modified, config.retain)
    with (
        deterministic(family.device),
        frozen(family.model, False),
        student_of(family, sites, config) as student,
    ):
        method = EARTraining(family, student, text, config)
        history = TrainingLoop(method, config, accelerator, folder, progress, callback).run()
        values = student.result() if isinstance(student, ParameterStudent) else {}
        lowrank = student.result() if isinstance(student, FactorStudent) else {}
    delta = DeltaAdapter(
        "ear",
        list(config.concept_texts),
        values=values,
        lowrank=lowrank,
        component="language_model",
        family="janus",
        base_fingerprint=architecture_fingerprint(family.language_model),
        settings=recorded_settings(pipe, config) | {"final_losses": history[-1] if history else {}},
        name=config.name,
    )
    delta.check_fits(family.language_model)
    delta.base_weights = delta.fingerprint_of(family.language_model)
    if folder is not None and accelerator.is_main_process:
        delta.save_pretrained(folder)
    return delta


@contextmanager
def student_of(
    family: JanusFamily, sites: tuple[str, ...], config: EARConfig
) -> Iterator[FactorStudent | ParameterStudent]:
    """What a config trains, in place in the language model; afterwards the model is as it was."""
    module: nn.Module = family.language_model
    if config.student == "selected":
        pattern = "^(" + "|".join(map(re.escape, sites)) + r")\."
        with ParameterStudent.of(module, pattern).installed() as selected:
            yield selected
        return
    generator = seeded_generator(config.seed, 0)
    layers: dict[str, Any] = {path: module.get_submodule(path) for path in sites}
    factors = {path: new_factors(layer, config.rank, config.alpha, generator) for path, layer in layers.items()}
    concepts = [Concept(text) for text in config.concept_texts]
    carried = SPMAdapter(factors, concepts, name="student")
    try:
        yield FactorStudent(attach(module, [carried], gate=1.0, trainable=True), factors)
    finally:
        detach(module)


def _check_supported(family: JanusFamily, config: EARConfig, processes: int) -> None:
    module = family.language_model
    problems = {
        "pipe": (attachment_of(module) or delta_of(module), "a model without erasures", "Call restore(pipe) first."),
        "gradient_checkpointing": (config.gradient_checkpointing, "False", "Use a smaller window or batch_size."),
        "gradient_accumulation_steps": (
            config.gradient_accumulation_steps if config.gradient_accumulation_steps > 1 else None,
            "1, because a window is what is accumulated",
            "Use a larger window, or more pairs at once by batch_size.",
        ),
        "validation_steps": (config.validation_steps, "None", "Draw with a JanusPipeline in a callback."),
        "processes": (processes > 1, "one process", "Start the training with one."),
    }
    for name, (found, expected, fix) in problems.items():
        if found:
            raise UnsupportedOperationError(name, expected=expected, found=str(found)[:80], fix=fix)


def _windows(config: EARConfig, image_tokens: int) -> int:
    """Steps of the whole training, which no one else may set: a shorter one would leave pairs out unsaid."""
    config.require("window", lambda value: value <= image_tokens, f"at most {image_tokens}, a picture's tokens")
    steps, default = config.steps(image_tokens), EARConfig.__dataclass_fields__["max_train_steps"].default
    if config.max_train_steps not in (steps, default):
        raise UnsupportedOperationError(
            "max_train_steps",
            expected=f"{steps}, one for each window of the pairs, which is set by itself",
            found=str(config.max_train_steps),
            fix="Leave it out; give fewer pairs, or set passes and window.",
        )
    return steps
