"""One erased concept of an adapter: its text, its text states and its tokens (what the gate compares a prompt with)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from expunge.errors import InvalidInputError

MAX_TOKEN_ID = 2**31


def is_text(value: object) -> bool:
    """Whether a value is a text that can be written in UTF-8 (half a surrogate pair cannot)."""
    if not isinstance(value, str):
        return False
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


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
        InvalidInputError: if the text is empty, `states` is not `[K, L, D]` float32 with K phrasings, or a token id is
            not a whole number from 0.
    """

    text: str
    states: Tensor | None = None
    token_ids: tuple[int, ...] | None = None
    all_token_ids: tuple[int, ...] | None = None
    phrasings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        self.phrasings = tuple(self.phrasings) or (self.text,)
        texts = all(is_text(text) for text in (self.text, *self.phrasings)) and bool(self.text.strip())
        _require(texts, "a text that is not empty, and texts as phrasings", f"{self.text!r}, {self.phrasings[:3]!r}")
        for ids in (self.token_ids, self.all_token_ids):
            valid = ids is None or all(type(i) is int and 0 <= i < MAX_TOKEN_ID for i in ids)
            _require(valid, f"whole numbers from 0 as token ids of {self.text!r}", repr(ids)[:100])
        if self.states is not None:
            shape, count = list(self.states.shape), len(self.phrasings)
            valid = (
                self.states.ndim == 3 and 0 not in shape and shape[0] == count and self.states.dtype == torch.float32
            )
            expected = f"states [{count}, L, D] of {self.text!r} in float32, one row for each phrasing"
            _require(valid, expected, f"{shape} {self.states.dtype}")


def _require(condition: bool, expected: str, found: str) -> None:
    if not condition:
        fix = "Make it with erase_ops.gates.make_concept, or correct the argument."
        raise InvalidInputError("Concept", expected=expected, found=found, fix=fix)
