"""M9: how many requests a second of this machine's CPU simulates, as `chatstream simulate` runs them.

The scheduler of the server and `conv` at 0.8 of what 4 slots can do, 20 places. With an SLO every arrival is judged by
the distribution of its wait, which is most of the work; no goal was set for that.
"""

from __future__ import annotations

import time

from chatstream.scheduler import Scheduler, SchedulerSettings
from chatstream.simulation import WORKLOADS, EngineModel, Simulation

LOAD = 0.8
SLOTS = 4
PLACES = 20
SLO_S = 30.0
GOAL_PER_S = 10_000

VARIANTS: dict[str, float | None] = {
    f"{LOAD:g}x, {SLOTS} slots, {PLACES} places": None,
    "the same with an SLO: every arrival is judged by its wait": SLO_S,
}
"""Name: the SLO. The first one has the goal."""


def requests_per_s(ttft_slo_s: float | None, hours: float) -> float:
    """Requests for a second of CPU, in so many hours of virtual time; the calls are drawn before."""
    calls = WORKLOADS["conv"].calls_at_load(LOAD, EngineModel(), SLOTS, seed=1, duration_s=hours * 3600)
    # A simulated engine neither hangs nor holds on.
    settings = SchedulerSettings(
        max_concurrency=SLOTS,
        max_queue_size=PLACES,
        ttft_slo_s=ttft_slo_s,
        stall_timeout_s=None,
        abort_timeout_s=None,
    )
    simulation = Simulation(scheduler=Scheduler(settings), is_exact=ttft_slo_s is not None)
    begin_s = time.process_time()
    simulation.run(calls)
    return len(calls) / (time.process_time() - begin_s)
