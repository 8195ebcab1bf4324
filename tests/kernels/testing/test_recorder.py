"""The recorder against work whose operations, bytes and memory are known."""

from __future__ import annotations

import torch

from expunge.kernels.testing.recorder import Recorder, peak_bytes


def test_operations_and_bytes() -> None:
    x = torch.randn(10, 20)
    with Recorder() as recorder:
        y = (x.view(200) * 2).view(10, 20)
        y.add_(x)
    assert recorder.ops == ["aten.mul.Tensor", "aten.add_.Tensor"]
    assert recorder.bytes == 4 * 200 * (2 + 3)
    assert recorder.largest == 200


def test_backward_passes_are_seen() -> None:
    w = torch.randn(3, 4, requires_grad=True)
    with Recorder() as recorder:
        (torch.randn(5, 4) @ w.mT).sum().backward()
    assert sum("mm" in op for op in recorder.ops) == 2
    assert recorder.largest == 20


def test_largest_counts_new_memory_only() -> None:
    x = torch.randn(100)
    with Recorder() as recorder:
        x.mul_(2)
        x[:3] + 1
    assert recorder.largest == 3


def test_peak_is_of_what_lives_at_a_time() -> None:
    def one_after_the_other() -> None:
        for _ in range(5):
            torch.zeros(100_000)

    def all_at_once() -> object:
        return [torch.zeros(100_000) for _ in range(5)]

    assert peak_bytes(one_after_the_other) == 400_000
    assert peak_bytes(all_at_once) == 2_000_000
