"""Gated low-rank update: y = out + ((x downᵀ) ⊙ gate[row]) upᵀ.

Formula (SPM, arXiv 2312.16145, eqs. 3 and 9, for any number of SPMs at once): with h = x downᵀ,

    linear:    y = out + (h ⊙ g) upᵀ                     = out + Σ_i g_i (x D_iᵀ) U_iᵀ
    official:  y = out + (g ⊙ tile(Σ_j g_j h_j)) upᵀ     = out + (x (Σ_j g_j D_j)ᵀ) (Σ_i g_i U_i)ᵀ

"official" is the reference implementation's inference, which sums the gated factors instead of their products; its
SPMs all have the same rank r, which is then given as `mix_rank`.

Shapes:
    x     [B, *, in], or [B, in, H, W] for a convolution
    down  [R, in], or [R, in, kh, kw]: the down factors of all SPMs, stacked (R = sum of their ranks)
    up    [out, R]: the up factors, with alpha / r and the multiplier folded in
    gate  [B, R], or [1, R] for every row alike: the gate of each SPM, repeated for its columns
    out   [B, *, out], or [B, out, H', W']: the base layer's output, updated in place when no gradient is needed

The torch reference below is the CPU path and the oracle of the tests. On GPUs one Triton kernel does it all in one
launch (`kernels/gpu/gated_lowrank.py`), which takes linear layers and 1x1 convolutions in both memory formats, up to
512 hidden columns; larger kernels, more columns, and the gradient of `mix_rank` take the torch path there as well.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from expunge.errors import InvalidInputError, UnsupportedOperationError
from expunge.kernels.dispatch import KernelPath, kernel_path

MAX_KERNEL_RANK, MAX_MIXED_RANK = 512, 128


def gated_lowrank_reference(
    x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor | None = None, mix_rank: int | None = None
) -> Tensor:
    """The formula, word for word; returns a new tensor."""
    g = gate.view(gate.shape[0], *(1,) * (x.ndim - 2), gate.shape[1])  # [B, *1, R]
    delta = gate_hidden(F.linear(x, down), g, mix_rank) @ up.mT
    return delta if out is None else out + delta


def gated_lowrank_conv_reference(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    out: Tensor | None = None,
    mix_rank: int | None = None,
    **conv: Any,
) -> Tensor:
    """The formula for a convolution: down with the base's geometry, the gate, then a 1x1 up."""
    h = F.conv2d(x, down, **conv)  # [B, R, H', W']
    h = gate_hidden(h.movedim(1, -1), gate[:, None, None, :], mix_rank).movedim(-1, 1)
    delta = F.conv2d(h, up[:, :, None, None])
    return delta if out is None else out + delta


def gate_hidden(h: Tensor, gate: Tensor, mix_rank: int | None) -> Tensor:
    """h ⊙ g, or the reference's mixed sum: h [B, *, R] and gate broadcastable to it."""
    h = h * gate
    if mix_rank is None:
        return h
    mixed = h.unflatten(-1, (-1, mix_rank)).sum(-2)  # [B, *, N, r] -> [B, *, r]
    return mixed.repeat(*(1,) * (h.ndim - 1), h.shape[-1] // mix_rank) * gate  # [B, *, N*r]


def gated_lowrank(
    x: Tensor, down: Tensor, up: Tensor, gate: Tensor, *, out: Tensor | None = None, mix_rank: int | None = None
) -> Tensor:
    """Adds gated low-rank updates to a linear layer's output.

    Args:
        x: `[B, *, in]`, the layer's input.
        down: `[R, in]`, all down factors.
        up: `[out, R]`, all up factors, scaled.
        gate: `[B, R]` or `[1, R]`.
        out: `[B, *, out]`, the base layer's output; overwritten when no gradient is needed. None: only the update.
        mix_rank: None for the sum of gated products; the common rank for the reference's sum of gated factors.

    Returns:
        `[B, *, out]`; differentiable with respect to x, down, up, gate and out.

    Raises:
        InvalidInputError: if the shapes do not belong together.
        UnsupportedOperationError: if the rows of x are not the rows that the gates were computed for.
    """
    check_shapes(x, x.shape[-1], down, up, gate, mix_rank)
    path = kernel_path("gated_lowrank", x, down, up, gate, out)
    if path != "torch" and _kernel_takes(x, down, up, gate, out, mix_rank):
        tokens = (x.unsqueeze(1) if x.ndim == 2 else x).flatten(1, -2)  # [B, *, in] -> [B, T, in]
        base = None if out is None else (out.unsqueeze(1) if out.ndim == 2 else out).flatten(1, -2)
        y = _by_kernel(path, tokens, down, up, gate, base, mix_rank)
        y = y.reshape(*x.shape[:-1], up.shape[0])
        return y if out is None else _landed(y, out, path == "triton" and not needs_grad(x, down, up, gate, out))
    dtype = x.dtype if out is None else out.dtype  # under autocast the base's output is narrower than its input
    h = F.linear(x, down.to(x.dtype)).to(dtype)
    up, gate = up.to(dtype), gate.to(dtype).view(gate.shape[0], *(1,) * (x.ndim - 2), gate.shape[1])  # [B, *1, R]
    in_place = out is not None and not needs_grad(x, down, up, gate, out)
    h = h.mul_(gate) if in_place and mix_rank is None else gate_hidden(h, gate, mix_rank)
    if out is None:
        return F.linear(h, up)
    if not in_place:
        return out + F.linear(h, up)
    if not out.is_contiguous():
        return out.add_(F.linear(h, up))
    out.view(-1, out.shape[-1]).addmm_(h.reshape(-1, h.shape[-1]), up.mT)  # [B*M, out] += [B*M, R] @ [R, out]
    return out


def gated_lowrank_conv(
    x: Tensor,
    down: Tensor,
    up: Tensor,
    gate: Tensor,
    *,
    stride: int | tuple[int, int] = 1,
    padding: int | tuple[int, int] | str = 0,
    dilation: int | tuple[int, int] = 1,
    out: Tensor | None = None,
    mix_rank: int | None = None,
) -> Tensor:
    """Adds gated low-rank updates to a convolution's output.

    Args:
        x: `[B, in, H, W]`, the layer's input.
        down: `[R, in, kh, kw]`, all down factors; never grouped, whatever the base's groups.
        up: `[out, R]`, all up factors, scaled.
        gate: `[B, R]` or `[1, R]`.
        stride, padding, dilation: the base convolution's.
        out: `[B, out, H', W']`, the base layer's output; overwritten when no gradient is needed. None: only the update.
        mix_rank: as in `gated_lowrank`.

    Returns:
        `[B, out, H', W']`; differentiable with respect to x, down, up, gate and out.

    Raises:
        InvalidInputError: if the shapes do not belong together.
        UnsupportedOperationError: if the rows of x are not the rows that the gates were computed for.
    """
    check_shapes(x, x.shape[1], down, up, gate, mix_rank)
    pointwise = down.shape[2:] == (1, 1) and stride in (1, (1, 1)) and padding in (0, (0, 0), "same", "valid")
    path = kernel_path("gated_lowrank", x, down, up, gate, out) if pointwise else "torch"
    if path != "torch" and _kernel_takes(x, down, up, gate, out, mix_rank):
        base = None if out is None else out.flatten(2).mT  # [B, out, H, W] -> [B, H*W, out], a view in both formats
        y = _by_kernel(path, x.flatten(2).mT, down.flatten(1), up, gate, base, mix_rank)
        y = y.mT.unflatten(2, x.shape[2:])
        return y if out is None else _landed(y, out, path == "triton" and not needs_grad(x, down, up, gate, out))
    if pointwise and x.is_contiguous(memory_format=torch.channels_last):
        last = None if out is None else out.movedim(1, -1)  # [B, H, W, out], a view
        y = gated_lowrank(x.movedim(1, -1), down.flatten(1), up, gate, out=last, mix_rank=mix_rank)
        return y.movedim(-1, 1)
    dtype = x.dtype if out is None else out.dtype
    rows = x.shape[0]
    if pointwise:
        h = torch.bmm(down.to(x.dtype).flatten(1).expand(rows, -1, -1), x.flatten(2))  # [B, R, in] @ [B, in, H*W]
        size = x.shape[2:]
    else:
        h = F.conv2d(x, down.to(x.dtype), stride=stride, padding=padding, dilation=dilation)
        size, h = h.shape[2:], h.flatten(2)  # [B, R, H'*W']
    h, up, gate = h.to(dtype), up.to(dtype), gate.to(dtype)
    h = h * gate[:, :, None] if mix_rank is None else gate_hidden(h.mT, gate[:, None, :], mix_rank).mT
    up = up.expand(rows, -1, -1)  # [B, out, R]
    if out is None:
        return torch.bmm(up, h).unflatten(2, size)
    if needs_grad(x, down, up, gate, out):
        return out + torch.bmm(up, h).unflatten(2, size)
    if not out.is_contiguous():
        return out.add_(torch.bmm(up, h).unflatten(2, size))
    out.view(rows, out.shape[1], -1).baddbmm_(up, h)  # [B, out, H'*W'] += [B, out, R] @ [B, R, H'*W']
    return out


def _kernel_takes(x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor | None, mix_rank: int | None) -> bool:
    """Whether the Triton kernel does this call; everything else takes the torch path on any device."""
    columns = down.shape[0]
    mixes = mix_rank is None or (
        columns <= MAX_MIXED_RANK and mix_rank & (mix_rank - 1) == 0 and not needs_grad(x, down, up, gate, out)
    )
    return 0 < columns <= MAX_KERNEL_RANK and mixes


def _by_kernel(
    path: KernelPath, x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor | None, mix_rank: int | None
) -> Tensor:
    """The update of x [B, T, in] by the kernel; the result lies in `out` [B, T, features] where that may be."""
    from expunge.kernels.gpu.gated_lowrank import GatedLowrank, empty_result, gated_lowrank_op
    from expunge.kernels.gpu.gated_lowrank import launch_gated_lowrank_forward as launch

    dtype = x.dtype if out is None else out.dtype
    recorded = needs_grad(x, down, up, gate, out)
    down, up, gate = down.to(x.dtype).contiguous(), up.to(dtype).contiguous(), gate.float().contiguous()
    if path == "op":
        result: Tensor = gated_lowrank_op(x, down, up, gate, out, mix_rank)
    elif recorded:
        result = GatedLowrank.apply(x, down, up, gate, out)
    else:
        result = launch(x, down, up, gate, out, empty_result(x, up, None) if out is None else out, mix_rank)
    return result


def _landed(y: Tensor, out: Tensor, in_place: bool) -> Tensor:
    """`y` in the shape of `out`; in `out` itself if that was asked for, whatever its strides."""
    if not in_place:
        return y
    if y.data_ptr() != out.data_ptr():  # strides that no view [B, T, features] has: the kernel worked on a copy
        out.copy_(y)
    return out


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether autograd records an operation on these tensors."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_shapes(x: Tensor, width: int, down: Tensor, up: Tensor, gate: Tensor, mix_rank: int | None) -> None:
    """Refuses factors that do not belong together and rows that have no gate of their own."""
    rank = down.shape[0]
    if down.shape[1] != width or up.shape[1:] != (rank,) or gate.shape[1:] != (rank,) or rank % (mix_rank or 1):
        raise InvalidInputError(
            "gated_lowrank",
            expected=f"down [R, {width}], up [out, R] and gate [B, R] with one R, a multiple of mix_rank",
            found=f"down {list(down.shape)}, up {list(up.shape)}, gate {list(gate.shape)}, mix_rank {mix_rank}",
            fix="Stack the factors of all SPMs and repeat each gate for the columns of its SPM.",
        )
    if gate.shape[0] not in (1, x.shape[0]):
        raise UnsupportedOperationError(
            "gated_lowrank",
            expected=f"{gate.shape[0]} rows, one for each gate",
            found=f"{x.shape[0]} rows",
            fix="The layer was given other rows than the denoiser: turn off what splits or repeats the batch inside it "
            "(such as enable_forward_chunking with dim=0), or pass one prompt at a time.",
        )
