"""torch's CPU threads: as many as the machine has to spare (engines/loading/cpu_threads.py)."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from chatstream.engines.loading.cpu_threads import choose_num_threads

_OMP_PAUSE_SOFT = 1
"""Of OpenMP 5.0's omp.h."""


def set_num_threads(wanted: int | None) -> int:
    """Use so many threads for what the calling thread computes, and say how many; None: as many as is wise, and never
    more than an earlier `torch.set_num_threads` said.

    torch keeps the number per thread, so this must be called in the one that runs the model.
    """
    chosen = choose_num_threads(wanted)
    if wanted is None:
        chosen = min(chosen, torch.get_num_threads())
    torch.set_num_threads(chosen)
    return chosen


def end_idle_workers() -> None:
    """End the threads that helped the calling thread to compute; they are made anew when it computes again.

    They only sleep, but GNU's OpenMP counts them: with more of its threads than CPUs none of them spins any more while
    it waits for the others. On 2 cores, with a model of 0.12B that the main thread had used, a step of 8 streams took
    56 to 59 ms, and 36 to 56 after this (by hand, in turns). Does nothing where torch brings another OpenMP.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        ctypes.CDLL(str(library)).omp_pause_resource_all(_OMP_PAUSE_SOFT)
