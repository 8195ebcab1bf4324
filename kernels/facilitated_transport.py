"""Facilitated Transport: how permeable each SPM is for each prompt.

Formula (SPM, arXiv 2312.16145, eq. 9): for a prompt p and an SPM i with concepts c,

    score_i(p) = max( max_c cos(vec H(p), vec H(c)),  max_c |T(p) ∩ T(c)| / |T(c)| )
    gate_i(p)  = score_i(p) if score_i(p) >= threshold_i else 0

with H the text states that the denoiser receives (padding included) and T the set of tokens; the token term is
optional. A score is never below 0. A concept may have the states of several phrasings. Text states that are k times as
long as the concepts' (long prompts, encoded in chunks) score as their best chunk.

Shapes:
    states          [B, k*L, D], any floating dtype
    concept_states  [M, L, D] float32: the reference states of all SPMs, one after another
    owner           [M] int64: which SPM (0..n-1) each of them belongs to
    threshold       [n] float32
    tokens          prompts [B, T], concepts [C, S] and their owner [C], int64: sets of token ids, filled up with -1
    gates, scores, overlap  [B, n] float32

All arithmetic is float32. Every row is reduced by itself, so that a prompt's gate does not depend on its batch. Gates
are constants for autograd. The token ids come in as tensors, made once for the concepts and by one copy for a call's
prompts: counting in Python would cost a loop over prompts and concepts before every call.

The torch reference below is the CPU path and the oracle of the tests; `gpu/facilitated_transport.py` has the kernels.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from expunge.errors import InvalidInputError
from expunge.kernels.dispatch import kernel_path

NO_TOKEN = -1  # fills up rows of token ids
COMPARISONS = 2**22  # tokens compared at a time by the reference


class TokenIds(NamedTuple):
    """Token sets of prompts `[B, T]` and concepts `[C, S]`, filled up with -1, and the SPM of each concept `[C]`."""

    prompts: Tensor
    concepts: Tensor
    owner: Tensor


class Permeability(NamedTuple):
    """Gates, the scores that they were cut from, and the token overlap (None without tokens), each `[B, n]` float32."""

    gates: Tensor
    scores: Tensor
    overlap: Tensor | None


def padded_ids(sets: Iterable[Iterable[int]]) -> Tensor:
    """Sets of token ids as a tensor `[number of sets, largest size, at least 1]` int64, filled up with -1."""
    rows = [sorted(set(one)) for one in sets]
    width = max([1, *map(len, rows)])
    filled = [[*row, *[NO_TOKEN] * (width - len(row))] for row in rows]
    return torch.tensor(filled, dtype=torch.int64).view(len(rows), width)


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
    chunks = states.float().reshape(-1, length * width)  # [B*k, L*D]
    if not len(chunks):
        return chunks.new_zeros(0, n)
    # One chunk at a time: a matrix product would round rows by their place in the batch.
    dots = torch.stack([torch.mv(concepts, chunk) for chunk in chunks])  # [B*k, M]
    lengths = torch.stack([torch.linalg.vector_norm(chunk) for chunk in chunks])[:, None]
    cosines = dots / (norms * lengths).clamp_min(torch.finfo(torch.float32).tiny)
    best = cosines.view(states.shape[0], -1, len(concepts)).amax(1) if len(chunks) > len(states) else cosines  # [B, M]
    return _largest(best, owner, n).clamp_max_(1.0)


def token_overlap_reference(tokens: TokenIds, n: int) -> Tensor:
    """The largest share of a concept's tokens that each prompt has, over the concepts of each SPM: `[B, n]` float32."""
    real, ids = tokens.concepts != NO_TOKEN, tokens.concepts[:, :, None]  # [C, S], [C, S, 1]
    step = max(1, COMPARISONS // max(1, real.numel() * tokens.prompts.shape[1]))
    hits = [((ids == some[:, None, None, :]).any(3) & real).sum(2) for some in tokens.prompts.split(step)]  # [step, C]
    return _largest(torch.cat(hits).float() / real.sum(1).clamp_min(1), tokens.owner, n)


def _largest(values: Tensor, owner: Tensor, n: int) -> Tensor:
    """The largest of `[B, M]` over the columns of each of n owners, at least 0: `[B, n]`."""
    largest = values.new_zeros(values.shape[0], n)
    return largest.scatter_reduce_(1, owner.expand_as(values), values, "amax")


def facilitated_transport_reference(
    states: Tensor, concept_states: Tensor, owner: Tensor, threshold: Tensor, tokens: TokenIds | None = None
) -> Permeability:
    """The formula, word for word."""
    scores = concept_similarity_reference(states, concept_states, owner, threshold.shape[0])
    overlap = None
    if tokens is not None:
        overlap = token_overlap_reference(tokens, threshold.shape[0])
        scores = torch.maximum(scores, overlap)
    return Permeability(torch.where(scores >= threshold, scores, 0.0), scores, overlap)


def concept_similarity(states: Tensor, concept_states: Tensor, owner: Tensor, n: int) -> Tensor:
    """The cosine term of the score, `[B, n]` float32; arguments and errors as in `facilitated_transport`."""
    zero = torch.zeros(n, dtype=torch.float32, device=states.device)
    return facilitated_transport(states, concept_states, owner, zero).scores


@torch.no_grad()
def facilitated_transport(
    states: Tensor, concept_states: Tensor, owner: Tensor, threshold: Tensor, tokens: TokenIds | None = None
) -> Permeability:
    """Gates of n SPMs for each row of text states; never waits for the device.

    Args:
        states: `[B, k*L, D]`, the text states of each row; finite.
        concept_states: `[M, L, D]` float32, the reference states of all SPMs.
        owner: `[M]` int64, the SPM of each reference state.
        threshold: `[n]` float32; a score below it gives a gate of exactly 0.
        tokens: the token sets of the rows' prompts and of the concepts; None where tokens are unknown. A row of -1
            alone has no tokens. All tensors are on one device.

    Returns:
        gates, scores and overlap; constants for autograd.

    Raises:
        InvalidInputError: if the states have another width than the concepts' or a length that is no multiple, or the
            other tensors have shapes or dtypes that do not belong to them.
    """
    check_states(states, concept_states)
    check_tables(states, concept_states, owner, threshold, tokens)
    path = kernel_path("facilitated_transport", states, concept_states)
    if path == "torch":
        return facilitated_transport_reference(states, concept_states, owner, threshold, tokens)
    from expunge.kernels.gpu import facilitated_transport as gpu

    run = gpu.launch_facilitated_transport if path == "triton" else gpu.facilitated_transport_op
    gates, scores, overlap = run(states, concept_states, owner, threshold, *(tokens or (None,) * 3)).unbind()
    return Permeability(gates, scores, None if tokens is None else overlap)


def check_states(states: Tensor, concept_states: Tensor) -> None:
    """Refuses text states of another encoder than the concepts'."""
    length, width = concept_states.shape[1:]
    if states.ndim != 3 or states.shape[2] != width or states.shape[1] % length or 0 in states.shape[1:]:
        raise InvalidInputError(
            "text states",
            expected=f"[rows, k * {length}, {width}], as the concepts' states [{length}, {width}]",
            found=str(list(states.shape)),
            fix="Use the text encoder that the erasure was made with, or long prompts in whole chunks of its length.",
        )


def check_tables(
    states: Tensor, concept_states: Tensor, owner: Tensor, threshold: Tensor, tokens: TokenIds | None
) -> None:
    """Refuses tables of SPMs that do not belong together."""
    batch, concepts = states.shape[0], concept_states.shape[0]
    wanted = {"owner": (owner, (concepts,), torch.int64), "threshold": (threshold, threshold.shape[:1], torch.float32)}
    wanted["concept_states"] = (concept_states, concept_states.shape, torch.float32)
    if tokens is not None:
        prompt_size, (size, length) = _matrix(tokens.prompts)[1], _matrix(tokens.concepts)
        wanted["tokens.prompts"] = (tokens.prompts, (batch, prompt_size), torch.int64)
        wanted["tokens.concepts"] = (tokens.concepts, (size, length), torch.int64)
        wanted["tokens.owner"] = (tokens.owner, (size,), torch.int64)
    for name, (tensor, shape, dtype) in wanted.items():
        if tensor.shape != torch.Size(shape) or tensor.dtype != dtype or tensor.device != states.device:
            raise InvalidInputError(
                name,
                expected=f"{list(shape)} {dtype} on {states.device}",
                found=f"{list(tensor.shape)} {tensor.dtype} on {tensor.device}",
                fix="Give one owner for each concept, one threshold for each SPM and one set of tokens for each row.",
            )


def _matrix(tensor: Tensor) -> tuple[int, int]:
    """The two extents of a matrix; of anything else (0, 0), which no such tensor has."""
    return (tensor.shape[0], tensor.shape[1]) if tensor.ndim == 2 else (0, 0)
