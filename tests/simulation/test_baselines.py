"""The baselines of the benchmark give the same results as our scheduler under the same rule."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from chatstream.simulation import WORKLOADS, Call, ClientBehaviour, EngineModel, Simulation
from tests.simulation.builders import scheduler

ENGINE = EngineModel(slowdown_per_slot=1.0, prefill_chunk_tokens=256)


@pytest.fixture
def fifo(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(Path(__file__).parents[2] / "benchmarks"), *sys.path])
    from baselines import Fifo  # type: ignore[import-not-found]

    return Fifo


def ends(core: Any, calls: list[Call], clients: ClientBehaviour) -> list[tuple[str, float | None, float | None]]:
    records = Simulation(scheduler=core, engine_model=ENGINE, clients=clients).run(calls).records
    return [(record.end, record.started_s, record.ended_s) for record in records]


@pytest.mark.parametrize(
    ("rule", "settings", "clients"),
    [
        ({}, {}, ClientBehaviour()),
        ({"bound": 5}, {"max_queue_size": 5}, ClientBehaviour()),
        ({"bound": 5}, {"max_queue_size": 5}, ClientBehaviour(max_attempts=3, retry_delay_s=1.0, patience_s=20)),
        (
            {"bound": 8, "expire_s": 20.0},
            {"max_queue_size": 8, "max_wait_s": 20.0, "admit_probability": 0.0},
            ClientBehaviour(),
        ),
    ],
)
def test_baseline_and_scheduler_agree_under_the_same_rule(
    fifo: Any, rule: dict[str, Any], settings: dict[str, Any], clients: ClientBehaviour
) -> None:
    calls = WORKLOADS["conv"].calls_at_load(1.5, ENGINE, 3, seed=1, duration_s=3000)
    theirs = ends(fifo(3, **rule), calls, clients)
    ours = ends(scheduler(max_concurrency=3, **settings), calls, clients)
    assert theirs == ours
    assert len({end for end, _, _ in ours}) == 1 + ("bound" in rule) + ("expire_s" in rule) + (
        clients.patience_s is not None
    ), "every kind of end must occur"
