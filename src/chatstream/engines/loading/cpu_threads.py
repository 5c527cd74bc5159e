"""The number of CPU threads of an engine.

The threads of a step synchronise many times. One thread more than there are free cores therefore makes every step
several times slower (measured with torch on 2 cores, with one other busy process: 6 to 7 times). One thread fewer costs
at most its share.
"""

from __future__ import annotations

import logging
import os

import loky

logger = logging.getLogger(__name__)

_MIN_CORES_TO_RESERVE_ONE = 4
"""From this number of cores on, one core is reserved for the event loop and its clients. On 2 cores, 2 threads
generated 1.3 to 1.5 times the tokens of 1 thread, with a server and 64 clients on the same machine, which slowed the
steps by about a fifth. One of five cores is worth a fifth, so the break-even point is near 5. Not measured on more than
2 cores."""


def choose_num_threads(wanted: int | None) -> int:
    """`wanted`, with a warning if it exceeds the usable CPUs. None: the default.

    The default is one thread per physical core that this process may use (CPU affinity, quota of the container), minus
    one from 4 cores on, and at most OMP_NUM_THREADS.
    """
    default = _default_num_threads()
    if wanted is not None and wanted > (usable := loky.cpu_count()):
        logger.warning(
            "num_threads is %d, but only %d CPUs are usable: every step takes several times as long; "
            "set num_threads to at most %d",
            wanted,
            usable,
            default,
        )
    return default if wanted is None else wanted


def _default_num_threads() -> int:
    cores: int = loky.cpu_count(only_physical_cores=True)
    omp = os.environ.get("OMP_NUM_THREADS", "").partition(",")[0].strip()  # one number for each level of nesting
    if omp.isdecimal():
        return max(1, min(cores, int(omp)))
    return cores if cores < _MIN_CORES_TO_RESERVE_ONE else cores - 1
