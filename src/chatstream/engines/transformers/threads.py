"""How many CPU threads torch computes with.

The threads of a step wait for each other many times in it, so one thread more than there are free cores makes every
step several times slower (measured on 2 cores: 6 to 7 times, beside one busy process), while one thread less costs
its share at most.
"""

from __future__ import annotations

import ctypes
import logging
import os
from pathlib import Path

import loky
import torch

logger = logging.getLogger(__name__)

_SHARED_FROM = 4
"""Cores from which one is left to the event loop and its clients. On 2 cores both are taken: that gave 1.3 to 1.5 times
the tokens of one thread, with a server and 64 clients beside it, which slowed the steps by about a fifth. A fifth is
what one core in five is worth, so somewhere there it turns round; with more than 2 cores it was not measured."""

_OMP_PAUSE_SOFT = 1
"""Of OpenMP 5.0's omp.h."""


def set_num_threads(wanted: int | None) -> int:
    """Use so many threads for what the calling thread computes, and say how many; None: as many as is wise.

    That is one a physical core, of those this process may use (its affinity, a container's quota), less one from
    4 cores up; and never more than OMP_NUM_THREADS or an earlier `torch.set_num_threads` says. torch keeps the number
    per thread, so this must be called in the one that runs the model.
    """
    chosen = wanted or min(torch.get_num_threads(), default_num_threads())
    torch.set_num_threads(chosen)
    if chosen > (usable := loky.cpu_count()):
        logger.warning(
            "%d threads on %d usable CPUs wait for each other in every step, which then takes several times as long; "
            "num_threads of at most %d would be faster",
            chosen,
            usable,
            default_num_threads(),
        )
    return chosen


def end_idle_workers() -> None:
    """End the threads that helped the calling thread to compute; they are made anew when it computes again.

    They only sleep, but GNU's OpenMP counts them: with more of its threads than CPUs none of them spins any more while
    it waits for the others: on 2 cores, steps of the engine's own thread took 50 ms instead of 34.
    Does nothing where torch brings another OpenMP.
    """
    for library in (Path(torch.__file__).parent / "lib").glob("libgomp*.so*"):
        ctypes.CDLL(str(library)).omp_pause_resource_all(_OMP_PAUSE_SOFT)


def default_num_threads() -> int:
    cores: int = loky.cpu_count(only_physical_cores=True)
    is_chosen = "OMP_NUM_THREADS" in os.environ
    return cores if is_chosen or cores < _SHARED_FROM else cores - 1
