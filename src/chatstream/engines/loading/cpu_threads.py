"""How many CPU threads an engine computes with.

The threads of a step wait for each other many times in it, so one thread more than there are free cores makes every
step several times slower (measured on 2 cores with torch: 6 to 7 times, beside one busy process), while one thread less
costs its share at most.
"""

from __future__ import annotations

import logging
import os

import loky

logger = logging.getLogger(__name__)

_SHARED_FROM = 4
"""Cores from which one is left to the event loop and its clients. On 2 cores both are taken: that gave 1.3 to 1.5 times
the tokens of one thread, with a server and 64 clients beside it, which slowed the steps by about a fifth. A fifth is
what one core in five is worth, so somewhere there it turns round; with more than 2 cores it was not measured."""


def choose_num_threads(wanted: int | None) -> int:
    """As many as are wanted, with a warning when that are too many; None: as many as is wise.

    That is one a physical core, of those this process may use (its affinity, a container's quota), less one from
    4 cores up; and never more than OMP_NUM_THREADS says.
    """
    wise = _wise_num_threads()
    if wanted is not None and wanted > (usable := loky.cpu_count()):
        logger.warning(
            "%d threads on %d usable CPUs wait for each other in every step, which then takes several times as long; "
            "num_threads of at most %d would be faster",
            wanted,
            usable,
            wise,
        )
    return wise if wanted is None else wanted


def _wise_num_threads() -> int:
    cores: int = loky.cpu_count(only_physical_cores=True)
    told = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number for each level of nesting
    if told.isdecimal():
        return max(1, min(cores, int(told)))
    return cores if cores < _SHARED_FROM else cores - 1
