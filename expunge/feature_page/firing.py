"""On which prompts and tokens features of a sparse autoencoder fire."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from expunge.erase_ops.itd.tokens import TokenSet, scored_tokens
from expunge.erase_ops.sae.activations import TokenBatch, hidden_states, tokenize
from expunge.erase_ops.unedited import unedited
from expunge.errors import InvalidInputError

if TYPE_CHECKING:
    from expunge.erase_ops.sae.model import SparseAutoencoder
    from expunge.erase_ops.sae.rows import SAERows

BATCH = 64  # prompts encoded at a time
PADDING = "·"  # how a padding token is written


@dataclass(frozen=True)
class Example:
    """One prompt that a feature fires on.

    Args:
        prompt: its text.
        tokens: those looked at, as they are written; "·" is padding.
        acts: the feature's activation at each of them, 0 where it is not active.
    """

    prompt: str
    tokens: list[str]
    acts: list[float]

    @property
    def strongest(self) -> float:
        """The largest activation."""
        return max(self.acts, default=0.0)

    @property
    def peak(self) -> int:
        """The token that has it."""
        return self.acts.index(self.strongest)


@dataclass(frozen=True)
class FeatureReport:
    """What a feature does on a set of prompts.

    Args:
        feature: its id.
        share: of all own tokens, the share that it fires on.
        prompts: how many prompts it fires on.
        mean: its mean activation where it fires; 0 where it never does.
        strongest: its largest activation.
        top_tokens: the tokens that it fires on most often, with how often.
        examples: the prompts with its strongest activations, strongest first.
    """

    feature: int
    share: float
    prompts: int
    mean: float
    strongest: float
    top_tokens: list[tuple[str, int]]
    examples: list[Example]

    def to_dict(self) -> dict[str, Any]:
        """The report in JSON's types."""
        return asdict(self)


@torch.no_grad()
def examine(
    sae: SparseAutoencoder | SAERows,
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    features: Sequence[int],
    *,
    shown: int = 8,
    tokens: TokenSet = "own",
    attention_mask: bool = False,
) -> list[FeatureReport]:
    """Looks at features on prompts; only their own rows are decoded, no other feature's activation is kept.

    Args:
        sae: the autoencoder, or an artefact's rows of it, which have to hold the features.
        text_encoder: the encoder that it belongs to; erasures in it are out of force here.
        tokenizer: its tokenizer.
        prompts: at least one.
        features: distinct ids.
        shown: how many examples of each feature are kept at most.
        tokens: which tokens are looked at: the prompts' own, or all but BOS of the prompts padded in full.
        attention_mask: whether the encoder is given the tokenizer's mask.

    Returns:
        a report for each feature, in the order of `features`.

    Raises:
        InvalidInputError: if there is no prompt, or a feature is none of the autoencoder's or of the rows.
    """
    if not prompts:
        raise InvalidInputError("prompts", expected="at least one", found="none", fix="Pass prompts to look at.")
    layer = sae.config.layer
    if layer is None:
        raise InvalidInputError(
            "sae.config.layer", expected="the block that it reads", found="None", fix="Set it in the file's config."
        )
    names: list[list[str]] = []
    acts: list[Tensor] = []  # of each prompt [its tokens, m]
    for start in range(0, len(prompts), BATCH):
        batch = tokenize(tokenizer, prompts[start : start + BATCH], mask=attention_mask)
        with unedited():
            states = hidden_states(text_encoder, batch, layer)
        found = activations(sae, states, features).cpu()  # [B, L, m]
        looked = scored_tokens(batch.text, batch.bos, tokens)
        acts += [of_prompt[mask] for of_prompt, mask in zip(found, looked, strict=True)]
        names += written(tokenizer, batch, looked)
    return [
        report(feature, prompts, names, [of_prompt[:, column] for of_prompt in acts], shown)
        for column, feature in enumerate(features)
    ]


def activations(sae: SparseAutoencoder | SAERows, states: Tensor, features: Sequence[int]) -> Tensor:
    """The features' activations `[B, L, m]` at hidden states `[B, L, d]`."""
    from expunge.erase_ops.sae.model import SparseAutoencoder

    ids = torch.tensor(list(features), device=states.device)
    if isinstance(sae, SparseAutoencoder):
        return sae.membership(states, ids)
    rows = sae.to(states.device)
    missing = ids[~torch.isin(ids, rows.ids)].tolist()
    if missing:
        raise InvalidInputError(
            "features",
            expected="features that the artefact erases",
            found=f"{missing[0]}, whose rows are not in it",
            fix="Name others, or inspect the autoencoder itself.",
        )
    places = torch.searchsorted(rows.ids, ids)
    return rows.membership(states)[..., places]


def written(tokenizer: Any, batch: TokenBatch, looked: Tensor) -> list[list[str]]:
    """The tokens of each prompt that are looked at, `[B, L]` bool, as they are written; special ones by their names."""
    rows = []
    for ids, mask, padding in zip(batch.input_ids, looked, batch.padding, strict=True):
        pieces = tokenizer.convert_ids_to_tokens(ids[mask].tolist())
        plain = [piece.replace("</w>", "").replace("▁", "").removeprefix("##") for piece in pieces]
        rows.append([PADDING if hidden else piece for piece, hidden in zip(plain, padding[mask].tolist(), strict=True)])
    return rows


def report(
    feature: int, prompts: Sequence[str], tokens: Sequence[list[str]], acts: Sequence[Tensor], shown: int
) -> FeatureReport:
    """The report of one feature from its activations at each prompt's own tokens."""
    flat = torch.cat(list(acts))
    firing = flat[flat > 0]
    peaks = torch.stack([of_prompt.amax() if len(of_prompt) else flat.new_zeros(()) for of_prompt in acts])
    order = [index for index in peaks.argsort(descending=True, stable=True).tolist() if peaks[index] > 0]
    counts: dict[str, int] = {}
    for names, of_prompt in zip(tokens, acts, strict=True):
        for place in (of_prompt > 0).nonzero()[:, 0].tolist():
            counts[names[place]] = counts.get(names[place], 0) + 1
    return FeatureReport(
        feature=feature,
        share=len(firing) / max(1, len(flat)),
        prompts=len(order),
        mean=firing.mean().item() if len(firing) else 0.0,
        strongest=peaks.max().item(),
        top_tokens=sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:shown],
        examples=[Example(prompts[index], tokens[index], acts[index].tolist()) for index in order[:shown]],
    )
