"""How many CPU threads torch computes with.

The threads of a step wait for each other many times in it, so one thread more than there are free cores makes every
step several times slower (measured on 2 cores: 6 to 7 times, beside one busy process), while one thread less costs
its share at most.
"""

from __future__ import annotations

import logging
import os

import loky
import torch

logger = logging.getLogger(__name__)

_SHARED_FROM = 4
"""Cores from which one is left to the event loop and its clients. Measured: 2 threads on 2 cores give 1.3 to 1.5 times
the tokens of 1, with a busy server beside them, which itself takes a fifth of a core. From 4 cores up the same fifth,
for which all threads wait, costs about as much as a core left free."""


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


def default_num_threads() -> int:
    cores: int = loky.cpu_count(only_physical_cores=True)
    is_chosen = "OMP_NUM_THREADS" in os.environ
    return cores if is_chosen or cores < _SHARED_FROM else cores - 1
