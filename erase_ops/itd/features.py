"""Which features of a sparse autoencoder tell a concept.

Formula (ItD, arXiv 2503.09446; the two shares are added here, and 0 gives its rule):

    top_n(prompt)  the n features whose largest activation over the prompt's tokens is largest, none that is 0
    F(concept)   = features in top_n of more than `target_share` of its prompts
                   - features in top_n of any prompt of the remaining concepts
                   - features in top_n of more than `benign_share` of the benign prompts

Several concepts are the union of their sets: no order, nothing trained again.

How to choose: ItD takes n = 128 of 64 active features a token and a dictionary of 2^19. With a smaller dictionary,
whatever happens to fire on one prompt of the concept and on none of the others comes along: features that tell the
prompt, not the concept, and that let the classifier fail on other phrasings. n near the autoencoder's k, a
`target_share` of a fifth to a third and a `benign_share` of one percent leave the features that tell the concept. The
bundled model's "cat" is one or two of 2,048.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.erase_ops.itd.tokens import TokenSet, scored_tokens
from expunge.erase_ops.sae.activations import hidden_states, tokenize
from expunge.erase_ops.unedited import unedited
from expunge.errors import InvalidInputError

if TYPE_CHECKING:
    from expunge.erase_ops.sae.model import SparseAutoencoder

TOP = 128  # ItD's n for people and nudity; it takes 256 for styles
BATCH = 64  # prompts encoded at a time


def top_features(sae: SparseAutoencoder, states: Tensor, own: Tensor, n: int = TOP) -> list[Tensor]:
    """The features that stand out in each prompt.

    Args:
        sae: the autoencoder.
        states: `[B, L, d]`, hidden states of B prompts.
        own: `[B, L]` bool, the tokens that count: not BOS, and padding only on purpose.
        n: how many of each prompt at most; a feature that is not active is never taken.

    Returns:
        B tensors of ids, int64, the most active first (of equal ones the smaller id).

    Raises:
        InvalidInputError: if shapes do not fit or n is not positive.
    """
    if states.ndim != 3 or own.shape != states.shape[:2] or n < 1:
        raise InvalidInputError(
            "top_features",
            expected="states [B, L, d], own [B, L] and n from 1",
            found=f"{list(states.shape)}, {list(own.shape)} and {n}",
            fix="Pass the hidden states of the prompts and a mask of their tokens.",
        )
    prompt = own.nonzero()[:, 0]  # [T], the prompt of each token
    values, ids = sae.encode(states[own])  # [T, k]
    active = values > 0
    keys = prompt[:, None] * sae.config.width + ids  # [T, k]: prompt and feature in one number
    pairs, place = keys[active].unique(return_inverse=True)
    peaks = values.new_zeros(len(pairs)).scatter_reduce_(0, place, values[active], "amax")
    order = peaks.argsort(descending=True, stable=True)  # of equal peaks the smaller key, so the smaller id
    order = order[pairs[order].div(sae.config.width, rounding_mode="floor").argsort(stable=True)]
    counts = torch.bincount(pairs.div(sae.config.width, rounding_mode="floor"), minlength=len(states))
    found = (pairs[order] % sae.config.width).split(counts.tolist())
    return [of_prompt[:n] for of_prompt in found]


def find_features(
    target: Iterable[Tensor],
    remain: Iterable[Tensor] = (),
    benign: Iterable[Tensor] = (),
    *,
    target_share: float = 0.0,
    benign_share: float = 0.0,
) -> Tensor:
    """The features that tell a concept, from the top features of prompts.

    Args:
        target: of each prompt with the concept, the ids of its top features.
        remain: of each prompt with a concept that is to remain.
        benign: of each prompt of any other kind.
        target_share: a feature is taken if a larger share of the target prompts has it among their top; 0: any.
        benign_share: how large a share of the benign prompts may have a feature among their top without its being
            taken out; 0: none.

    Returns:
        `[m]` int64, ascending; empty if nothing tells the concept from the rest.

    Raises:
        InvalidInputError: if there is no target prompt, or a share is outside 0 to 1.
    """
    targets, others = list(target), list(benign)
    if not targets or not 0.0 <= benign_share <= 1.0 or not 0.0 <= target_share < 1.0:
        raise InvalidInputError(
            "find_features",
            expected="at least one target prompt, a target_share from 0 to below 1, a benign_share from 0 to 1",
            found=f"{len(targets)}, {target_share} and {benign_share}",
            fix="Pass prompts that name the concept.",
        )
    taken, out = _in_more_than(target_share, targets), list(remain)
    if others:
        out.append(_in_more_than(benign_share, others))
    return taken[~torch.isin(taken, torch.cat(out))] if out else taken


def _in_more_than(share: float, prompts: Sequence[Tensor]) -> Tensor:
    """The ids, ascending, that more than a share of the prompts has."""
    ids, counts = torch.cat(list(prompts)).unique(return_counts=True)
    return ids[counts > share * len(prompts)]


@torch.no_grad()
def prompt_features(
    sae: SparseAutoencoder,
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    n: int | None = None,
    tokens: TokenSet = "own",
    attention_mask: bool = False,
) -> list[Tensor]:
    """`top_features` of prompts by a text encoder, at the block that the autoencoder belongs to.

    Args:
        sae: the autoencoder; its config names the block.
        text_encoder: the encoder; what it carries of erasures is out of force here.
        tokenizer: its tokenizer.
        prompts: the prompts.
        n: as in `top_features`; None: twice the autoencoder's k, as ItD's is, or 128 if it has none.
        tokens: which tokens of a prompt count, see `tokens`; the adapter has to score the same ones.
        attention_mask: whether the encoder is given the tokenizer's mask (BERT-like encoders need it).
    """
    found: list[Tensor] = []
    n = n if n is not None else 2 * sae.config.k if sae.config.k is not None else TOP
    encoder = (text_encoder, tokenizer, prompts, layer_of(sae))
    for states, own, bos in encoded_prompts(*encoder, attention_mask=attention_mask):
        counted = scored_tokens(own, bos, tokens)
        found += top_features(sae, states.to(sae.W_enc.device), counted.to(sae.W_enc.device), n)
    return found


def find_concepts(
    sae: SparseAutoencoder,
    text_encoder: Any,
    tokenizer: Any,
    concepts: Mapping[str, Sequence[str]],
    *,
    remain: Sequence[str] = (),
    benign: Sequence[str] = (),
    n: int | None = None,
    target_share: float = 0.0,
    benign_share: float = 0.0,
    tokens: TokenSet = "own",
    attention_mask: bool = False,
) -> dict[str, Tensor]:
    """The features of several concepts, each against the same remaining and benign prompts, which are encoded once.

    Args:
        sae, text_encoder, tokenizer, n, tokens, attention_mask: as in `prompt_features`.
        concepts: of each concept the prompts that name it.
        remain, benign, target_share, benign_share: prompts, and what `find_features` does with them.

    Returns:
        the ids of each concept, ascending.

    Raises:
        InvalidInputError: if a concept has no prompt, or nothing tells it from the rest; the message names it.
    """
    texts = [text for prompts in concepts.values() for text in prompts] + [*remain, *benign]
    encoder = (text_encoder, tokenizer)
    found = iter(prompt_features(sae, *encoder, texts, n=n, tokens=tokens, attention_mask=attention_mask))
    tops = {name: [next(found) for _ in prompts] for name, prompts in concepts.items()}
    kept, plain = [next(found) for _ in remain], [next(found) for _ in benign]
    features = {
        name: find_features(of_concept, kept, plain, target_share=target_share, benign_share=benign_share)
        for name, of_concept in tops.items()
    }
    empty = [name for name, ids in features.items() if len(ids) == 0]
    if empty:
        raise InvalidInputError(
            f"concept {empty[0]!r}",
            expected="at least one feature that the remaining and benign prompts do not have",
            found="none",
            fix="Take prompts that mean the concept out of those, raise benign_share, lower target_share, or train an "
            "autoencoder with fewer active features or a wider one.",
        )
    return features


def layer_of(sae: SparseAutoencoder) -> int:
    """The block whose output an autoencoder reads.

    Raises:
        InvalidInputError: if its file does not say.
    """
    if sae.config.layer is None:
        raise InvalidInputError(
            "sae.config.layer",
            expected="the block whose output the autoencoder was trained on",
            found="None",
            fix="Set it: sae.config = sae.config.replace(layer=...).",
        )
    return sae.config.layer


@torch.no_grad()
def encoded_prompts(
    text_encoder: Any, tokenizer: Any, prompts: Sequence[str], layer: int, *, attention_mask: bool = False
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Batches of the base model's hidden states `[B, L, d]`, each with two `[B, L]` bool: own tokens, and BOS."""
    for start in range(0, len(prompts), BATCH):
        batch = tokenize(tokenizer, prompts[start : start + BATCH], mask=attention_mask)
        with unedited():
            states = hidden_states(text_encoder, batch, layer)
        yield states, batch.text.to(states.device), batch.bos.to(states.device)
