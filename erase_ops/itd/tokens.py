"""Which tokens of a prompt are scored and which are edited, from what the encoder is given.

| encoder | first token | a prompt's own tokens end with |
|---|---|---|
| CLIP | BOS: never edited, never scored | the first end-of-text token |
| T5 | part of the prompt | the first end-of-text token |
| BERT and its kin | [CLS]: as BOS | the last token of the attention mask |

All but BOS are edited: padding, which in CLIP is end-of-text again, attends to the prompt and carries it into the
image. Own tokens are scored, or all but BOS: there are encoders, the bundled model's among them, in which a short
prompt's own tokens hardly tell what it says and the padding does. Neither score depends on how far a prompt is padded:
the second is always that of the prompt padded to the encoder's full length, see `padded_in_full`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad as pad_last

from expunge.errors import InvalidInputError, UnsupportedOperationError

TokenSet = Literal["own", "all"]  # which tokens make a prompt's score: its own, or all but BOS
TOKEN_SETS: tuple[TokenSet, ...] = ("own", "all")
_LEGACY_EOS = 2  # what CLIP's configs said before transformers 4.30, wrongly: the token is the vocabulary's last


class Tokens(NamedTuple):
    """Of one call of an encoder.

    Args:
        own: `[B, L]` bool, the prompts' own tokens.
        edited: `[B, L]` bool, the tokens that may be edited.
        bos: `[B, L]` bool, the first token where it is no part of the prompt.
    """

    own: Tensor
    edited: Tensor
    bos: Tensor

    def scored(self, tokens: TokenSet) -> Tensor:
        """`[B, L]` bool, the tokens that make a score."""
        return scored_tokens(self.own, self.bos, tokens)


def scored_tokens(own: Tensor, bos: Tensor, tokens: TokenSet) -> Tensor:
    """`[B, L]` bool: the tokens that make a score, from which are prompts' own and which BOS."""
    return own if tokens == "own" else ~bos


@dataclass(frozen=True)
class TokenRule:
    """How one kind of encoder reads prompts.

    Args:
        bos: whether the first token is no part of the prompt.
        eos: whether a prompt ends with its first end-of-text token; else with the attention mask.
    """

    bos: bool
    eos: bool


# By the `model_type` of an encoder's config.
RULES: Mapping[str, TokenRule] = MappingProxyType(
    {
        "clip_text_model": TokenRule(bos=True, eos=True),
        "clip": TokenRule(bos=True, eos=True),
        "t5": TokenRule(bos=False, eos=True),
        "umt5": TokenRule(bos=False, eos=True),
        "bert": TokenRule(bos=True, eos=False),
        "roberta": TokenRule(bos=True, eos=False),
        "mpnet": TokenRule(bos=True, eos=False),
    }
)


def rule_of(config: Any) -> TokenRule:
    """The rule of an encoder's config.

    Raises:
        UnsupportedOperationError: if Expunge does not know the kind of encoder.
    """
    kind = str(getattr(config, "model_type", None))
    if kind not in RULES:
        raise UnsupportedOperationError(
            "text encoder",
            expected=f"a model_type of {', '.join(RULES)}",
            found=repr(kind),
            fix="Use a text encoder of one of these kinds.",
        )
    return RULES[kind]


def end_of_text(config: Any) -> int | None:
    """The id of the end-of-text token by an encoder's config; None where the rule does not need one."""
    if not rule_of(config).eos:
        return None
    eos = config.eos_token_id
    eos = eos[0] if isinstance(eos, list) else eos
    legacy = eos == _LEGACY_EOS and config.model_type.startswith("clip")
    return int(config.vocab_size - 1 if legacy else eos)


def full_length(config: Any) -> int | None:
    """How many tokens an encoder's prompts have when they are padded in full; None where there is no such number.

    Only CLIP has one, and only there the states of a prompt's tokens do not depend on the padding behind them.
    """
    return int(config.max_position_embeddings) if rule_of(config) == RULES["clip"] else None


def padded_in_full(input_ids: Tensor, attention_mask: Any, length: int, pad: int) -> tuple[Tensor, Tensor | None]:
    """Token ids `[B, L]`, or `[L]`, and their mask as they are when prompts are padded to a length L': `[B, L']`."""
    ids = input_ids.reshape(-1, input_ids.shape[-1])  # [B, L]
    more = (0, max(0, length - ids.shape[1]))
    mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.shape == ids.shape else None
    return pad_last(ids, more, value=pad), None if mask is None else pad_last(mask, more, value=0)


def split_tokens(rule: TokenRule, eos: int | None, input_ids: Any, attention_mask: Any) -> Tokens:
    """The tokens of each row.

    Args:
        rule: of the encoder.
        eos: the id of the end-of-text token, where the rule needs one. A row without one is its own to the end.
        input_ids: `[B, L]` or `[L]`, as the encoder is given.
        attention_mask: `[B, L]`, if it is given one of that shape; what it hides is never scored.

    Raises:
        InvalidInputError: if there are no token ids, or the rule needs a mask and there is none.
    """
    if not isinstance(input_ids, Tensor) or input_ids.ndim not in (1, 2):
        found = list(input_ids.shape) if isinstance(input_ids, Tensor) else type(input_ids).__name__
        raise InvalidInputError(
            "input_ids",
            expected="token ids [B, L], which tell where a prompt ends",
            found=str(found),
            fix="Call the text encoder with input_ids, not with embeddings; expunge.erase_ops.unedited skips erasing.",
        )
    ids = input_ids.reshape(-1, input_ids.shape[-1])  # [B, L]
    place = torch.arange(ids.shape[1], device=ids.device)
    bos = ((place == 0) & rule.bos).expand(ids.shape)
    mask = attention_mask if isinstance(attention_mask, Tensor) and attention_mask.shape == ids.shape else None
    if rule.eos:
        ends = ids.eq(eos if eos is not None else -1).long()
        own = ends.cumsum(1) - ends == 0  # no end comes before the token
    elif mask is None:
        raise InvalidInputError(
            "attention_mask",
            expected=f"[{ids.shape[0]}, {ids.shape[1]}], which tells where a prompt ends",
            found="none" if attention_mask is None else str(list(attention_mask.shape)),
            fix="Pass the tokenizer's attention_mask to the text encoder.",
        )
    else:
        own = torch.ones_like(bos)
    if mask is not None:
        own = own & (mask != 0)
    return Tokens(own & ~bos, ~bos, bos)
