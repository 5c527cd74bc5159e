"""How fast this machine reads its memory: the limit of a step that must read every weight once."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np

READ_BYTES = 2**29
THREADS = 2


def read_speed(threads: int = THREADS) -> float:
    """Bytes a second that so many cores together read from memory, the best of a few tries."""
    parts = [np.ones(READ_BYTES // 4 // threads, dtype=np.float32) for _ in range(threads)]
    best = float("inf")
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(8):
            began = time.perf_counter()
            list(pool.map(lambda part: part @ part, parts))
            best = min(best, time.perf_counter() - began)
    return READ_BYTES / best
