"""ItD erasures in a pipeline: whether they belong to it, which of its prompts are edited, and what the report says.

A pipeline encodes prompts and negative prompts in one method. Here it is called for each of them alone, so that
negative prompts are left as they are: taking "nudity" out of a negative prompt would weaken it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from expunge.erase_ops.fingerprint import same_weights
from expunge.erase_ops.hookpoints import block_count
from expunge.erase_ops.itd.adapter import ItDAdapter
from expunge.erase_ops.itd.attach import ItDAttachment
from expunge.erase_ops.itd.attach import prepare as prepare_encoder
from expunge.erase_ops.itd.editing import ItDRecord, Settings
from expunge.erase_ops.sites import unwrap
from expunge.erase_ops.unedited import unedited
from expunge.errors import AdapterMismatchError, UnsupportedOperationError
from expunge.pipelines.conditioning import PipelineFamily, check_weights, component_fingerprint
from expunge.pipelines.report import Detection, ErasureRow, Seen, ThresholdSource

if TYPE_CHECKING:
    from expunge.pipelines.call import RunningCall

ARGUMENTS = ("multiplier", "gate", "score_threshold", "strength", "edit_negative", "mode", "allow_embeddings")
_ONE = {"do_classifier_free_guidance": False, "num_images_per_prompt": 1}


def prepare(
    pipe: Any, family: PipelineFamily, component: str, adapters: Sequence[ItDAdapter], settings: Mapping[str, Any]
) -> Callable[[], ItDAttachment]:
    """See `PipelineKind.prepare`; raises what `erase` says of ItD."""
    if component not in family.text_encoders:
        raise AdapterMismatchError(
            f"adapter {adapters[0].name!r}",
            expected=f"a text encoder of {type(pipe).__name__}: {', '.join(family.text_encoders)}",
            found=component,
            fix="Use an erasure that was made for this kind of model.",
        )
    encoder = getattr(pipe, component)
    own = Settings(**{name: settings[name] for name in ARGUMENTS} | {"multiplier": tuple(settings["multiplier"])})
    found = component_fingerprint(pipe, family, component)
    fitted = [_fit(adapter, component, found, allow_mismatch=settings["allow_mismatch"]) for adapter in adapters]
    _check_reach(family, component, encoder, fitted[0].layer, clip_skip=None)
    tokenizer = family.tokenizer_of(pipe, component)
    special = {name: getattr(tokenizer, name, None) for name in ("eos_token_id", "pad_token_id")}
    return prepare_encoder(encoder, fitted, own, **special)


def remember_weights(pipe: Any, family: PipelineFamily, attached: Mapping[str, ItDAttachment]) -> None:
    """Notes the text encoders' weights once everything is attached, to which each call is compared."""
    for component, attachment in attached.items():
        attachment.fingerprint = component_fingerprint(pipe, family, component)


def _fit(adapter: ItDAdapter, component: str, found: str | None, *, allow_mismatch: bool) -> ItDAdapter:
    """An adapter that is known to belong to a text encoder, and says so."""
    own = adapter.text_encoder_fingerprint
    if found is None or (own is not None and same_weights(own, found)):
        return adapter
    if own is not None and not allow_mismatch:
        raise AdapterMismatchError(
            f"adapter {adapter.name!r}",
            expected="the text encoder that its autoencoder was trained on",
            found=f"other weights or another tokenizer in {component}",
            fix="Use the base model that it was made for, or pass allow_mismatch=True: its features may then mean "
            "something else.",
        )
    config = adapter.rows.config.replace(fingerprint=found)
    return replace(adapter, rows=replace(adapter.rows, config=config))


def _check_reach(
    family: PipelineFamily, component: str, encoder: nn.Module, layer: int, *, clip_skip: int | None
) -> None:
    """Raises UnsupportedOperationError if what a block puts out does not reach the denoiser."""
    last = block_count(unwrap(encoder)) - 1 - family.unused - (clip_skip or 0)
    if layer > last:
        raise UnsupportedOperationError(
            f"{component}, block {layer}",
            expected=f"a block up to {last}, whose output the denoiser is conditioned on",
            found=f"block {layer}, which comes after it" + (f" under clip_skip={clip_skip}" if clip_skip else ""),
            fix="Use an autoencoder of an earlier block" + (", or a smaller clip_skip." if clip_skip else "."),
        )


def settings(attachment: ItDAttachment) -> dict[str, Any]:
    """The arguments of `erase` that an attachment was made with."""
    return {name: getattr(attachment.settings, name) for name in ARGUMENTS}


def rows(attachment: ItDAttachment, encoder: nn.Module | None) -> tuple[ErasureRow, ...]:
    """One row for each adapter; its one site is the block."""
    attached = encoder is None or attachment.carries(encoder)
    given, forced = attachment.settings.score_threshold, attachment.settings.gate is not None
    made = []
    editor, multipliers = attachment.editor, attachment.settings.multiplier
    numbers = zip(attachment.adapters, editor.thresholds, editor.strengths, multipliers, strict=True)
    for adapter, threshold, strength, multiplier in numbers:
        stored: ThresholdSource = "calibrated" if adapter.threshold is not None else "none stored"
        source: ThresholdSource = "constant gate" if forced else "given" if given is not None else stored
        row = ErasureRow(
            name=adapter.name,
            concepts=tuple(adapter.concepts),
            kind="itd",
            attached=int(attached),
            expected=1,
            threshold=None if forced else threshold,
            threshold_source=source,
            multiplier=multiplier,
            strength=strength,
        )
        made.append(row)
    return tuple(made)


# ------------------------------------------------------------------------------------------------------------- encoding


@dataclass(eq=False)
class Encoded:
    """What a pipeline's `encode_prompt` gave, and what was found on the way.

    Args:
        output: what it returns.
        records: by component, of each of its calls on the prompts.
        plain: `[P, L, D]`, the prompts' text states without any edit, if some were edited and this was asked for.
    """

    output: Any
    records: dict[str, list[ItDRecord]] = field(default_factory=dict)
    plain: Tensor | None = None


def encode_prompt(
    pipe: Any,
    original: Callable[..., Any],
    arguments: dict[str, Any],
    attached: Mapping[str, ItDAttachment],
    *,
    in_call: bool,
    want_plain: bool = False,
) -> Encoded:
    """A pipeline's `encode_prompt`, whose prompts are edited and whose negative prompts are not.

    Args:
        pipe: the pipeline.
        original: the method of its diffusers class.
        arguments: what it was called with, defaults included, without `self`.
        attached: what its text encoders carry, by component.
        in_call: whether an image is to be made of it, so that embeddings and skipped blocks matter.
        want_plain: whether the prompts' unedited states are wanted as well.

    Raises:
        UnsupportedOperationError: if there are embeddings in the place of prompts, or the edited block is skipped.
        ErasureLostError: if an encoder's weights have changed.
    """
    if not attached:
        return Encoded(original(pipe, **arguments))
    settings = next(iter(attached.values())).settings
    negative = nullcontext() if settings.edit_negative else unedited()
    if in_call:
        _check_call(pipe, arguments, attached, allow_embeddings=settings.allow_embeddings)
    if arguments["prompt_embeds"] is not None:
        with negative:
            return Encoded(original(pipe, **arguments))
    with ExitStack() as stack:
        records = {name: stack.enter_context(one.recording()) for name, one in attached.items()}
        positive = original(pipe, **arguments | _ONE)
    made = {"prompt_embeds": positive[0]}
    if "pooled_prompt_embeds" in arguments and arguments["pooled_prompt_embeds"] is None:
        made["pooled_prompt_embeds"] = positive[2]
    plain = None
    if want_plain and any(bool(record.flagged.any()) for found in records.values() for record in found):
        with unedited():
            plain = original(pipe, **arguments | _ONE)[0]
        plain = plain.repeat_interleave(arguments["num_images_per_prompt"] or 1, 0)
    with negative:
        return Encoded(original(pipe, **arguments | made), records, plain)


def _check_call(
    pipe: Any, arguments: dict[str, Any], attached: Mapping[str, ItDAttachment], *, allow_embeddings: bool
) -> None:
    if arguments["prompt_embeds"] is not None and not allow_embeddings:
        raise UnsupportedOperationError(
            "prompt_embeds",
            expected="prompts, which the classifier in the text encoder reads",
            found="embeddings, which it cannot look at",
            fix="Pass prompt=...; or erase with allow_embeddings=True and make them with this pipeline's "
            "encode_prompt, which edits them.",
        )
    for component, attachment in attached.items():
        encoder = getattr(pipe, component)
        if arguments["prompt_embeds"] is None:
            skip = arguments.get("clip_skip")
            _check_reach(pipe.family, component, encoder, attachment.adapters[0].layer, clip_skip=skip)
        check_weights(pipe, pipe.family, component, attachment.fingerprint)


# --------------------------------------------------------------------------------------------------------------- report


def seen(attachment: ItDAttachment, call: RunningCall, image: int) -> tuple[Seen, ...]:
    """What the classifier found in the prompt of one image."""
    prompt = image // call.images_per_prompt
    component = next(name for name, one in call.carried.of_kind("itd").items() if one is attachment)
    records = [record for record in call.records.get(component, []) if prompt < len(record.scores)]
    count = len(attachment.adapters)
    if not records:
        return tuple(Seen(0.0, "embeddings") for _ in range(count))
    return tuple(_seen(attachment, index, records, prompt) for index in range(count))


def _seen(attachment: ItDAttachment, index: int, records: Sequence[ItDRecord], prompt: int) -> Seen:
    """Of one adapter; a prompt that was encoded in several pieces counts by its highest score."""
    best = max(records, key=lambda record: float(record.scores[prompt, index]))
    flagged = any(bool(record.flagged[prompt, index]) for record in records)
    adapter, peaks = attachment.adapters[index], best.peaks[index][prompt]
    fired = peaks > 0
    ids = adapter.rows.ids.cpu()[fired].tolist()
    concepts = [name for name in adapter.concepts if flagged and bool(fired[adapter.places(name)].any())]
    forced = attachment.settings.gate is not None
    found = Detection(
        concepts=tuple(concepts),
        score=float(best.scores[prompt, index]),
        features=dict(zip(ids, peaks[fired].tolist(), strict=True)),
        certified=None if best.certified is None else float(best.certified[prompt]),
        untouched=float(best.untouched[prompt]),
    )
    return Seen(float(flagged), "off" if not flagged else "always" if forced else "score", found)
