"""M9: simulated requests per second of CPU, as in `chatstream simulate`.

The scheduler of the server with `conv` at 0.8 of the capacity of 4 slots and a queue of 20. With an SLO, admission
estimates the distribution of the wait at every arrival, which is most of the work; no goal was set for that.
"""

from __future__ import annotations

import time

from chatstream.scheduler import Scheduler, SchedulerSettings
from chatstream.simulation import WORKLOADS, EngineModel, Simulation

LOAD = 0.8
SLOTS = 4
QUEUE_SIZE = 20
SLO_S = 30.0
GOAL_PER_S = 10_000

VARIANTS: dict[str, float | None] = {
    f"{LOAD:g}x, {SLOTS} slots, {QUEUE_SIZE} positions": None,
    "the same with an SLO (ETA distribution at every arrival)": SLO_S,
}
"""SLO by label. The first one has the goal."""


def requests_per_s(ttft_slo_s: float | None, hours: float) -> float:
    """Return simulated requests per second of CPU over `hours` of virtual time, without drawing the calls."""
    calls = WORKLOADS["conv"].calls_at_load(LOAD, EngineModel(), SLOTS, seed=1, duration_s=hours * 3600)
    # A simulated engine neither hangs nor ignores an abort.
    settings = SchedulerSettings(
        max_concurrency=SLOTS,
        max_queue_size=QUEUE_SIZE,
        ttft_slo_s=ttft_slo_s,
        stall_timeout_s=None,
        abort_timeout_s=None,
    )
    simulation = Simulation(scheduler=Scheduler(settings), is_exact=ttft_slo_s is not None)
    begin_s = time.process_time()
    simulation.run(calls)
    return len(calls) / (time.process_time() - begin_s)
