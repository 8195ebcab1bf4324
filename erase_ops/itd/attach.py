"""Attaching ItD erasures to a text encoder and taking them off again; the encoder's entry.

`ItDAttachment` is the forward pre-hook and the forward hook of its encoder, and so travels with it through deepcopy,
pickle and every pipeline that shares it. Before each call it tells the block which tokens are which; after the call,
or an exception in it, nothing of it stays.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from expunge.erase_ops.carrier import Group, move_host_hooks
from expunge.erase_ops.hookpoints import block_path
from expunge.erase_ops.itd.banks import make_banks
from expunge.erase_ops.itd.block import LOOK, PLAIN, ItDBlock, Running, make_block
from expunge.erase_ops.itd.editing import MODES, Editor, ItDRecord, Mode, Settings
from expunge.erase_ops.itd.tokens import (
    Tokens,
    end_of_text,
    full_length,
    padded_in_full,
    rule_of,
    split_tokens,
)
from expunge.erase_ops.sites import holder, resolve, unwrap
from expunge.erase_ops.unedited import is_unedited
from expunge.errors import AdapterMismatchError, ErasureLostError, InvalidInputError, UnsupportedOperationError

if TYPE_CHECKING:
    from expunge.erase_ops.itd.adapter import ItDAdapter
    from expunge.erase_ops.kinds import Plan

# Of each attachment, the lists that its records go to; those of this thread or task.
_RECORDING: ContextVar[tuple[tuple[ItDAttachment, list[ItDRecord]], ...]] = ContextVar("expunge_itd", default=())


class ItDAttachment:
    """ItD erasures attached to one text encoder; made by `attach`.

    Attributes:
        adapters: the attached adapters, N of them, all of one block.
        settings: how they were attached.
        editor: what the block does.
        block: the block in its place.
        original: the block of the base model.
        last: the record of the latest call of any thread that edited or looked; None before the first.
        fingerprint: of the encoder's weights when it was attached by a pipeline, else None.
        plan: see `expunge.erase_ops.kinds.Attached`.
    """

    plan: Plan = ()
    fingerprint: str | None = None

    def __init__(
        self,
        encoder: nn.Module,
        editor: Editor,
        block: ItDBlock,
        original: nn.Module,
        eos: int | None,
        pad: int | None,
    ) -> None:
        self.adapters, self.settings, self.editor = editor.adapters, editor.settings, editor
        self.block, self.original, self.group, self.path = block, original, block.group, block.path
        self.last: ItDRecord | None = None
        config = getattr(encoder, "config", None)
        self._rule, self._eos, self._pad = rule_of(config), eos, pad
        every = any(adapter.tokens == "all" for adapter in self.adapters)
        self._length = full_length(config) if every else None  # that prompts are scored at; None: any
        self._running = block.running
        self._hooks: list[Any] = []

    def carries(self, encoder: nn.Module) -> bool:
        """Whether the block is in its place."""
        block = resolve(encoder, self.path)
        return isinstance(block, ItDBlock) and block.group is self.group

    def check(self, encoder: nn.Module) -> None:
        """Checks that the erasure is still in force.

        Raises:
            ErasureLostError: naming what was lost: the encoder's hooks, or the block.
        """
        plain = unwrap(encoder)
        if not (_is_hooked(plain._forward_pre_hooks, self) and _is_hooked(plain._forward_hooks, self)):
            raise _lost("the classifier's hooks on the text encoder", f"{type(plain).__name__} without them")
        if not self.carries(encoder):
            found = type(resolve(encoder, self.path)).__name__
            raise _lost(f"the block {self.path} that carries the erasure", f"a {found}")

    @contextmanager
    def recording(self) -> Iterator[list[ItDRecord]]:
        """Collects the records of this thread's calls inside the `with` block."""
        records: list[ItDRecord] = []
        token = _RECORDING.set((*_RECORDING.get(), (self, records)))
        try:
            yield records
        finally:
            _RECORDING.reset(token)

    # Hooks of the encoder

    def install(self, encoder: nn.Module) -> None:
        """Registers the hooks."""
        plain = unwrap(encoder)
        self._hooks = [
            plain.register_forward_pre_hook(self._before, with_kwargs=True),
            plain.register_forward_hook(self._after, with_kwargs=True, always_call=True),
        ]

    def uninstall(self) -> None:
        """Removes them again."""
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def _before(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._enter(encoder, args, kwargs)

    def _after(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        self._leave(output)

    # Their work depends on the data, which torch.compile cannot follow.
    @torch.compiler.disable
    def _enter(self, encoder: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        running = self._running
        if running.work == LOOK:
            return  # `_padded` is calling the encoder
        running.work, running.record, running.full = None, None, None
        self.check(encoder)
        if is_unedited():
            running.work = PLAIN
            return
        ids = kwargs.get("input_ids", args[0] if args else None)
        mask = kwargs.get("attention_mask", args[1] if len(args) > 1 else None)
        tokens = split_tokens(self._rule, self._eos, ids, mask)
        if self._length is not None and tokens.own.shape[1] < self._length:
            running.full = self._padded(encoder, ids, mask)
        running.work = tokens

    def _padded(self, encoder: nn.Module, ids: Any, mask: Any) -> tuple[torch.Tensor, Tokens]:
        """The block's unedited states of a call's prompts padded in full, and their tokens."""
        assert self._length is not None and self._pad is not None
        ids, mask = padded_in_full(ids, mask, self._length, self._pad)
        running = self._running
        running.work = LOOK
        try:
            with torch.no_grad():
                encoder(input_ids=ids, attention_mask=mask)
            assert running.seen is not None
            return running.seen, split_tokens(self._rule, self._eos, ids, mask)
        finally:
            running.work, running.seen = None, None

    @torch.compiler.disable
    def _leave(self, output: Any) -> None:
        running = self._running
        if running.work == LOOK:
            return
        record, running.work, running.record, running.full = running.record, None, None, None
        if record is None or output is None:
            return  # nothing was looked at, or an exception is under way
        self.last = record
        for attachment, records in _RECORDING.get():
            if attachment is self:
                records.append(record)


def attach(
    encoder: nn.Module,
    adapters: Sequence[ItDAdapter],
    *,
    multiplier: float | Sequence[float] = 1.0,
    gate: float | None = None,
    score_threshold: float | None = None,
    strength: float | None = None,
    edit_negative: bool = False,
    mode: Mode = "delta",
    allow_embeddings: bool = False,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> ItDAttachment:
    """Attaches ItD erasures to a text encoder, in place. What was attached before is replaced.

    From now on each row of a call is scored and, if it is flagged, edited by its own tokens, negative prompts too:
    only a pipeline knows which rows are negative. Inside `erase_ops.unedited.unedited()` nothing is edited.

    Args:
        encoder: a text encoder of transformers, see `hookpoints` and `tokens`.
        adapters: the erasures; all of one block.
        multiplier: what the whole edit is multiplied by, of all adapters or of each.
        gate: 1.0 flags every prompt, 0.0 none; None: the score decides.
        score_threshold: for all adapters; None: each adapter's own, or 0.0, any activation, if it has none.
        strength: what erased activations are multiplied by in flagged prompts; None: each adapter's own.
        edit_negative: for pipelines: whether negative prompts are edited too.
        mode: "delta" takes the erased features out and leaves everything else as it is; "official" replaces flagged
            prompts by their edited reconstruction, as ItD's published code does (one adapter, with its whole
            autoencoder).
        allow_embeddings: for pipelines: whether embeddings are accepted, which nothing can look at.
        eos_token_id: of the tokenizer; None: as the encoder's config says.
        pad_token_id: of the tokenizer, for adapters that score all tokens; None: the end-of-text token, as of CLIP.

    Returns:
        the attachment.

    Raises:
        UnsupportedOperationError: if Expunge does not know the encoder, or the adapters are of several blocks.
        AdapterMismatchError: if the encoder has no such block, or another width.
        InvalidInputError: if an argument is out of range.
    """
    multipliers = tuple(multiplier) if isinstance(multiplier, Sequence) else (multiplier,) * len(adapters)
    settings = Settings(multipliers, gate, score_threshold, strength, edit_negative, mode, allow_embeddings)
    return prepare(encoder, adapters, settings, eos_token_id=eos_token_id, pad_token_id=pad_token_id)()


def prepare(
    encoder: nn.Module,
    adapters: Sequence[ItDAdapter],
    settings: Settings,
    *,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
) -> Callable[[], ItDAttachment]:
    """Everything that `attach` does but the change of the encoder, which the returned function makes.

    Arguments and errors as of `attach`.
    """
    plain = unwrap(encoder)
    _check_settings(adapters, settings)
    eos = end_of_text(getattr(plain, "config", None))
    eos = eos_token_id if eos is not None and eos_token_id is not None else eos
    path = _path(plain, adapters)
    banks = make_banks(adapters)
    editor = Editor(list(adapters), [bank for bank, _ in banks], settings)
    original = resolve(plain, path)
    previous = attachment_of(encoder)
    if isinstance(original, ItDBlock) and previous is not None:
        original = previous.original
    assert original is not None  # block_path has found it
    device = next((p.device for p in original.parameters() if not p.is_meta), torch.device("cpu"))
    tensors = [{name: tensor.to(device) for name, tensor in of_bank.items()} for _, of_bank in banks]
    block = make_block(original, Group(), Running(), path, editor, tensors)
    pad = eos if pad_token_id is None else pad_token_id
    attachment = ItDAttachment(plain, editor, block, original, eos, pad)

    def install() -> ItDAttachment:
        detach(encoder)
        parent, name = holder(plain, path)
        parent._modules[name] = block
        move_host_hooks(original, block)
        attachment.install(encoder)
        return attachment

    return install


def detach(encoder: nn.Module) -> None:
    """Takes the erasures off a text encoder, in place; does nothing if there are none.

    The block of the base model comes back with the parameters, hooks and mode that the edited one has by now.
    """
    attachment = attachment_of(encoder)
    if attachment is None:
        return
    attachment.uninstall()
    if resolve(encoder, attachment.path) is attachment.block:
        parent, name = holder(encoder, attachment.path)
        attachment.original.training = attachment.block.training
        parent._modules[name] = attachment.original
        move_host_hooks(attachment.block, attachment.original)


def attachment_of(encoder: nn.Module) -> ItDAttachment | None:
    """The attachment that a text encoder carries, or None."""
    owners = (getattr(hook, "__self__", None) for hook in unwrap(encoder)._forward_pre_hooks.values())
    return next((owner for owner in owners if isinstance(owner, ItDAttachment)), None)


def _check_settings(adapters: Sequence[ItDAdapter], settings: Settings) -> None:
    numbers = {"score_threshold": settings.score_threshold, "strength": settings.strength}
    numbers |= {f"multiplier[{index}]": number for index, number in enumerate(settings.multiplier)}
    bad = next((name for name, number in numbers.items() if number is not None and not math.isfinite(number)), None)
    official = settings.mode == "official"
    problems = [
        (not adapters, "adapters", "at least one adapter", "none"),
        (bad is not None, str(bad), "a finite number", "NaN or infinity"),
        (settings.gate not in (None, 0.0, 1.0), "gate", "None, 0.0 or 1.0 for ItD", repr(settings.gate)),
        ((settings.score_threshold or 0) < 0, "score_threshold", "0 or more", repr(settings.score_threshold)),
        (settings.strength == 1, "strength", "a number other than 1, which erases nothing", "1"),
        (settings.mode not in MODES, "mode", f"one of {', '.join(MODES)}", repr(settings.mode)),
        (
            len(settings.multiplier) != len(adapters),
            "multiplier",
            f"one number, or {len(adapters)}",
            f"{len(settings.multiplier)}",
        ),
        (
            official and settings.multiplier != (1.0,) * len(adapters),
            "multiplier",
            "1.0 under mode='official', which replaces states and adds nothing to them",
            f"{settings.multiplier}",
        ),
        (official and len(adapters) > 1, "mode", "one adapter, since each replaces the states", f"{len(adapters)}"),
    ]
    for wrong, subject, expected, found in problems:
        if wrong:
            raise InvalidInputError(subject, expected=expected, found=found, fix="Correct the argument.")
    for adapter in adapters:
        if official or adapter.score == "official":
            adapter.whole(torch.device("cpu"))


def _path(encoder: nn.Module, adapters: Sequence[ItDAdapter]) -> str:
    """The block of all adapters."""
    layers = sorted({adapter.layer for adapter in adapters})
    if len(layers) > 1:
        raise UnsupportedOperationError(
            "adapters",
            expected="one block, since a later one would score what an earlier one has edited",
            found=f"blocks {', '.join(map(str, layers))}",
            fix="Use adapters whose autoencoders belong to the same block.",
        )
    try:
        path = block_path(encoder, layers[0])
    except InvalidInputError as error:
        raise AdapterMismatchError(
            f"adapter {adapters[0].name!r}", expected=error.expected, found=f"block {layers[0]}", fix=error.fix
        ) from error
    config: Any = getattr(encoder, "config", None)
    width = getattr(config, "hidden_size", None)
    for adapter in adapters:
        if adapter.tokens == "all" and full_length(config) is None:
            raise UnsupportedOperationError(
                f"adapter {adapter.name!r}",
                expected="an encoder of CLIP for tokens='all', since its prompts have one full length",
                found=str(getattr(config, "model_type", None)),
                fix="Find features and set the threshold with tokens='own'.",
            )
        if adapter.rows.config.d_in != width:
            raise AdapterMismatchError(
                f"adapter {adapter.name!r}",
                expected=f"an autoencoder of width {width}, the text encoder's",
                found=str(adapter.rows.config.d_in),
                fix="Use the text encoder that it was made for.",
            )
    return path


def _is_hooked(hooks: Mapping[int, Any], attachment: ItDAttachment) -> bool:
    return any(getattr(hook, "__self__", None) is attachment for hook in hooks.values())


def _lost(expected: str, found: str) -> ErasureLostError:
    return ErasureLostError(
        "ItD erasure",
        expected=expected,
        found=found,
        fix="Undo the operation that replaced them, or erase the pipeline again.",
    )
