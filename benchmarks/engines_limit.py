"""What the machine can do at best, measured in the same rounds as everything else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch

from chatstream.engines.transformers.prepack import PackedLinear, reordered

READ_BYTES = 2**29
ROWS = 512
"""Of a product that is bound by computing, not by memory."""


@contextmanager
def machine(dtype: str, hidden_size: int) -> Iterator[Callable[[], dict[str, float]]]:
    """`answer()`: bytes a second that all cores together read from memory, and operations a second of a product as
    large as a model's, with the weights as they are or reordered, whichever is faster."""
    num_threads = torch.get_num_threads()
    left = torch.randn(ROWS, hidden_size).to(getattr(torch, dtype))
    right = torch.randn(4 * hidden_size, hidden_size).to(getattr(torch, dtype))
    products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(left, right)]
    try:
        packed = PackedLinear(reordered(right), None)
        products.append(lambda: packed(left))
    except RuntimeError:
        pass  # not on this processor

    @torch.inference_mode()
    def measure() -> dict[str, float]:
        parts = [np.ones(READ_BYTES // 4 // num_threads, dtype=np.float32) for _ in range(num_threads)]
        with ThreadPoolExecutor(num_threads) as pool:
            read_s = _best_s(lambda: list(pool.map(lambda part: part @ part, parts)), 8)
        return {
            "read_bytes_per_s": READ_BYTES / read_s,
            "flops_per_s": 2 * ROWS * 4 * hidden_size**2 / min(_best_s(product, 20) for product in products),
        }

    yield measure


def _best_s(work: Callable[[], object], times: int) -> float:
    took_s = []
    for _ in range(times):
        began_s = time.perf_counter()
        work()
        took_s.append(time.perf_counter() - began_s)
    return min(took_s)
