"""torch's CPU threads: their number (engines/loading/cpu_threads.py), and the end of idle workers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import torch

from chatstream.engines.loading.cpu_threads import choose_num_threads

_OMP_PAUSE_SOFT = 1
"""From OpenMP 5.0's omp.h."""


def set_num_threads(wanted: int | None) -> int:
    """Set the number of CPU threads for computations of the calling thread, and return it.

    None: chosen by `choose_num_threads`, and at most the number of an earlier `torch.set_num_threads`. torch keeps the
    number for each thread, so call this in the thread that runs the model.
    """
    chosen = choose_num_threads(wanted)
    if wanted is None:
        chosen = min(chosen, torch.get_num_threads())
    torch.set_num_threads(chosen)
    return chosen


def end_idle_workers() -> None:
    """End the OpenMP workers of the calling thread. They are created again when it computes again.

    Idle workers sleep, but GNU's OpenMP counts them: with more of its threads than CPUs, no thread spins while it waits
    for the others. On 2 cores, with a model of 0.12B that the main thread had used, a step of 8 streams took 56 to
    59 ms, and 36 to 56 ms after this call (by hand, alternating). Does nothing if torch has another OpenMP.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        ctypes.CDLL(str(library)).omp_pause_resource_all(_OMP_PAUSE_SOFT)
