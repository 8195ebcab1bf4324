"""One erased concept of an adapter: its text, its text states and its tokens (what the gate compares a prompt with)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import InvalidInputError


@dataclass(eq=False)
class Concept:
    """One erased concept.

    Args:
        text: the concept, such as `"cat"`.
        states: `[K, L, D]` float32, the text states of the K phrasings as the denoiser receives them (of two encoders,
            as in SDXL, concatenated along D); None if no encoder has seen the concept yet.
        token_ids: the tokens that tell the concept: those of `text` without special tokens and without those that it
            shares with the adapter's neutral prompt; None if no tokenizer has seen it yet.
        all_token_ids: the tokens of `text` without special tokens only, as the SPM reference counts them.
        phrasings: the K prompts whose states are stored; `(text,)` if left empty.

    Raises:
        InvalidInputError: if the text is empty or `states` is not `[K, L, D]` float32 with K phrasings.
    """

    text: str
    states: Tensor | None = None
    token_ids: tuple[int, ...] | None = None
    all_token_ids: tuple[int, ...] | None = None
    phrasings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.text, str) or not self.text.strip():
            raise InvalidInputError(
                "Concept.text", expected="a text that is not empty", found=repr(self.text), fix="Name the concept."
            )
        self.phrasings = tuple(self.phrasings) or (self.text,)
        if self.states is None:
            return
        shape = list(self.states.shape)
        if self.states.ndim != 3 or 0 in shape or self.states.dtype != torch.float32 or shape[0] != len(self.phrasings):
            raise InvalidInputError(
                f"Concept({self.text!r}).states",
                expected=f"[{len(self.phrasings)}, L, D] float32, one row for each phrasing",
                found=f"{shape} {self.states.dtype}",
                fix="Pass the text states of the phrasings as the denoiser receives them.",
            )
