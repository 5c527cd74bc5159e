"""Measures the hardware limit of the machine, in the same rounds as the peers."""

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
"""Rows of a product that is bound by computation, not by memory."""


@contextmanager
def machine(dtype: str, hidden_size: int) -> Iterator[Callable[[], dict[str, float]]]:
    """`answer()`: bytes per second that all cores read from memory, and operations per second of a matrix product.

    The product is as large as one of the model, with plain or reordered weights, whichever is faster.
    """
    num_threads = torch.get_num_threads()
    left = torch.randn(ROWS, hidden_size).to(getattr(torch, dtype))
    right = torch.randn(4 * hidden_size, hidden_size).to(getattr(torch, dtype))
    products: list[Callable[[], object]] = [lambda: torch.nn.functional.linear(left, right)]
    try:
        packed = PackedLinear(reordered(right), None)
        products.append(lambda: packed(left))
    except RuntimeError:
        pass  # not supported by this processor

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
