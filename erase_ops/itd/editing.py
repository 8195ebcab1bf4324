"""From a block's hidden states to the edited ones: score each prompt, and edit those that are flagged.

Everything is read from the states as they came: several adapters of one block do not edit what another has edited, and
a feature that two of them erase is taken out once. Decoding, scores and edits stand in float32; a prompt that is not
flagged keeps the bits of its states, and a call in which none is flagged returns the very tensor that it was given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from expunge.erase_ops.itd.classifier import delta_scores, is_flagged, official_edit, official_scores
from expunge.erase_ops.itd.tokens import Tokens
from expunge.erase_ops.sae.rows import SAERows
from expunge.errors import NonFiniteError
from expunge.kernels.sae_delta import sae_delta

if TYPE_CHECKING:
    from expunge.erase_ops.itd.adapter import ItDAdapter
    from expunge.erase_ops.itd.banks import Bank
    from expunge.erase_ops.itd.block import ItDBlock

Mode = Literal["delta", "official"]
MODES: tuple[Mode, ...] = ("delta", "official")


@dataclass(frozen=True)
class Settings:
    """How adapters are attached; the arguments of `attach`. `multiplier` is one number an adapter."""

    multiplier: tuple[float, ...]
    gate: float | None = None
    score_threshold: float | None = None
    strength: float | None = None
    edit_negative: bool = False
    mode: Mode = "delta"
    allow_embeddings: bool = False


@dataclass(frozen=True, eq=False)
class ItDRecord:
    """What one call of an encoder found, on the CPU; N adapters, B prompts.

    Args:
        scores: `[B, N]` float32.
        flagged: `[B, N]` bool: the prompts that were edited for each adapter.
        peaks: of each adapter, `[B, m_i]` float32: the largest activation of each of its features on scored tokens.
        certified: `[B]` float32, the share of scored tokens that the certificate proved untouched; None without one.
        untouched: `[B]` float32, the share of all tokens that keep their bits.
    """

    scores: Tensor
    flagged: Tensor
    peaks: tuple[Tensor, ...]
    certified: Tensor | None
    untouched: Tensor


@dataclass(frozen=True, eq=False)
class Found:
    """What the scored tokens fire of one bank."""

    rows: SAERows
    scored: Tensor  # [B, L] bool
    acts: Tensor  # [B, L, m] float32
    certified: Tensor | None  # [B, L] bool


Known: TypeAlias = tuple[Tensor, Tensor]  # of one bank: activations [B, L, m], 0 but where a token is [B, L] scored


@dataclass(eq=False)
class Editor:
    """What a block does with its hidden states.

    Args:
        adapters: the adapters, N of them.
        banks: their features, by autoencoder.
        settings: how they are attached.
    """

    adapters: list[ItDAdapter]
    banks: list[Bank]
    settings: Settings

    @torch.compiler.disable  # which prompts are flagged depends on the data
    def edit(
        self, block: ItDBlock, x: Tensor, tokens: Tokens, full: tuple[Tensor, Tokens] | None = None
    ) -> tuple[Tensor, ItDRecord]:
        """The states after erasing, and what was found; x itself if no prompt is flagged.

        Args:
            block: which has the banks' tensors.
            x: `[B, L, d]`, its states.
            tokens: of the call.
            full: where prompts are padded less than in full and an adapter scores all tokens, the states
                `[B, L', d]` and tokens of the prompts padded in full, which are scored instead.
        """
        tokens = on_device(tokens, x)
        looked, of_looked = (x, tokens) if full is None else (full[0], on_device(full[1], full[0]))
        with torch.no_grad():
            found = [self._look(block, index, bank, looked, of_looked) for index, bank in enumerate(self.banks)]
            scores, peaks = self._scores(found, looked, of_looked)
            flagged = self._flagged(scores)
        rows = flagged.any(1).nonzero()[:, 0]  # the one thing that a GPU is waited for
        if len(rows) == 0:
            return x, self._record(scores, flagged, peaks, found, x.new_ones(x.shape[0]))
        part = Tokens(*(mask[rows] for mask in tokens))
        edit = self._replaced if self.settings.mode == "official" else self._taken_out
        known = [(one.acts[rows, : x.shape[1]], one.scored[rows, : x.shape[1]]) for one in found]
        edited = edit(block, x[rows], part, flagged[rows], known)
        changed = (edited != x[rows]).any(-1).float().mean(1)
        untouched = torch.ones(len(x), device=x.device).index_copy(0, rows, 1 - changed.detach())
        out = edited if len(rows) == len(x) else x.index_copy(0, rows, edited)
        return out, self._record(scores, flagged, peaks, found, untouched)

    # Looking

    def _look(self, block: ItDBlock, index: int, bank: Bank, x: Tensor, tokens: Tokens) -> Found:
        rows, hot = block.rows(index, bank, x)
        every = any(self.adapters[adapter].tokens == "all" for adapter, _ in bank.members)
        scored = tokens.scored("all" if every else "own")
        if hot is None:
            return Found(rows, scored, rows.membership(x, scored), None)
        _, report = rows.erase(x, 1.0, scored, hot)  # a strength of 1 edits nothing
        return Found(rows, scored, report.acts, report.certified)

    def _scores(self, found: Sequence[Found], x: Tensor, tokens: Tokens) -> tuple[Tensor, list[Tensor]]:
        """`[B, N]`, and of each adapter `[B, m_i]`."""
        scores = x.new_zeros(len(x), len(self.adapters), dtype=torch.float32)
        peaks = [scores] * len(self.adapters)
        for bank, of_bank in zip(self.banks, found, strict=True):
            for index, places in bank.members:
                adapter, whole = self.adapters[index], len(places) == of_bank.acts.shape[-1]
                chosen = slice(None) if whole else places.to(x.device)
                acts, strength = of_bank.acts[..., chosen], adapter.detection_strength
                scored = tokens.scored(adapter.tokens)
                peaks[index] = (acts * scored[..., None]).amax(1)
                if adapter.score == "official":
                    features, sae = of_bank.rows.ids[chosen], adapter.whole(x.device)
                    scores[:, index] = official_scores(sae, x, features, scored, tokens.bos, strength)
                else:
                    w_dec = of_bank.rows.W_dec[chosen]
                    scores[:, index] = delta_scores(acts, w_dec, scored, strength, adapter.score)
        if not bool(scores.isfinite().all() & x.isfinite().all()):
            raise NonFiniteError(
                "hidden states",
                expected="finite numbers, and finite scores of them",
                found="NaN or infinity",
                fix="Look for an overflow in the text encoder (float16?).",
            )
        return scores, peaks

    def _flagged(self, scores: Tensor) -> Tensor:
        if self.settings.gate is not None:
            return torch.full_like(scores, bool(self.settings.gate), dtype=torch.bool)
        return is_flagged(scores, torch.tensor(self.thresholds, device=scores.device))

    @property
    def thresholds(self) -> list[float]:
        """From which score on each adapter flags a prompt; 0.0: from any activation on."""
        given = self.settings.score_threshold
        return [given if given is not None else adapter.threshold or 0.0 for adapter in self.adapters]

    @property
    def strengths(self) -> list[float]:
        """What each adapter multiplies erased activations by, before the multiplier of its whole edit."""
        given = self.settings.strength
        return [given if given is not None else adapter.strength for adapter in self.adapters]

    # Editing

    def _taken_out(self, block: ItDBlock, x: Tensor, tokens: Tokens, flagged: Tensor, known: Sequence[Known]) -> Tensor:
        """x' = x - Σ (1 - s) a d over the features of the adapters that flagged each prompt.

        `known` has the activations on scored tokens; where gradients are wanted they are made again.
        """
        out, again = x, torch.is_grad_enabled() and x.requires_grad
        for index, bank in enumerate(self.banks):
            rows, _ = block.rows(index, bank, x)
            members = [adapter for adapter, _ in bank.members]
            if not bool(flagged[:, members].any()):
                continue
            before, scored = known[index]
            acts = rows.membership(x, tokens.edited if again else tokens.edited & ~scored)
            acts = acts if again else acts + before
            amount = acts * self._weights(bank, flagged, acts)[:, None]  # [B, L, m]
            out = sae_delta(out, amount, rows.W_dec)
        return out

    def _weights(self, bank: Bank, flagged: Tensor, acts: Tensor) -> Tensor:
        """`[B, m]`: 1 - s, multiplied, of each feature in each prompt: the strongest of those that erase it there."""
        weights = acts.new_zeros(len(flagged), acts.shape[-1])
        for adapter, places in bank.members:
            own = self.settings.multiplier[adapter] * (1.0 - self.strengths[adapter])
            places = places.to(acts.device)
            before = weights[:, places]
            stronger = flagged[:, adapter, None] & (abs(own) > before.abs())
            weights[:, places] = torch.where(stronger, own, before)
        return weights

    def _replaced(self, block: ItDBlock, x: Tensor, tokens: Tokens, flagged: Tensor, known: Sequence[Known]) -> Tensor:
        """ItD's own edit: every token of a flagged prompt becomes its reconstruction, BOS too."""
        rows, _ = block.rows(0, self.banks[0], x)
        return official_edit(self.adapters[0].whole(x.device), x, rows.ids, tokens.edited, self.strengths[0])

    # Reporting

    def _record(
        self,
        scores: Tensor,
        flagged: Tensor,
        peaks: Sequence[Tensor],
        found: Sequence[Found],
        untouched: Tensor,
    ) -> ItDRecord:
        proofs = [one.certified for one in found if one.certified is not None]
        certified = None
        if len(proofs) == len(found):
            scored = torch.stack([one.scored for one in found]).any(0)  # [B, L]
            proved = torch.stack(proofs).all(0) & scored
            certified = (proved.sum(1) / scored.sum(1).clamp(min=1)).cpu()
        own = tuple(peak.cpu() for peak in peaks)
        return ItDRecord(scores.cpu(), flagged.cpu(), own, certified, untouched.float().cpu())


def on_device(tokens: Tokens, states: Tensor) -> Tokens:
    """The tokens of some hidden states `[B, L, d]`, on their device and of their shape."""
    return Tokens(*(mask.to(states.device).expand(states.shape[:2]) for mask in tokens))
