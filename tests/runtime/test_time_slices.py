"""Generations that are preempted and resumed by the worker: exact limits, no token lost, nothing left behind."""

from __future__ import annotations

import asyncio
import random

import pytest

from chatstream.runtime import RuntimeSettings
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, Fault
from chatstream.types import Done, Failed, GenerationRequest, Queued, Started
from tests.runtime.harness import Harness, in_virtual_time, kinds, read, text


def scripts(**lengths: int) -> FakeEngine:
    def script(request: GenerationRequest) -> list[str]:
        return [f"{request.request_id}{n} " for n in range(lengths[request.request_id])]

    return FakeEngine(script, step_s=0.1)


def sliced(engine: FakeEngine, **settings: object) -> Harness:
    return Harness(engine, can_preempt=True, **{"max_concurrency": 1, "slice_tokens": 12} | settings)


@in_virtual_time
async def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one() -> None:
    harness = sliced(scripts(long=40, short=3))
    long, short = harness.submit("long"), harness.submit("short")
    events = await read(short)
    [started] = [e for e in events if isinstance(e, Started)]
    assert started.waited_seconds == pytest.approx(1.2)
    assert text(await read(long)) == "".join(f"long{n} " for n in range(40))
    assert harness.engine.peak_active == 1, "one slot: two requests never generate at the same time"
    assert [type(e) for e in harness.log if isinstance(e, ev.Preempted | ev.Resumed)] == [ev.Preempted, ev.Resumed]
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_baseline_without_slices_a_short_answer_waits() -> None:
    harness = Harness(scripts(long=40, short=3), max_concurrency=1)
    long, short = harness.submit("long"), harness.submit("short")
    [started] = [e for e in await read(short) if isinstance(e, Started)]
    assert started.waited_seconds == pytest.approx(4.0)
    await read(long)


@in_virtual_time
async def test_a_client_sees_no_difference_but_the_pause() -> None:
    harness = sliced(scripts(long=20, short=3))
    long, short = harness.submit("long"), harness.submit("short")
    events = await read(long)
    assert kinds(events) == ["started", *["token"] * 20, "done"], "started is sent once"
    await read(short)
    await harness.check_nothing_is_left()


@pytest.mark.parametrize("after_s", [1.25, 1.4, 1.7])
@in_virtual_time
async def test_a_client_that_disconnects_while_preempted_frees_everything(after_s: float) -> None:
    harness = sliced(scripts(long=40, other=10))
    long, other = harness.submit("long"), harness.submit("other")
    await asyncio.sleep(after_s)
    assert harness.worker.stats().preempted == 1
    long.close()
    assert isinstance(long.end, Failed)
    assert isinstance((await read(other))[-1], Done)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_stop_lets_preempted_requests_finish_within_the_grace_time_and_ends_them_after_it() -> None:
    for grace_s, end in ((60.0, "done"), (0.1, "error")):
        harness = sliced(scripts(long=20, short=10))
        streams = [harness.submit("long"), harness.submit("short")]
        await asyncio.sleep(1.3)
        assert harness.worker.stats().preempted == 1
        await harness.worker.stop(grace_s)
        assert [kinds(await read(stream))[-1] for stream in streams] == [end, end]
        await harness.check_nothing_is_left()


@in_virtual_time
async def test_an_engine_that_fails_after_it_was_resumed_ends_that_request_only() -> None:
    def script(request: GenerationRequest) -> list[object]:
        return ["x "] * 15 + [RuntimeError("boom")] if request.request_id == "long" else ["y "] * 3

    harness = sliced(FakeEngine(script, step_s=0.1))  # type: ignore[arg-type]
    long, short = harness.submit("long"), harness.submit("short")
    assert kinds(await read(short))[-1] == "done"
    assert kinds(await read(long))[-1] == "error"
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_stalled_reader_does_not_keep_its_generation_from_being_preempted() -> None:
    """The stalled reader was mistaken for an engine that does not preempt, and its slot was lost during the stall."""
    harness = Harness(
        scripts(long=40, short=3),
        can_preempt=True,
        max_concurrency=1,
        slice_tokens=12,
        abort_timeout_s=5.0,
        runtime=RuntimeSettings(max_buffered_tokens=11, reader_stall_timeout_s=60.0),
    )
    long, short = harness.submit("long"), harness.submit("short")  # the long answer is not read
    events = await read(short)
    assert isinstance(events[-1], Done)
    [started] = [e for e in events if isinstance(e, Started)]
    assert started.waited_seconds == pytest.approx(1.2)
    assert harness.worker.stats().slots_reclaimed == 0
    long.close()
    await asyncio.sleep(0.1)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_no_request_starts_after_its_deadline() -> None:
    """The next request of a slice was started before its deadline was checked."""
    harness = sliced(scripts(long=40, late=3), slice_tokens=15)
    long = harness.submit("long")
    await asyncio.sleep(0.35)
    late = harness.submit("late", max_wait_s=1.15)  # its deadline coincides with the end of the slice
    [end] = [e for e in await read(late) if isinstance(e, Failed)]
    assert end.error.code == "queue_timeout"
    long.close()
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_growing_positions_are_sent() -> None:
    """Under `priority`, overtaken requests kept their old position."""
    harness = Harness(FakeEngine(["x"] * 100, step_s=1.0), max_concurrency=1, max_queue_size=9, policy="priority")
    running, waiting = harness.submit("runs"), harness.submit("waits")
    positions: list[int] = []

    async def watch() -> None:
        positions.extend([e.position async for e in waiting if isinstance(e, Queued)])

    watching = asyncio.create_task(watch())
    await asyncio.sleep(2.0)
    urgent = [harness.submit(f"urgent {n}", priority=5) for n in range(3)]
    await asyncio.sleep(2.0)
    for stream in (running, waiting, *urgent):
        stream.close()
    await watching
    assert positions == [1, 4]
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_changes_are_logged_with_source_and_reason(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="chatstream")
    harness = Harness(FakeEngine(["x "] * 400, step_s=0.2), max_concurrency=4, adaptive="on", itl_target_s=0.05)
    caplog.clear()
    harness.worker.set_limits(max_concurrency=3, by="admin", why="quiet night")
    harness.worker.set_policy("fair", by="cron")
    harness.worker.set_paused(True)
    harness.worker.set_paused(False)
    streams = [harness.submit(f"r{n}") for n in range(3)]
    await asyncio.gather(*map(read, streams))
    messages = [record.getMessage() for record in caplog.records]
    assert messages[:4] == [
        "max_concurrency is 3, max_queue_size 5 (admin: quiet night)",
        "the policy is fair (cron)",
        "paused: new requests are rejected",
        "no longer paused: new requests are admitted",
    ]
    change = "max_concurrency is 2, max_queue_size 5 (adaptive: p90 of the gaps between tokens was 200 ms"
    assert messages[4].startswith(change)


@pytest.mark.parametrize("policy", ["fcfs", "fair", "fair-token", "priority", "spf"])
@pytest.mark.parametrize("seed", range(3))
@in_virtual_time
async def test_every_token_arrives_once_and_in_order_whatever_is_preempted_cancelled_or_broken(
    policy: str, seed: int
) -> None:
    rng = random.Random(seed)
    lengths = {f"r{n}": rng.choice([1, 3, 8, 60, 120]) for n in range(60)}

    def script(request: GenerationRequest) -> list[object]:
        words: list[object] = [f"{request.request_id}.{n} " for n in range(lengths[request.request_id])]
        fault = rng.choice([None] * 8 + [RuntimeError("boom"), RuntimeError("boom") if seed else Fault.HANG])
        return words if fault is None else [*words[: rng.randint(0, len(words))], fault]

    engine = FakeEngine(script, step_s=0.05)  # type: ignore[arg-type]
    harness = sliced(
        engine, max_concurrency=2, max_queue_size=60, policy=policy, slice_tokens=4, max_resident=5, stall_timeout_s=9.0
    )

    async def client(name: str) -> None:
        await asyncio.sleep(rng.uniform(0, 20))
        stream = harness.submit(name, client=f"c{rng.randint(0, 4)}", priority=rng.randint(-2, 2))
        if rng.random() < 0.2:
            asyncio.get_running_loop().call_later(rng.uniform(0, 10), stream.close)
        seen = text(await read(stream))
        generated = "".join(engine.generated.get(name, []))
        assert generated.startswith(seen)
        if isinstance(stream.end, Done):
            assert seen == generated == "".join(f"{name}.{n} " for n in range(lengths[name]))

    await asyncio.gather(*map(client, lengths))
    assert sum(isinstance(e, ev.Preempted) for e in harness.log) > 20
    # A slot reclaimed from a hanging engine is reused before that engine notices.
    assert engine.peak_active <= 2 or harness.worker.stats().slots_reclaimed
    await harness.check_nothing_is_left()
