"""Cases for the tests of the report: a sound kernel with a dot, and three that the report must complain about."""

import torch
import triton
import triton.language as tl
from report.case import Case


@triton.jit
def scaled_product_kernel(x_ptr, w_ptr, g_ptr, y_ptr, n, K: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    inside = (rows < n)[:, None]
    total = tl.zeros((BM, 16), tl.float32)
    for start in range(0, K, BK):
        columns = start + tl.arange(0, BK)
        x = tl.load(x_ptr + rows[:, None] * K + columns[None, :], mask=inside, other=0.0)
        w = tl.load(w_ptr + tl.arange(0, 16)[:, None] * K + columns[None, :])
        total = tl.dot(x, tl.trans(w), total, input_precision="ieee")
    g = tl.load(g_ptr + rows, mask=rows < n, other=0.0)
    out = y_ptr + rows[:, None] * 16 + tl.arange(0, 16)[None, :]
    tl.store(out, (total * g[:, None]).to(x_ptr.dtype.element_ty), mask=inside)


@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < n), mask=at < n)


@triton.jit
def greedy_kernel(x_ptr, y_ptr, BM: tl.constexpr, BN: tl.constexpr):
    at = tl.arange(0, BM)[:, None] * BN + tl.arange(0, BN)[None, :]
    x = tl.load(x_ptr + at)
    tl.store(y_ptr + at, x / tl.sum(x, axis=0)[None, :])


def product(device: torch.device, dtype: torch.dtype = torch.float16) -> None:
    x, w = torch.randn(4096, 320, dtype=dtype, device=device), torch.randn(16, 320, dtype=dtype, device=device)
    g, y = torch.randn(4096, device=device), torch.empty(4096, 16, dtype=dtype, device=device)
    scaled_product_kernel[(64,)](x, w, g, y, 4096, K=320, BM=64, BK=64)


def copy(device: torch.device, offset: int = 0) -> None:
    x = torch.randn(4096 + offset, dtype=torch.float16, device=device)[offset:]
    y = torch.empty(4096, dtype=torch.float16, device=device)
    copy_kernel[lambda meta: (triton.cdiv(4096, meta["BLOCK"]),)](x, y, 4096, BLOCK=1024)


def greedy(device: torch.device) -> None:
    x = torch.randn(128, 256, device=device)
    greedy_kernel[(1,)](x, torch.empty_like(x), BM=128, BN=256, num_warps=1)


STREAMS = ("x_ptr", "y_ptr")
LEAST = 2 * (4096 * 320 + 16 * 320 + 4096 * 16) + 4 * 4096
CASES = [
    Case("sample", "product", product, least=LEAST, flops=2 * 4096 * 320 * 16, streams=STREAMS, pinned=True),
    Case("sample", "the same again", product, least=LEAST, flops=2 * 4096 * 320 * 16, streams=STREAMS, pinned=True),
    Case("sample", "float32", lambda device: product(device, torch.float32), least=2 * LEAST, dot_bits=32),
    Case("sample", "aligned copy", copy, least=16384, streams=STREAMS, counted=True),
    Case("narrow", "copy from an odd address", lambda device: copy(device, 1), least=16384, streams=STREAMS),
    Case("spilling", "one warp for 32768 numbers", greedy, least=262144),
]
