"""Shared helpers of the simulation tests."""

from __future__ import annotations

from random import Random
from typing import Any

from chatstream.scheduler import Scheduler, SchedulerSettings
from chatstream.simulation import Call, EngineModel, Run, Simulation

NO_WATCHDOG: dict[str, Any] = {"stall_timeout_s": None, "abort_timeout_s": None}
"""Settings without watchdogs: a simulated engine neither hangs nor ignores an abort."""


def scheduler(**settings: Any) -> Scheduler:
    return Scheduler(SchedulerSettings(**NO_WATCHDOG | {"max_queue_size": 1_000_000} | settings))


def run(calls: list[Call], *, engine: EngineModel | None = None, simulation: Any = (), **settings: Any) -> Run:
    return Simulation(scheduler=scheduler(**settings), engine_model=engine or EngineModel(), **dict(simulation)).run(
        calls
    )


def poisson(count: int, rate_per_s: float, seed: int = 1, *, mean_tokens: float = 100.0) -> list[Call]:
    """Return calls with exponential gaps and lengths and without prompts."""
    rng, now_s, calls = Random(seed), 0.0, []
    for _ in range(count):
        now_s += rng.expovariate(rate_per_s)
        tokens = max(1, round(rng.expovariate(1 / mean_tokens)))
        calls.append(Call(now_s, 0, tokens, client=f"c{rng.randrange(5)}"))
    return calls
