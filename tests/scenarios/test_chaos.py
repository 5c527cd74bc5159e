"""Thousands of requests under random faults: nothing leaks, and each request ends exactly once.

Requests run in virtual time under every policy, with time slices, client limits, resumable streams and changes by an
operator, then over real sockets. Clients disconnect while they wait and while they stream, reconnect, cancel by id, and
read slowly or not at all. The engine raises, hangs, is lost, or ends too early. `History` replays every log, including
that of the real server. Each test names its seed, and equal seeds give equal runs.
"""

from __future__ import annotations

import logging
import random
import resource
from collections import Counter
from collections.abc import Iterator, Sequence

import pytest

from chatstream import ChatStream, RuntimeSettings, SchedulerSettings
from chatstream.scheduler import QUEUES
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, History
from chatstream.testing.fake_engine import Step
from chatstream.types import GenerationRequest
from tests.e2e.server import serve
from tests.scenarios.chaos import (
    CoreChaos,
    SocketChaos,
    num_open_files,
    random_script,
    random_settings,
    run_shell_chaos,
)


@pytest.fixture(autouse=True)
def _without_a_log() -> Iterator[None]:
    """Disable logging: the faults cause thousands of messages."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("policy", QUEUES)
def test_the_scheduler_survives_random_calls(policy: str) -> None:
    run = CoreChaos(20, 2_000, **(random_settings(random.Random(20)) | {"policy": policy}))
    run.run()
    stats = run.scheduler.stats()
    assert min(stats.finished, stats.rejected, stats.cancelled, stats.failed, stats.expired, stats.requeued) > 20
    assert stats.slots_reclaimed > 20
    assert stats.stale_reports > 100


def test_five_thousand_requests_in_virtual_time_leak_nothing() -> None:
    run = run_shell_chaos(seed=1, num_requests=5_000)
    stats = run.house.worker.stats()
    # Every kind of end must occur often.
    assert stats.finished > 1_500
    assert min(stats.rejected, stats.cancelled, stats.failed, stats.expired, stats.requeued) > 50
    assert stats.slots_reclaimed > 20
    assert set(run.outcomes) >= {"done", "cancelled", "engine_error", "engine_unavailable", "queue_full", "paused"}


@pytest.mark.parametrize("policy", QUEUES)
def test_each_policy_with_time_slices_and_client_limits_leaks_nothing(policy: str) -> None:
    run = run_shell_chaos(
        seed=10,
        num_requests=1_000,
        policy=policy,
        slice_tokens=2,
        max_running_per_client=2,
        max_waiting_per_client=4,
    )
    kinds = Counter(type(event) for event in run.house.log)
    assert min(kinds[ev.Preempted], kinds[ev.Resumed], kinds[ev.Requeued]) > 10
    assert run.outcomes["client_limit"] > 0
    assert run.faults["client comes back"] > 50


@pytest.mark.parametrize("seed", range(2, 6))
def test_the_same_seed_gives_the_same_log(seed: int) -> None:
    overrides = random_settings(random.Random(seed))
    assert run_shell_chaos(seed, 300, **overrides).digest() == run_shell_chaos(seed, 300, **overrides).digest()


# --- over real sockets ----------------------------------------------------------------------------------------------


@pytest.mark.anyio
@pytest.mark.parametrize(
    ("num_requests", "overrides"),
    [
        (1_500, {}),
        (500, {"policy": "fair-token", "slice_tokens": 2, "max_running_per_client": 3}),
    ],
    ids=["first come, first served", "fair-token"],
)
async def test_requests_over_real_sockets_leak_nothing(num_requests: int, overrides: dict[str, object]) -> None:
    rng = random.Random(7)
    faults: Counter[str] = Counter()
    scripts: dict[str, Sequence[Step]] = {}

    def script(request: GenerationRequest) -> Sequence[Step]:
        return scripts.setdefault(request.request_id, random_script(rng, 0.05, faults))

    engine = FakeEngine(script, step_s=0.001)
    settings = SchedulerSettings(
        max_concurrency=4, max_queue_size=40, max_wait_s=5.0, stall_timeout_s=0.2, abort_timeout_s=5.0, **overrides
    )
    chat_stream = ChatStream(engine=engine, scheduler=settings, runtime=RuntimeSettings(resume_grace_s=1.0))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    with serve(chat_stream) as server:
        server.history.is_fcfs = settings.policy == "fcfs"
        server.history.has_slices = True
        server.history.max_running_per_client = settings.max_running_per_client
        files_before = num_open_files()
        run = SocketChaos(server, engine, seed=8)
        await run.run(num_requests, at_once=min(60, soft // 4))
        await server.until_idle()
        assert not engine.active
        await server.until(lambda: num_open_files() <= files_before + 2)
        await server.until(lambda: not any(chat_stream.records().values()))
    stats = chat_stream.stats()
    assert stats.received == stats.rejected + stats.finished + stats.cancelled + stats.failed + stats.expired
    assert sum(run.outcomes.values()) == num_requests
    assert {
        kind for kind in ("done", "error", "disconnected", "old done", "openai 200") if run.outcomes[kind] < 5
    } == set()
    assert server.history.peak_running <= 4
    check_replay(server.log, settings)


def check_replay(log: Sequence[ev.Event], settings: SchedulerSettings) -> None:
    """Replay the complete log of the server."""
    history = History(
        settings.first_concurrency,
        int(settings.max_queue_size),
        is_fcfs=settings.policy == "fcfs",
        has_slices=True,
        max_running_per_client=settings.max_running_per_client,
    )
    history.feed(log)
    history.check_complete()
    ends = Counter(e.request_id for e in log if isinstance(e, ev.Finished | ev.Cancelled | ev.Failed | ev.Expired))
    assert set(ends.values()) == {1}
