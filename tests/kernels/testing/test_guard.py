"""The guard counts exactly and catches what it is for: planted bugs of every kind."""

from __future__ import annotations

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("the guard watches the interpreter, which is off where there is a GPU", allow_module_level=True)

import triton
import triton.language as tl

from expunge.kernels.testing.guard import GuardError, guard


@triton.jit
def scale_kernel(x, y, n, off_by: tl.constexpr, BLOCK: tl.constexpr):
    o = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(x + o, mask=o < n + off_by, other=0.0)
    tl.store(y + o, b * 2, mask=o < n)


@triton.jit
def shared_store_kernel(y, BLOCK: tl.constexpr):
    o = tl.arange(0, BLOCK)
    tl.store(y + o, o.to(tl.float32))


@triton.jit
def neighbour_kernel(x, n):
    i = tl.program_id(0)
    left = tl.load(x + i - 1, mask=i > 0, other=0.0)
    tl.store(x + i, left + 1)


@triton.jit
def atomic_kernel(total, plain: tl.constexpr):
    tl.atomic_add(total, 1.0)
    if plain:
        tl.store(total, 0.0)


@triton.jit
def swap_kernel(lock):
    tl.atomic_cas(lock, 0, 1)


@triton.jit
def bfloat16_kernel(x, y, how: tl.constexpr):
    o = tl.arange(0, 16)
    b = tl.load(x + o)
    if how == "add":
        tl.store(y + o, b + b)
    elif how == "sum":
        tl.store(y + o, tl.sum(b, 0) + o)
    elif how == "negate":
        tl.store(y + o, -b)
    else:
        tl.store(y + o, b.to(tl.float32) + 1)


@triton.jit
def dot_kernel(a, b, c, M: tl.constexpr, K: tl.constexpr, N: tl.constexpr):
    m, k, n = tl.arange(0, M), tl.arange(0, K), tl.arange(0, N)
    b_a = tl.load(a + m[:, None] * K + k[None, :])
    b_b = tl.load(b + k[:, None] * N + n[None, :])
    tl.store(c + m[:, None] * N + n[None, :], tl.dot(b_a, b_b, input_precision="ieee"))


def test_bytes_are_counted(counts) -> None:
    x, y = torch.randn(100), torch.empty(100)
    scale_kernel[(4,)](x, y, 100, 0, BLOCK=32)
    assert torch.equal(y, 2 * x)
    assert counts.launches == ["scale_kernel"] and counts.programs == 4
    assert (counts.read_asked, counts.read_unique, counts.written_asked, counts.written_unique) == (400,) * 4
    assert (counts.asked, counts.unique) == (800, 800)


def test_asked_and_unique_differ_where_programs_read_the_same(counts) -> None:
    x, y = torch.randn(8, 16).bfloat16(), torch.empty(16, 8)
    for _ in range(2):
        dot_kernel[(1,)](x.mT.contiguous(), x[:, :8].contiguous(), torch.empty(16, 8), M=16, K=8, N=8)
    assert counts.flops == 2 * 2 * 16 * 8 * 8
    assert counts.read_unique == 2 * 2 * (16 * 8 + 8 * 8) and counts.written_unique == 2 * 4 * y.numel()


def test_bfloat16_dot_is_mended() -> None:
    a, b, c = torch.randn(16, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.empty(16, 16)
    dot_kernel[(1,)](a, b, c, M=16, K=16, N=16)
    torch.testing.assert_close(c, a.float() @ b.float())


def test_planted_off_by_one_is_caught() -> None:
    x, y = torch.randn(100), torch.empty(100)
    with pytest.raises(GuardError, match="scale_kernel: 4 stray bytes"), guard():
        scale_kernel[(4,)](x, y, 100, 1, BLOCK=32)


def test_a_view_may_be_left_but_not_its_storage() -> None:
    x, y = torch.randn(101)[:100], torch.empty(100)
    scale_kernel[(4,)](x, y, 100, 1, BLOCK=32)
    assert torch.equal(y, 2 * x)


def test_planted_race_of_writes_is_caught() -> None:
    with pytest.raises(GuardError, match="16 clashes"), guard():
        shared_store_kernel[(2,)](torch.empty(16), BLOCK=16)


def test_planted_race_of_a_read_and_a_write_is_caught() -> None:
    with pytest.raises(GuardError, match=r"neighbour_kernel: 0 stray bytes .*, 2 clashes"), guard():
        neighbour_kernel[(3,)](torch.zeros(3), 3)


def test_launches_do_not_clash_with_one_another() -> None:
    y = torch.empty(16)
    for _ in range(2):
        shared_store_kernel[(1,)](y, BLOCK=16)
    assert torch.equal(y, torch.arange(16.0))


def test_atomics_do_not_clash_with_atomics(counts) -> None:
    total = torch.zeros(1)
    atomic_kernel[(5,)](total, False)
    assert total.item() == 5
    assert (counts.read_asked, counts.read_unique, counts.written_asked, counts.written_unique) == (20, 4, 20, 4)
    lock = torch.zeros(1, dtype=torch.int32)
    swap_kernel[(3,)](lock)
    assert lock.item() == 1


def test_atomics_clash_with_plain_stores() -> None:
    with pytest.raises(GuardError, match="clashes"), guard():
        atomic_kernel[(2,)](torch.zeros(1), True)


@pytest.mark.parametrize("how", ["add", "sum", "negate"])
def test_bfloat16_arithmetic_is_refused(how: str) -> None:
    with pytest.raises(Exception, match="arithmetic on bfloat16"):
        bfloat16_kernel[(1,)](torch.ones(16).bfloat16(), torch.empty(16), how=how)


def test_bfloat16_through_float32_is_right() -> None:
    y = torch.empty(16)
    bfloat16_kernel[(1,)](torch.ones(16).bfloat16(), y, how="cast")
    assert torch.equal(y, torch.full((16,), 2.0))


def test_fresh_memory_is_poisoned() -> None:
    assert torch.empty(5).isnan().all()
    assert torch.empty(5).new_empty(3).isnan().all()


def test_the_interpreter_is_left_as_it_was() -> None:
    from triton.runtime.interpreter import InterpreterBuilder

    before = InterpreterBuilder.create_dot
    with guard():
        assert InterpreterBuilder.create_dot is not before
    assert InterpreterBuilder.create_dot is before
