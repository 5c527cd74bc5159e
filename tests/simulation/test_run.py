"""The simulation loop: deterministic, without lost requests, and consistent with queueing theory."""

from __future__ import annotations

import hashlib
from collections import Counter
from itertools import pairwise
from math import factorial
from typing import Any

import pytest

from chatstream.scheduler import Arrival
from chatstream.scheduler import events as ev
from chatstream.simulation import WORKLOADS, Call, ClientBehaviour, EngineModel, LeakedRequest, Simulation
from chatstream.testing import History
from tests.simulation.builders import poisson, run, scheduler

ENGINE = EngineModel()
CHAT = WORKLOADS["conv"]
POLICIES = ["fcfs", "fair", "priority", "spf"]


def log_of(seed: int, **settings: Any) -> list[ev.Event]:
    calls = CHAT.calls_at_load(1.5, ENGINE, 3, seed=seed, duration_s=400)
    log: list[ev.Event] = []
    clients = ClientBehaviour(max_attempts=3, patience_s=8)
    core = scheduler(**{"max_concurrency": 3, "max_queue_size": 6} | settings)
    Simulation(scheduler=core, engine_model=ENGINE, clients=clients, seed=seed, log=log.append).run(calls)
    return log


def digest(log: list[ev.Event]) -> str:
    return hashlib.sha256(repr(log).encode()).hexdigest()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_same_seed_gives_the_same_decisions(policy: str) -> None:
    first, second, other = (digest(log_of(seed, policy=policy)) for seed in (1, 1, 2))
    assert first == second
    assert first != other


@pytest.mark.parametrize("policy", POLICIES)
def test_the_log_is_valid_for_a_correct_scheduler(policy: str) -> None:
    log = log_of(3, policy=policy, max_wait_s=15.0)
    history = History(max_concurrency=3, max_queue_size=6, is_fcfs=policy == "fcfs")
    history.feed(log)
    kinds = Counter(type(event) for event in log)
    assert min(kinds[kind] for kind in (ev.Finished, ev.Rejected, ev.Cancelled)) > 10, "each of these must occur often"


def test_every_call_ends_once_and_is_counted() -> None:
    calls = CHAT.calls_at_load(2.0, ENGINE, 2, seed=1, duration_s=1000)
    core = scheduler(max_concurrency=2, max_queue_size=4, max_wait_s=10.0)
    records = Simulation(scheduler=core, engine_model=ENGINE).run(calls).records
    ends = Counter(record.end for record in records)
    stats = core.stats()
    assert [record.call for record in records] == calls
    assert (ends["finished"], ends["expired"]) == (stats.finished, stats.expired)
    assert ends["queue_full"] + ends["infeasible"] == stats.rejected > 100
    assert sum(ends.values()) == ends["finished"] + ends["expired"] + stats.rejected == len(calls)
    assert (stats.running, stats.waiting) == (0, 0)


def test_exactly_the_finished_calls_have_all_their_tokens() -> None:
    for record in run(poisson(300, 1.0), max_concurrency=2, max_wait_s=20.0).records:
        assert (record.generated_tokens == record.call.output_tokens) == (record.end == "finished")


@pytest.mark.parametrize("policy", POLICIES)
def test_no_slot_is_free_while_a_request_waits(policy: str) -> None:
    core = scheduler(max_concurrency=3, policy=policy)
    idle: list[float] = []

    def watch(now_s: float) -> None:
        stats = core.stats()
        if stats.running < 3 and stats.waiting:
            idle.append(now_s)

    result = Simulation(scheduler=core, engine_model=ENGINE, watch=watch).run(poisson(400, 2.0))
    assert idle == []
    assert max(record.waited_s or 0.0 for record in result.records) > 10, "some requests must wait"


# --- queueing theory --------------------------------------------------------------------------------------------------


def erlang_c_wait_s(rate_per_s: float, service_s: float, slots: int) -> float:
    """Return the mean wait in M/M/c (Erlang 1917)."""
    offered = rate_per_s * service_s
    all_busy = offered**slots / factorial(slots) / (1 - offered / slots)
    p_wait = all_busy / (sum(offered**k / factorial(k) for k in range(slots)) + all_busy)
    return p_wait / (slots / service_s - rate_per_s)


def mean_wait_s(calls: list[Call], slots: int) -> float:
    waits_s = [record.waited_s or 0.0 for record in run(calls, max_concurrency=slots, simulation=FINE).records]
    return sum(waits_s) / len(waits_s)


FINE = {"grain_tokens": 10**9}


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_poisson_arrivals_have_the_mean_wait_of_erlang_c(slots: int) -> None:
    service_s = 2.0  # 100 tokens at 0.02 s
    rate_per_s = 0.6 * slots / service_s
    measured_s = sum(mean_wait_s(poisson(5_000, rate_per_s, seed), slots) for seed in range(4)) / 4
    assert measured_s == pytest.approx(erlang_c_wait_s(rate_per_s, service_s, slots), rel=0.08)


def test_constant_service_times_halve_the_wait() -> None:
    """The formula of Pollaczek and Khinchine; it also shows that the test above distinguishes the two cases."""
    rate_per_s, service_s = 0.3, 2.0
    calls = [call._replace(output_tokens=100) for call in poisson(10_000, rate_per_s)]
    assert mean_wait_s(calls, 1) == pytest.approx(erlang_c_wait_s(rate_per_s, service_s, 1) / 2, rel=0.08)


# --- clients ----------------------------------------------------------------------------------------------------------


def test_a_rejected_client_retries_after_retry_after_with_jitter() -> None:
    rejections: list[tuple[float, float]] = []

    def log(event: ev.Event) -> None:
        if isinstance(event, ev.Rejected):
            rejections.append((event.at_s, event.retry_after_s or 0.0))

    arrivals: list[float] = []
    core = scheduler(max_concurrency=1, max_queue_size=0)
    submit = core.submit

    def remember(arrival: Arrival, now_s: float) -> None:
        arrivals.append(now_s)
        submit(arrival, now_s)

    core.submit = remember  # type: ignore[method-assign]
    clients = ClientBehaviour(max_attempts=5, jitter=0.3)
    calls = [Call(0.0, 0, 200), Call(1.0, 0, 50)]
    records = Simulation(scheduler=core, clients=clients, log=log).run(calls).records
    assert records[1].end == "finished"
    assert records[1].attempts == len(rejections) + 1 > 1
    for (rejected_s, retry_after_s), retried_s in zip(rejections, arrivals[2:], strict=True):
        assert retry_after_s <= retried_s - rejected_s <= 1.3 * retry_after_s
    assert records[1].ttft_s is not None
    assert records[1].ttft_s >= rejections[0][1], "the time counts from the first attempt"


def test_a_client_gives_up_after_its_last_attempt() -> None:
    clients = ClientBehaviour(max_attempts=3, retry_delay_s=0.1)
    calls = [Call(0.0, 0, 1000), Call(1.0, 0, 50)]
    record = run(calls, max_concurrency=1, max_queue_size=0, simulation={"clients": clients}).records[1]
    assert (record.attempts, record.end) == (3, "queue_full")


def test_a_client_gives_up_if_the_retry_exceeds_its_patience() -> None:
    clients = ClientBehaviour(max_attempts=9, retry_delay_s=4.0, jitter=0.0, patience_s=10)
    calls = [Call(0.0, 0, 1000), Call(1.0, 0, 50)]
    record = run(calls, max_concurrency=1, max_queue_size=0, simulation={"clients": clients}).records[1]
    assert (record.attempts, record.end, record.ended_s) == (3, "queue_full", 9.0)


@pytest.mark.parametrize("is_noticed", [True, False])
def test_an_impatient_client_frees_its_position_if_the_disconnect_is_noticed(is_noticed: bool) -> None:
    """Three calls of 20 s on one slot; the second client gives up after 10 s."""
    calls = [Call(0.0, 0, 1000), Call(0.1, 0, 1000), Call(0.2, 0, 1000)]
    clients = ClientBehaviour(patience_s=10)
    options = {"clients": clients, "notices_disconnects": is_noticed}
    core = scheduler(max_concurrency=1)
    simulation = Simulation(scheduler=core, **options)
    records = simulation.run([calls[0], calls[1], calls[2]._replace(at_s=11.0)]).records
    assert records[1].end == "abandoned"
    assert records[1].ended_s == pytest.approx(10.1)
    if is_noticed:
        assert records[2].started_s == pytest.approx(20.0)
    else:  # the abandoned request is served first
        assert records[2].end == "abandoned"


def test_a_client_that_gives_up_during_prefill_releases_its_slot_at_once() -> None:
    calls = [Call(0.0, 60_000, 10), Call(1.0, 0, 10)]
    records = run(calls, max_concurrency=1, simulation={"clients": ClientBehaviour(patience_s=30)}).records
    assert records[0].end == "abandoned"
    assert records[1].started_s == pytest.approx(30.0)


# --- interventions ----------------------------------------------------------------------------------------------------


def test_an_intervention_happens_at_its_time() -> None:
    calls = [Call(0.0, 0, 1000), Call(0.0, 0, 1000)]

    def widen(simulation: Simulation, now_s: float) -> None:
        simulation.scheduler.set_limits(now_s, max_concurrency=2)  # type: ignore[attr-defined]

    records = run(calls, max_concurrency=1, simulation={"interventions": [(5.0, widen)]}).records
    assert records[1].started_s == 5.0


def test_a_leaked_request_is_an_error() -> None:
    core = scheduler(max_concurrency=1)
    core.on_ended = lambda *arguments: None  # type: ignore[method-assign]
    with pytest.raises(LeakedRequest):
        Simulation(scheduler=core).run([Call(0.0, 0, 10)])


def test_time_slices_lose_no_work() -> None:
    """Two answers of 20 s on one slot, in slices of 2 s, alternate and end within 40 s."""
    calls = [Call(0.0, 0, 1000), Call(0.0, 0, 1000)]
    result = run(calls, max_concurrency=1, slice_tokens=100, max_resident=2, simulation={"grain_tokens": 10})
    first, second = result.records
    assert (first.ended_s, second.ended_s) == (pytest.approx(38.0), pytest.approx(40.0))
    assert (first.generated_tokens, second.generated_tokens) == (1000, 1000)
    assert first.num_preempted >= 9


@pytest.mark.parametrize("interval_s", [5.0, 1e-9])
def test_samples_are_even_and_bounded_in_a_long_run(interval_s: float) -> None:
    """100 simultaneous calls keep two slots busy for 10,000 seconds."""
    samples = run([Call(0.0, 0, 10_000)] * 100, max_concurrency=2, simulation={"sample_every_s": interval_s}).samples
    gaps_s = {later.at_s - earlier.at_s for earlier, later in pairwise(samples)}
    assert 500 <= len(samples) <= 1_000
    assert max(gaps_s) == pytest.approx(min(gaps_s))
    assert samples[-1].at_s > 9_900
    waiting = [sample.waiting for sample in samples[1:]]
    assert waiting == sorted(waiting, reverse=True)
