"""ItDAdapter: concepts as features of a sparse autoencoder, in memory and on disk."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from expunge.erase_ops.artefact import is_artefact, read_values
from expunge.erase_ops.formats.folders import check_name, slug
from expunge.erase_ops.formats.hub import upload_saved
from expunge.erase_ops.formats.source import resolve_source
from expunge.erase_ops.itd.classifier import (
    SCORES,
    Score,
    calibrate_scores,
    delta_scores,
    official_scores,
    prompts_digest,
)
from expunge.erase_ops.itd.concepts import concept_ids, hot_features, select_rows, union_of
from expunge.erase_ops.itd.features import encoded_prompts
from expunge.erase_ops.itd.files import SAESource, read_itd, write_itd
from expunge.erase_ops.itd.tokens import TOKEN_SETS, TokenSet, scored_tokens
from expunge.erase_ops.sae.model import SparseAutoencoder
from expunge.erase_ops.sae.rows import SAERows
from expunge.errors import AdapterFormatError, InvalidInputError

HOT = 4096  # features of the certificate: at this number most prompts without the concept are proved untouched


@dataclass(eq=False)
class ItDAdapter:
    """Concepts that are erased by switching off features of a sparse autoencoder in a text encoder.

    Args:
        rows: what is kept of the autoencoder: the features of all concepts, ascending.
        concept_features: of each concept, by its name, the ids of its features, ascending.
        threshold: the score from which on a prompt is flagged and edited; None: from any activation on.
        calibration: the record of how the threshold was set.
        strength: what erased activations are multiplied by in flagged prompts: 0 takes them out, -8 is ItD's.
        detection_strength: the same for the score alone; 0 gives the plain size of what is taken out.
        score: how tokens make a prompt's score, see `classifier`; "official" needs the whole autoencoder.
        tokens: which tokens make it: "own", the prompt's, or "all" but BOS of the prompt padded in full (CLIP only).
        hot: `[s]` int64, features that fire most often, which spare most tokens the whole encoder; None: no such set.
        sae: the whole autoencoder, which adding concepts, "official" scores and `mode="official"` need; None where
            only the erased rows were loaded.
        sae_source: the folder that the autoencoder was read from or saved to, for artefacts that refer to it.
        settings: how the features were found, in JSON's types.
        source: where the adapter was read from.
        name: a short name, safe as a folder's; made from the concepts if left empty.

    Raises:
        InvalidInputError: if there is no concept, features and rows do not belong together, or a number is out of
            range.
        UnsafePathError: if `name` is not safe.
    """

    kind: ClassVar[str] = "itd"

    rows: SAERows
    concept_features: dict[str, Tensor]
    threshold: float | None = None
    calibration: dict[str, Any] | None = None
    strength: float = 0.0
    detection_strength: float = 0.0
    score: Score = "max"
    tokens: TokenSet = "own"
    hot: Tensor | None = None
    sae: SparseAutoencoder | None = field(default=None, repr=False)
    sae_source: SAESource | None = None
    family: Literal["sd", "sdxl"] = "sd"
    settings: dict[str, Any] = field(default_factory=dict)
    source: Path | None = None
    name: str = ""

    def __post_init__(self) -> None:
        self.concept_features = {name: concept_ids(name, ids) for name, ids in self.concept_features.items()}
        _require(bool(self.concept_features), "concept_features", "at least one concept", "none")
        union = union_of(self.concept_features)
        same = union.shape == self.rows.ids.shape and torch.equal(union, self.rows.ids.cpu())
        _require(same, "rows", "rows of the concepts' features, ascending", f"{len(self.rows.ids)} for {len(union)}")
        _require(self.rows.config.layer is not None, "rows.config.layer", "the block that it reads", "None")
        _require(self.score in SCORES, "score", f"one of {', '.join(SCORES)}", repr(self.score))
        _require(self.tokens in TOKEN_SETS, "tokens", f"one of {', '.join(TOKEN_SETS)}", repr(self.tokens))
        _require(self.family in ("sd", "sdxl"), "family", "'sd' or 'sdxl'", repr(self.family))
        for name in ("strength", "detection_strength"):
            number = getattr(self, name)
            _require(math.isfinite(number) and number != 1, name, "a finite number other than 1", repr(number))
        limit = self.threshold
        in_range = limit is None or (math.isfinite(limit) and limit >= 0)
        _require(in_range, "threshold", "None or a finite number from 0", repr(limit))
        self.name = check_name(self.name or slug("-".join(self.concepts)), "ItDAdapter.name")

    # ------------------------------------------------------------------------------------------------------ what it is

    @classmethod
    def from_sae(
        cls, sae: SparseAutoencoder, concepts: Mapping[str, Tensor | Sequence[int]], *, hot: int = HOT, **fields: Any
    ) -> ItDAdapter:
        """An adapter of concepts whose features are known (`features.find_concepts` finds them).

        Args:
            sae: the autoencoder; its config says which component and block it belongs to.
            concepts: of each concept the ids of its features.
            hot: how many of the most active features the certificate uses, where the autoencoder knows how often they
                fire; 0: none.
            fields: of the adapter.

        Raises:
            InvalidInputError: as the class does.
        """
        features = {name: concept_ids(name, ids) for name, ids in concepts.items()}
        rows = sae.rows(union_of(features)) if features else sae.rows([])
        return cls(rows, features, hot=hot_features(sae, rows.ids, hot), sae=sae, **fields)

    @property
    def concepts(self) -> list[str]:
        """The texts of the erased concepts."""
        return list(self.concept_features)

    @property
    def component(self) -> str:
        """The pipeline's component whose hidden states are edited."""
        return self.rows.config.component

    @property
    def layer(self) -> int:
        """The block whose output is edited, counted from 0."""
        layer = self.rows.config.layer
        assert layer is not None  # checked when it was made
        return layer

    @property
    def text_encoder_fingerprint(self) -> str | None:
        """The weights of the text encoder that the autoencoder was trained on, if that is known."""
        return self.rows.config.fingerprint

    def facts(self) -> dict[str, Any]:
        """What it is, in JSON's types, for `expunge info`."""
        config = self.rows.config
        return {
            "family": self.family,
            "component": self.component,
            "layer": self.layer,
            "features": {name: len(ids) for name, ids in self.concept_features.items()},
            "distinct_features": len(self.rows.ids),
            "dictionary": config.width,
            "width": config.d_in,
            "activation": config.activation,
            "k": config.k,
            "encode_dtype": config.encode_dtype,
            "bytes": self.rows.nbytes,
            "threshold": self.threshold,
            "strength": self.strength,
            "detection_strength": self.detection_strength,
            "score": self.score,
            "tokens": self.tokens,
            "text_encoder_fingerprint": self.text_encoder_fingerprint,
            "calibration": self.calibration,
            "settings": self.settings,
        }

    # -------------------------------------------------------------------------------------------------------- concepts

    def add_concept(self, name: str, features: Tensor | Sequence[int]) -> None:
        """Adds a concept, or replaces the one of that name; nothing is trained. The threshold has to be set anew.

        Args:
            name: the concept.
            features: the ids of its features.

        Raises:
            InvalidInputError: if the whole autoencoder is not there, or an id is not one of its features.
        """
        self._change(self.concept_features | {name: concept_ids(name, features)})

    def remove_concept(self, name: str) -> None:
        """Removes a concept; features that others share stay. The threshold has to be set anew.

        Raises:
            InvalidInputError: if there is no such concept, or it is the only one.
        """
        known = ", ".join(self.concepts)
        _require(name in self.concept_features, "remove_concept", f"one of {known}", repr(name))
        _require(len(self.concept_features) > 1, "remove_concept", "another concept beside it", "the only one")
        self._change({other: ids for other, ids in self.concept_features.items() if other != name})

    def _change(self, concepts: dict[str, Tensor]) -> None:
        union = union_of(concepts)
        if self.sae is not None:
            self.rows = self.sae.rows(union)
            self.hot = None if self.hot is None else hot_features(self.sae, self.rows.ids, len(self.hot))
        else:
            missing = union[~torch.isin(union, self.rows.ids.cpu())].tolist()
            found = f"{len(missing)} features whose rows are not here, such as {missing[:1]}"
            expected = "features of the erased rows, or the whole autoencoder (from_pretrained(..., sae=...))"
            _require(not missing, "add_concept", expected, found)
            self.rows = select_rows(self.rows, torch.searchsorted(self.rows.ids.cpu(), union))
        self.concept_features = concepts
        self.threshold, self.calibration = None, None

    def places(self, name: str) -> Tensor:
        """Where a concept's features stand among `rows.ids`: `[m]` int64."""
        return torch.searchsorted(self.rows.ids.cpu(), self.concept_features[name])

    # ---------------------------------------------------------------------------------------------------------- scores

    @torch.no_grad()
    def scores(self, states: Tensor, own: Tensor, bos: Tensor | None = None) -> Tensor:
        """The score of each prompt, from hidden states that no erasure has edited.

        Args:
            states: `[B, L, d]`, the block's output.
            own: `[B, L]` bool, the tokens that make the score: of tokens="own" neither BOS nor padding; of "all"
                everything but BOS, and L is the encoder's full length.
            bos: `[B, L]` bool, BOS, which the "official" score counts; None: there is none.

        Returns:
            `[B]` float32.

        Raises:
            InvalidInputError: if shapes do not fit, or the score needs the whole autoencoder.
        """
        return self._scores(self.rows.to(states.device), states, own, bos)

    def _scores(self, rows: SAERows, states: Tensor, own: Tensor, bos: Tensor | None) -> Tensor:
        """`scores`, of rows that are on the device of the states."""
        if self.score == "official":
            sae, bos = self.whole(states.device), torch.zeros_like(own) if bos is None else bos
            return official_scores(sae, states, rows.ids, own, bos, self.detection_strength)
        acts = rows.membership(states, own)
        return delta_scores(acts, rows.W_dec, own, self.detection_strength, self.score)

    def whole(self, device: torch.device) -> SparseAutoencoder:
        """The whole autoencoder on a device.

        Raises:
            InvalidInputError: if only the erased rows are here.
        """
        if self.sae is None:
            raise InvalidInputError(
                f"adapter {self.name!r}",
                expected="the whole autoencoder",
                found="the erased features' rows alone",
                fix="Load it with ItDAdapter.from_pretrained(..., sae=...), where sae is the autoencoder's folder.",
            )
        return self.sae.to(device)

    @torch.no_grad()
    def prompt_scores(
        self, text_encoder: Any, tokenizer: Any, prompts: Sequence[str], *, attention_mask: bool = False
    ) -> Tensor:
        """The scores `[K]` of K prompts, on the CPU; arguments as in `features.prompt_features`."""
        rows, parts = self.rows, [torch.zeros(0)]
        encoder = (text_encoder, tokenizer, prompts, self.layer)
        for states, own, bos in encoded_prompts(*encoder, attention_mask=attention_mask):
            rows = rows if rows.ids.device == states.device else rows.to(states.device)  # moved once
            parts.append(self._scores(rows, states, scored_tokens(own, bos, self.tokens), bos).cpu())
        return torch.cat(parts)

    def calibrate(
        self,
        benign: Sequence[str],
        *,
        text_encoder: Any,
        tokenizer: Any,
        target_fpr: float = 0.01,
        target: Sequence[str] | None = None,
        attention_mask: bool = False,
    ) -> float:
        """Sets the threshold on benign prompts that were used for nothing else, and records how.

        Args:
            benign: prompts without the concepts.
            text_encoder, tokenizer, attention_mask: as in `features.prompt_features`.
            target_fpr: the share of the benign prompts that may still be flagged.
            target: prompts with the concepts, for the record's recall and AUC; they do not move the threshold.

        Returns:
            the threshold.

        Raises:
            InvalidInputError: if there is no benign prompt or the share is out of range.
            NonFiniteError: if the encoder gives NaN or infinity.
        """
        encoder = {"text_encoder": text_encoder, "tokenizer": tokenizer, "attention_mask": attention_mask}
        known = None if target is None else self.prompt_scores(prompts=target, **encoder)
        threshold, record = calibrate_scores(self.prompt_scores(prompts=benign, **encoder), target_fpr, known)
        record |= {"score": self.score, "tokens": self.tokens, "detection_strength": self.detection_strength}
        record |= {"benign_sha256": prompts_digest(benign)}
        self.threshold, self.calibration = threshold, record
        return threshold

    # --------------------------------------------------------------------------------------------- reading and writing

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo: str | Path,
        *,
        sae: SparseAutoencoder | str | Path | None = None,
        subfolder: str | None = None,
        revision: str | None = None,
        token: str | bool | None = None,
        cache_dir: str | Path | None = None,
        local_files_only: bool = False,
    ) -> ItDAdapter:
        """Reads an adapter that `save_pretrained` wrote.

        Args:
            path_or_repo: its folder, or owner/name of a repository on the Hub.
            sae: the whole autoencoder or its folder, for what needs it, and for artefacts that refer to one; None: the
                one that the artefact refers to, in the folder beside it, if it does.
            subfolder, revision, token, cache_dir, local_files_only: as of `SPMAdapter.from_pretrained`.

        Raises:
            AdapterFormatError: if the artefact is malformed, or the autoencoder is not the one it was made with.
            NonFiniteError: if a value is NaN or infinite.
            UnsafePathError: if a path leads out of the folder.
            InvalidInputError: if there is no such path or repository, or no autoencoder where one is needed.
        """
        hub: dict[str, Any] = {"revision": revision, "token": token, "cache_dir": cache_dir}
        hub["local_files_only"] = local_files_only
        folder, name = resolve_source(path_or_repo, subfolder=subfolder, **hub)
        if not is_artefact(folder):
            raise AdapterFormatError(
                str(folder),
                expected="the folder of an ItD artefact",
                found="a file" if folder.is_file() else "a folder without erasure.json",
                fix="Pass the folder that save_pretrained wrote.",
            )
        fields = read_itd(folder, sae)
        with read_values(folder, "Save the adapter again."):
            return cls(**fields, source=folder, name=name)

    def save_pretrained(self, folder: str | Path, *, overwrite: bool = True, embed: bool = True) -> Path:
        """Writes the artefact folder.

        Args:
            folder: created if absent; other files in it are left alone.
            overwrite: whether an artefact of this kind that is already there may be replaced.
            embed: whether the autoencoder's encoder goes into the artefact, which makes it whole by itself; else it
                only refers to `sae_source`, by name and checksum, which has to stand beside the artefact's folder.

        Returns:
            The folder.

        Raises:
            InvalidInputError: if `folder` is a file or holds another kind of artefact or one that is to be kept, or
                there is nothing to refer to.
            NonFiniteError: if a weight is NaN or infinite.
        """
        _require(embed or self.sae_source is not None, "save_pretrained(embed=False)", "a sae_source", "None")
        target = Path(folder).expanduser()
        write_itd(self, target, embed=embed, overwrite=overwrite)
        return target

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        revision: str | None = None,
        commit_message: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Uploads the artefact, whole by itself, as one commit; arguments as of `SPMAdapter.push_to_hub`.

        Returns:
            The commit's address.

        Raises:
            InvalidInputError: if the Hub refuses.
        """
        return upload_saved(
            self.save_pretrained,
            self.name,
            repo_id,
            private=private,
            token=token,
            revision=revision,
            commit_message=commit_message or f"Upload ItD: {', '.join(self.concepts)}",
            create_pr=create_pr,
        )


def _require(condition: bool, argument: str, expected: str, found: str) -> None:
    if not condition:
        raise InvalidInputError(f"ItDAdapter.{argument}", expected=expected, found=found, fix="Correct the argument.")
