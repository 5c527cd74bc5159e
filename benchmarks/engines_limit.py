"""What the machine can do at best, measured in the same rounds as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from memory_speed import read_speed

ROWS = 512
"""Of a product that is bound by computing, not by memory."""


@contextmanager
def machine(dtype: str, hidden_size: int) -> Iterator[Callable[[], dict[str, float]]]:
    """`answer()`: bytes a second read from memory, and operations a second of a product as large as a model's."""
    left = torch.randn(ROWS, hidden_size).to(getattr(torch, dtype))
    right = torch.randn(4 * hidden_size, hidden_size).to(getattr(torch, dtype))

    def multiply_s() -> float:
        began_s = time.perf_counter()
        torch.nn.functional.linear(left, right)
        return time.perf_counter() - began_s

    yield lambda: {
        "read_bytes_per_s": read_speed(torch.get_num_threads()),
        "flops_per_s": 2 * ROWS * 4 * hidden_size**2 / min(multiply_s() for _ in range(20)),
    }
