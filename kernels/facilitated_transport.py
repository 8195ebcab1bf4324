"""Facilitated Transport: how permeable each SPM is for each prompt.

Formula (SPM, arXiv 2312.16145, eq. 9): for a prompt p and an SPM i with concepts c,

    score_i(p) = max( max_c cos(vec H(p), vec H(c)),  max_c |T(p) ∩ T(c)| / |T(c)| )
    gate_i(p)  = score_i(p) if score_i(p) >= threshold_i else 0

with H the text states that the denoiser receives (padding included) and T the tokens; the token term is optional and
comes in ready-made. A score is never below 0. A concept may have the states of several phrasings. Text states that are
k times as long as the concepts' (long prompts, encoded in chunks) score as their best chunk.

Shapes:
    states          [B, k*L, D], any floating dtype
    concept_states  [M, L, D] float32: the reference states of all SPMs, one after another
    owner           [M] int64: which SPM (0..n-1) each of them belongs to
    token_overlap   [B, n] float32 or None
    threshold       [n] float32
    scores, gates   [B, n] float32

All arithmetic is float32. Every row is reduced by itself, so that a prompt's gate does not depend on its batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from expunge.errors import InvalidInputError


def concept_similarity_reference(states: Tensor, concept_states: Tensor, owner: Tensor, n: int) -> Tensor:
    """Largest cosine of each row's flattened text states with the reference states of each SPM, at least 0.

    Args:
        states: `[B, k*L, D]`.
        concept_states: `[M, L, D]` float32.
        owner: `[M]` int64.
        n: the number of SPMs.

    Returns:
        `[B, n]` float32. All-zero states have similarity 0.
    """
    length, width = concept_states.shape[1:]
    concepts = concept_states.flatten(1)  # [M, L*D]
    norms = torch.linalg.vector_norm(concepts, dim=1)  # [M]
    rows = []
    for row in states.float():  # one row at a time: a matrix product would round rows by their place in the batch
        chunks = row.view(-1, length * width)  # [k, L*D]
        cosines = [
            torch.mv(concepts, chunk)
            / (norms * torch.linalg.vector_norm(chunk)).clamp_min(torch.finfo(torch.float32).tiny)
            for chunk in chunks
        ]
        rows.append(torch.stack(cosines).amax(0))
    best = torch.stack(rows)  # [B, M]
    scores = best.new_zeros(best.shape[0], n)
    return scores.scatter_reduce_(1, owner.expand_as(best), best, "amax").clamp_max_(1.0)


def facilitated_transport_reference(
    scores: Tensor, token_overlap: Tensor | None, threshold: Tensor
) -> tuple[Tensor, Tensor]:
    """Joins the similarity with the token overlap and cuts off what lies below the threshold: (gates, scores)."""
    if token_overlap is not None:
        scores = torch.maximum(scores, token_overlap)
    return torch.where(scores >= threshold, scores, 0.0), scores


def concept_similarity(states: Tensor, concept_states: Tensor, owner: Tensor, n: int) -> Tensor:
    """The cosine term of the score; arguments, result and errors as in `facilitated_transport`."""
    length, width = concept_states.shape[1:]
    if states.ndim != 3 or states.shape[2] != width or states.shape[1] % length or 0 in states.shape:
        raise InvalidInputError(
            "text states",
            expected=f"[rows, k * {length}, {width}], as the concepts' states [{length}, {width}]",
            found=str(list(states.shape)),
            fix="Use the text encoder that the erasure was made with, or long prompts in whole chunks of its length.",
        )
    return concept_similarity_reference(states, concept_states, owner, n)


def facilitated_transport(
    states: Tensor,
    concept_states: Tensor,
    owner: Tensor,
    n: int,
    *,
    token_overlap: Tensor | None = None,
    threshold: Tensor,
) -> tuple[Tensor, Tensor]:
    """Gates of n SPMs for each row of text states.

    Args:
        states: `[B, k*L, D]`, the text states of each row.
        concept_states: `[M, L, D]` float32, the reference states of all SPMs.
        owner: `[M]` int64 on the same device, the SPM of each reference state.
        n: the number of SPMs.
        token_overlap: `[B, n]` float32 share of each SPM's tokens in the row's prompt; None where tokens are unknown.
        threshold: `[n]` float32; a score below it gives a gate of exactly 0.

    Returns:
        gates `[B, n]` float32, and the scores `[B, n]` float32 that they were cut from.

    Raises:
        InvalidInputError: if the states have another width than the concepts', or a length that is no multiple.
    """
    similarity = concept_similarity(states, concept_states, owner, n)
    return facilitated_transport_reference(similarity, token_overlap, threshold)
