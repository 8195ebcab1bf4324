"""The block of a text encoder whose output is edited: a subclass of the block's own class, in its place.

It shares the very `_parameters`, `_modules` and hook tables of the block that it replaces, so that loading, casting,
offloading and LoRAs act on both, and it edits inside `forward`, so that transformers' own recording of hidden states
sees the edited ones. (A forward hook that is registered later would not be seen by it.) The autoencoder's rows are
non-persistent buffers: the state dict stays the base model's.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any, TypeAlias

from torch import Tensor, nn

from expunge.erase_ops.carrier import HOST_ATTRIBUTES, Group, KeepsDtype
from expunge.erase_ops.hookpoints import state_of, with_state
from expunge.erase_ops.itd.tokens import Tokens
from expunge.erase_ops.sae.rows import SAERows
from expunge.errors import ErasureLostError

if TYPE_CHECKING:
    from expunge.erase_ops.itd.banks import Bank
    from expunge.erase_ops.itd.editing import Editor, ItDRecord

PLAIN = "plain"  # what a call is in which nothing is edited
LOOK = "look"  # the same, of which the block's states are kept
Work: TypeAlias = "Tokens | str | None"


class Running(threading.local):
    """What the block does in this thread's call of its encoder, set at the encoder's entry; None outside of one."""

    work: Work = None
    full: tuple[Tensor, Tokens] | None = None  # states [B, L', d] of the prompts padded in full, and their tokens
    seen: Tensor | None = None  # what a call of `LOOK` has kept
    record: ItDRecord | None = None

    def __reduce__(self) -> tuple[type[Running], tuple[()]]:
        return Running, ()


class ItDBlock(KeepsDtype):
    """What is added to a block's class; see the module's docstring.

    Attributes:
        group: the attachment that it belongs to.
        running: of the same.
        path: its plain module path.
        editor: what it does with hidden states.
    """

    group: Group
    running: Running
    path: str
    editor: Editor

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The block's own output, with edited hidden states where prompts are flagged; else the very same object.

        Raises:
            ErasureLostError: if the block is reached without its encoder's entry.
        """
        output = super().forward(*args, **kwargs)
        work = self.running.work
        if work is None:
            raise ErasureLostError(
                self.path,
                expected="a call of the text encoder that this block was attached to",
                found="one that did not come through its entry",
                fix="Call the text encoder itself, not its parts; after moving blocks into another model, erase that.",
            )
        if not isinstance(work, Tokens):
            if work == LOOK:
                self.running.seen = state_of(output)
            return output
        state = state_of(output)
        edited, self.running.record = self.editor.edit(self, state, work, self.running.full)
        return output if edited is state else with_state(output, edited)

    def rows(self, index: int, bank: Bank, like: Tensor) -> tuple[SAERows, Tensor | None]:
        """The rows of a bank on the device of some hidden states, and the features of its certificate."""
        names = ("ids", "W_enc", "b_enc", "W_dec", "b_dec", "threshold", "hot")
        found = {name: self._buffers.get(f"erasure_{index}_{name}") for name in names}
        moved: dict[str, Any] = {
            name: None if tensor is None else tensor if tensor.device == like.device else tensor.to(like.device)
            for name, tensor in found.items()
        }
        hot = moved.pop("hot")
        return SAERows(bank.config, **moved), hot

    def __reduce__(self) -> Any:
        # The class that was made has no name that pickle could import; the block's own class has.
        return new_block, (type(self).__bases__[1],), self.__dict__


_CLASSES: dict[type[nn.Module], type[ItDBlock]] = {}


def block_class(base: type[nn.Module]) -> type[ItDBlock]:
    """The subclass for a block's class, made once."""
    if base not in _CLASSES:
        made = type(f"Erased{base.__name__}", (ItDBlock, base), {"__doc__": ItDBlock.__doc__, "__module__": __name__})
        # transformers wraps the `forward` of each subclass in gradient checkpointing, which would run the edit a second
        # time, outside of the encoder's call. Without the wrapper the block keeps its activations.
        made.forward = ItDBlock.forward  # type: ignore[attr-defined]
        _CLASSES[base] = made
    return _CLASSES[base]


def new_block(base: type[nn.Module]) -> ItDBlock:
    """An empty block of the subclass, for pickle and copies."""
    kind = block_class(base)
    return kind.__new__(kind)


def make_block(
    base: nn.Module, group: Group, running: Running, path: str, editor: Editor, tensors: list[dict[str, Tensor]]
) -> ItDBlock:
    """A block that shares what another one has; that one is not changed.

    Args:
        base: the block of the base model.
        group, running, path, editor: see `ItDBlock`.
        tensors: of each bank, by name.
    """
    block = new_block(type(base))
    for name, value in base.__dict__.items():
        if name not in HOST_ATTRIBUTES:
            block.__dict__[name] = value  # _parameters, _modules and the hook tables are shared, not copied
    block.__dict__["_buffers"] = dict(base._buffers)
    block.__dict__["_non_persistent_buffers_set"] = set(base._non_persistent_buffers_set)
    block.group, block.running, block.path, block.editor = group, running, path, editor
    for index, of_bank in enumerate(tensors):
        for name, tensor in of_bank.items():
            block.register_buffer(f"erasure_{index}_{name}", tensor, persistent=False)
    return block
