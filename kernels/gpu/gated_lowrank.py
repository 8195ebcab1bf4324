"""Gated low-rank update in Triton: one launch for all SPMs of a layer. Formula and shapes: `kernels/gated_lowrank.py`.

A program owns BM tokens of one row of the batch, so its gates are one vector. It streams x once through h = x downᵀ,
keeps h [BM, BR] in registers, gates it there, and streams the output once: y = out + h upᵀ. Nothing of the hidden
product goes to memory. Bytes: x once, out once, y once, and the factors once a program, which come from L2.

The backward pass recomputes h the same way and leaves the two small sums over all tokens (for down and up) to cuBLAS.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from expunge.kernels.gpu.common import DOT_PRECISION, INTERPRETED, cdiv, next_power_of_2


@triton.jit
def _hidden(
    x, down, t, m_t, width, rank, s_xt, s_xc,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """h [BM, BR] = x downᵀ of the tokens t, in float32; `x` points at the row of the batch."""
    r = tl.arange(0, BR)
    h = tl.zeros([BM, BR], tl.float32)
    for k in range(0, width, BK):
        c = k + tl.arange(0, BK)
        m_c = c < width
        o_x = t.to(tl.int64)[:, None] * s_xt + c.to(tl.int64)[None, :] * s_xc
        b_x = tl.load(x + o_x, mask=m_t[:, None] & m_c[None, :], other=0.0)  # [BM, BK]
        b_down = tl.load(down + r[:, None] * width + c[None, :], mask=(r < rank)[:, None] & m_c[None, :], other=0.0)
        h = tl.dot(b_x, tl.trans(b_down), h, input_precision=PREC)
    return h


@triton.jit
def gated_lowrank_fwd_kernel(
    x, down, up, gate, out, y,
    tokens, width, rank, features,
    s_xb, s_xt, s_xc, s_ob, s_ot, s_oc, s_yb, s_yt, s_yc, s_gb,
    HAS_OUT: tl.constexpr, MIX: tl.constexpr,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    tiles = tl.cdiv(tokens, BM)
    row = (pid // tiles).to(tl.int64)
    t = (pid % tiles) * BM + tl.arange(0, BM)
    m_t = t < tokens
    r = tl.arange(0, BR)
    h = _hidden(x + row * s_xb, down, t, m_t, width, rank, s_xt, s_xc, BM, BR, BK, PREC)
    b_gate = tl.load(gate + row * s_gb + r, mask=r < rank, other=0.0).to(tl.float32)
    h *= b_gate[None, :]
    if MIX > 0:  # the reference's inference: h of all SPMs summed, then gated again
        mixed = tl.sum(tl.reshape(h, [BM, BR // MIX, MIX]), 1)  # [BM, N*r] -> [BM, r]
        h = tl.reshape(tl.broadcast_to(mixed[:, None, :], [BM, BR // MIX, MIX]), [BM, BR]) * b_gate[None, :]
    b_h = h.to(up.dtype.element_ty)
    t64 = t.to(tl.int64)[:, None]
    for n in range(tl.program_id(1) * BN, features, BN * SPLITS):
        c = n + tl.arange(0, BN)
        m_c = c < features
        b_up = tl.load(up + c[:, None] * rank + r[None, :], mask=m_c[:, None] & (r < rank)[None, :], other=0.0)
        delta = tl.dot(b_h, tl.trans(b_up), input_precision=PREC)  # [BM, BN]
        m = m_t[:, None] & m_c[None, :]
        c64 = c.to(tl.int64)[None, :]
        if HAS_OUT:
            delta += tl.load(out + row * s_ob + t64 * s_ot + c64 * s_oc, mask=m, other=0.0).to(tl.float32)
        tl.store(y + row * s_yb + t64 * s_yt + c64 * s_yc, delta.to(y.dtype.element_ty), mask=m)


@triton.jit
def gated_lowrank_bwd_kernel(
    x, down, up, gate, dy, dx, gated, dh, dgate,
    tokens, width, rank, features,
    s_xb, s_xt, s_xc, s_yb, s_yt, s_yc, s_db, s_dt, s_dc, s_gb,
    BM: tl.constexpr, BR: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr, PREC: tl.constexpr,
):  # fmt: skip
    """dx [B, T, in]; h ⊙ g and the gradient of h, both [B, T, R]; and each tile's share of the gates' gradient."""
    pid = tl.program_id(0)
    tiles = tl.cdiv(tokens, BM)
    row = (pid // tiles).to(tl.int64)
    t = (pid % tiles) * BM + tl.arange(0, BM)
    m_t = t < tokens
    r = tl.arange(0, BR)
    h = _hidden(x + row * s_xb, down, t, m_t, width, rank, s_xt, s_xc, BM, BR, BK, PREC)
    t64 = t.to(tl.int64)[:, None]
    d = tl.zeros([BM, BR], tl.float32)  # gradient of h ⊙ g
    for n in range(0, features, BN):
        c = n + tl.arange(0, BN)
        m_c = c < features
        o_y = t64 * s_yt + c.to(tl.int64)[None, :] * s_yc
        b_dy = tl.load(dy + row * s_yb + o_y, mask=m_t[:, None] & m_c[None, :], other=0.0)  # [BM, BN]
        b_up = tl.load(up + c[:, None] * rank + r[None, :], mask=m_c[:, None] & (r < rank)[None, :], other=0.0)
        d = tl.dot(b_dy, b_up, d, input_precision=PREC)
    b_gate = tl.load(gate + row * s_gb + r, mask=r < rank, other=0.0).to(tl.float32)
    tl.store(dgate + pid.to(tl.int64) * rank + r, tl.sum(d * h, 0), mask=r < rank)
    d *= b_gate[None, :]
    o_h = (row * tokens + t64) * rank + r[None, :]
    m_h = m_t[:, None] & (r < rank)[None, :]
    tl.store(gated + o_h, (h * b_gate[None, :]).to(gated.dtype.element_ty), mask=m_h)
    tl.store(dh + o_h, d.to(dh.dtype.element_ty), mask=m_h)
    b_d = d.to(down.dtype.element_ty)
    for k in range(0, width, BK):
        c = k + tl.arange(0, BK)
        m_c = c < width
        b_down = tl.load(down + r[:, None] * width + c[None, :], mask=(r < rank)[:, None] & m_c[None, :], other=0.0)
        b_dx = tl.dot(b_d, b_down, input_precision=PREC)  # [BM, BK]
        o_d = row * s_db + t64 * s_dt + c.to(tl.int64)[None, :] * s_dc
        tl.store(dx + o_d, b_dx.to(dx.dtype.element_ty), mask=m_t[:, None] & m_c[None, :])


# rank at most -> tokens of a program and warps. The factors are read once a program, so more tokens where they weigh
# more; h [BM, BR] takes BM * BR / (32 * warps) registers of a thread.
TOKENS = ((4, 32, 4), (8, 64, 4), (32, 128, 8), (64, 64, 4), (128, 64, 8), (256, 32, 8), (512, 16, 8))
MAX_RANK = TOKENS[-1][0]
SMALL = 256  # tokens of all rows up to which the output's features are split over two programs, which both read x


def tiles(rows: int, tokens: int, rank: int, features: int, itemsize: int) -> dict[str, Any]:
    """Tiles of a launch: BM tokens, BR hidden, BK of the input's and BN of the output's features, SPLITS, warps."""
    if INTERPRETED:
        return {"BM": 16, "BR": max(16, next_power_of_2(rank)), "BK": 32, "BN": 32, "SPLITS": 1, "num_warps": 4}
    return gpu_tiles(rows, tokens, rank, features, itemsize)


def gpu_tiles(rows: int, tokens: int, rank: int, features: int, itemsize: int) -> dict[str, Any]:
    """The same on a GPU, from `TOKENS` and `SMALL`."""
    bm, warps = next((bm, warps) for limit, bm, warps in TOKENS if rank <= limit)
    bn = 32 if itemsize == 4 or rank > 64 else 64
    splits = 2 if rows * tokens <= SMALL and features > bn else 1
    bk = 32 if itemsize == 4 or rank > 64 else 64
    return {"BM": bm, "BR": max(16, next_power_of_2(rank)), "BK": bk, "BN": bn, "SPLITS": splits, "num_warps": warps}


def forward_bytes(rows: int, tokens: int, width: int, features: int, rank: int, itemsize: int) -> tuple[int, int]:
    """Bytes that one forward launch on a GPU asks for, and the least that must move; all tensors of one dtype.

    Least: x, out and the factors and gates read once, y written once. A program reads the factors and gates again, and
    every split reads x, the down factors and the gates again; what is asked again comes from the caches.
    """
    sizes = gpu_tiles(rows, tokens, rank, features, itemsize)
    programs, splits = rows * cdiv(tokens, sizes["BM"]), sizes["SPLITS"]
    x, y = rows * tokens * width * itemsize, rows * tokens * features * itemsize
    down, up, gates = rank * width * itemsize, rank * features * itemsize, 4 * rank
    asked = splits * x + 2 * y + programs * (splits * (down + gates) + up)
    return asked, x + 2 * y + down + up + rows * gates


def launch_gated_lowrank_forward(
    x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor | None, y: Tensor, mix_rank: int | None = None
) -> Tensor:
    """y = out + gated update, for x [B, T, in], out and y [B, T, features] of any strides; y may be out itself."""
    (rows, tokens, width), (features, rank) = x.shape, up.shape
    if y.numel() == 0:
        return y
    sizes = tiles(rows, tokens, rank, features, y.element_size())
    base = y if out is None else out
    gated_lowrank_fwd_kernel[(rows * cdiv(tokens, sizes["BM"]), sizes["SPLITS"])](
        x, down, up, gate, base, y, tokens, width, rank, features,
        *x.stride(), *base.stride(), *y.stride(), gate.stride(0) if gate.shape[0] > 1 else 0,
        HAS_OUT=out is not None, MIX=mix_rank or 0, PREC=DOT_PRECISION, **sizes,
    )  # fmt: skip
    return y


def launch_gated_lowrank_backward(
    x: Tensor, down: Tensor, up: Tensor, gate: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x [B, T, in], down [R, in], up [features, R] and gate [B, R] or [1, R], float32 but for x's."""
    (rows, tokens, width), (features, rank) = x.shape, up.shape
    dx = torch.empty_like(x)
    sizes = tiles(rows, tokens, rank, features, max(x.element_size(), dy.element_size())) | {"SPLITS": 1}
    del sizes["SPLITS"]
    count = cdiv(tokens, sizes["BM"])
    gated, dh = dy.new_empty(rows, tokens, rank), x.new_empty(rows, tokens, rank)
    dgate = torch.empty(rows, count, rank, dtype=torch.float32, device=x.device)
    if rows * tokens:
        gated_lowrank_bwd_kernel[(rows * count,)](
            x, down, up, gate, dy, dx, gated, dh, dgate, tokens, width, rank, features,
            *x.stride(), *dy.stride(), *dx.stride(), gate.stride(0) if gate.shape[0] > 1 else 0,
            PREC=DOT_PRECISION, **sizes,
        )  # fmt: skip
    # Sums over all tokens of all rows: [features, B*T] @ [B*T, R] and [R, B*T] @ [B*T, in].
    dup = dy.reshape(-1, features).mT @ gated.view(-1, rank)
    ddown = dh.view(-1, rank).mT @ x.reshape(-1, width)
    per_row = dgate.sum(1)  # [B, R]
    return dx, ddown, dup, per_row if gate.shape[0] == rows else per_row.sum(0, keepdim=True)


class GatedLowrank(torch.autograd.Function):
    """y = out + gated update for x [B, T, in], with gradients of everything; dtypes of factors as the kernels take."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, down, up, gate)
        ctx.has_out = out is not None
        return launch_gated_lowrank_forward(x, down, up, gate, out, empty_result(x, up, out))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, down, up, gate = ctx.saved_tensors
        dx, ddown, dup, dgate = launch_gated_lowrank_backward(x, down, up, gate, grads[0])
        return dx, ddown.to(down.dtype), dup.to(up.dtype), dgate.to(gate.dtype), grads[0] if ctx.has_out else None


def empty_result(x: Tensor, up: Tensor, out: Tensor | None) -> Tensor:
    """Memory for y: laid out as `out` is, else as x is where its features come first."""
    if out is not None:
        return torch.empty_like(out)
    shape = (x.shape[0], x.shape[1], up.shape[0])
    if x.stride(1) < x.stride(2):  # tokens side by side, as in a convolution's NCHW
        return up.new_empty(shape[0], shape[2], shape[1]).mT
    return up.new_empty(shape)


@torch.library.custom_op("expunge::gated_lowrank", mutates_args=())
def gated_lowrank_op(
    x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor | None, mix_rank: int | None
) -> Tensor:
    """The forward launch as one opaque op, for torch.compile."""
    return launch_gated_lowrank_forward(x, down, up, gate, out, empty_result(x, up, out), mix_rank)


@gated_lowrank_op.register_fake
def _fake(x: Tensor, down: Tensor, up: Tensor, gate: Tensor, out: Tensor | None, mix_rank: int | None) -> Tensor:
    return empty_result(x, up, out)


@torch.library.custom_op("expunge::gated_lowrank_backward", mutates_args=())
def gated_lowrank_backward_op(
    x: Tensor, down: Tensor, up: Tensor, gate: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The backward launch as one opaque op."""
    return launch_gated_lowrank_backward(x, down, up, gate, dy)


@gated_lowrank_backward_op.register_fake
def _fake_backward(
    x: Tensor, down: Tensor, up: Tensor, gate: Tensor, dy: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return torch.empty_like(x), torch.empty_like(down), torch.empty_like(up), torch.empty_like(gate)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:4])
    ctx.has_out = inputs[4] is not None


def _backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    dx, ddown, dup, dgate = gated_lowrank_backward_op(*ctx.saved_tensors, dy)
    return dx, ddown, dup, dgate, dy if ctx.has_out else None, None


gated_lowrank_op.register_autograd(_backward, setup_context=_setup)
