"""Generations that are preempted and go on, through the shell: exact limits, no token lost, nothing left behind."""

from __future__ import annotations

import asyncio
import random

import pytest

from chatstream.runtime import RuntimeSettings
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, Fault
from chatstream.types import Done, Failed, GenerationRequest, Queued, Started
from tests.runtime.house import House, in_virtual_time, kinds, read, text


def scripts(**lengths: int) -> FakeEngine:
    def script(request: GenerationRequest) -> list[str]:
        return [f"{request.request_id}{n} " for n in range(lengths[request.request_id])]

    return FakeEngine(script, step_s=0.1)


def sliced(engine: FakeEngine, **settings: object) -> House:
    return House(engine, can_preempt=True, **{"max_concurrency": 1, "slice_tokens": 12} | settings)


@in_virtual_time
async def test_a_short_answer_does_not_wait_for_the_end_of_a_long_one() -> None:
    house = sliced(scripts(long=40, short=3))
    long, short = house.submit("long"), house.submit("short")
    events = await read(short)
    [started] = [e for e in events if isinstance(e, Started)]
    assert started.waited_seconds == pytest.approx(1.2)
    assert text(await read(long)) == "".join(f"long{n} " for n in range(40))
    assert house.engine.peak_active == 1, "one slot: at no time do two of them generate"
    assert [type(e) for e in house.log if isinstance(e, ev.Preempted | ev.Resumed)] == [ev.Preempted, ev.Resumed]
    await house.check_nothing_is_left()


@in_virtual_time
async def test_without_slices_it_does_wait() -> None:
    """The baseline."""
    house = House(scripts(long=40, short=3), max_concurrency=1)
    long, short = house.submit("long"), house.submit("short")
    [started] = [e for e in await read(short) if isinstance(e, Started)]
    assert started.waited_seconds == pytest.approx(4.0)
    await read(long)


@in_virtual_time
async def test_a_client_sees_no_difference_but_the_pause() -> None:
    house = sliced(scripts(long=20, short=3))
    long, short = house.submit("long"), house.submit("short")
    events = await read(long)
    assert kinds(events) == ["started", *["token"] * 20, "done"], "started is told once"
    await read(short)
    await house.check_nothing_is_left()


@pytest.mark.parametrize("after_s", [1.25, 1.4, 1.7])
@in_virtual_time
async def test_a_client_that_leaves_while_it_is_preempted_frees_everything(after_s: float) -> None:
    house = sliced(scripts(long=40, other=10))
    long, other = house.submit("long"), house.submit("other")
    await asyncio.sleep(after_s)
    assert house.worker.stats().preempted == 1
    long.close()
    assert isinstance(long.end, Failed)
    assert isinstance((await read(other))[-1], Done)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_stop_lets_the_preempted_ones_finish_within_the_grace_and_cuts_them_after_it() -> None:
    for grace_s, end in ((60.0, "done"), (0.1, "error")):
        house = sliced(scripts(long=20, short=10))
        streams = [house.submit("long"), house.submit("short")]
        await asyncio.sleep(1.3)
        assert house.worker.stats().preempted == 1
        await house.worker.stop(grace_s)
        assert [kinds(await read(stream))[-1] for stream in streams] == [end, end]
        await house.check_nothing_is_left()


@in_virtual_time
async def test_an_engine_that_fails_after_it_was_resumed_ends_that_request_only() -> None:
    def script(request: GenerationRequest) -> list[object]:
        return ["x "] * 15 + [RuntimeError("boom")] if request.request_id == "long" else ["y "] * 3

    house = sliced(FakeEngine(script, step_s=0.1))  # type: ignore[arg-type]
    long, short = house.submit("long"), house.submit("short")
    assert kinds(await read(short))[-1] == "done"
    assert kinds(await read(long))[-1] == "error"
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_reader_that_has_stopped_does_not_keep_its_generation_from_making_room() -> None:
    """It was taken for an engine that does not preempt, and its slot was lost for as long as the reader stood still."""
    house = House(
        scripts(long=40, short=3),
        can_preempt=True,
        max_concurrency=1,
        slice_tokens=12,
        abort_timeout_s=5.0,
        runtime=RuntimeSettings(max_buffered_tokens=11, reader_stall_timeout_s=60.0),
    )
    long, short = house.submit("long"), house.submit("short")  # nobody reads the long one
    events = await read(short)
    assert isinstance(events[-1], Done)
    [started] = [e for e in events if isinstance(e, Started)]
    assert started.waited_seconds == pytest.approx(1.2)
    assert house.worker.stats().slots_reclaimed == 0
    long.close()
    await asyncio.sleep(0.1)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_nobody_takes_over_a_slot_after_its_time() -> None:
    """The successor of a slice was started before its deadline was looked at."""
    house = sliced(scripts(long=40, late=3), slice_tokens=15)
    long = house.submit("long")
    await asyncio.sleep(0.35)
    late = house.submit("late", max_wait_s=1.15)  # its time and the end of the slice fall together
    [end] = [e for e in await read(late) if isinstance(e, Failed)]
    assert end.error.code == "queue_timeout"
    long.close()
    await house.check_nothing_is_left()


@in_virtual_time
async def test_places_that_grow_are_told_too() -> None:
    """Under `priority` the others kept hearing a place that they had lost."""
    house = House(FakeEngine(["x"] * 100, step_s=1.0), max_concurrency=1, max_queue_size=9, policy="priority")
    running, waiting = house.submit("runs"), house.submit("waits")
    places: list[int] = []

    async def watch() -> None:
        places.extend([e.position async for e in waiting if isinstance(e, Queued)])

    watching = asyncio.create_task(watch())
    await asyncio.sleep(2.0)
    urgent = [house.submit(f"urgent {n}", priority=5) for n in range(3)]
    await asyncio.sleep(2.0)
    for stream in (running, waiting, *urgent):
        stream.close()
    await watching
    assert places == [1, 4]
    await house.check_nothing_is_left()


@in_virtual_time
async def test_changes_are_logged_with_who_and_why(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", logger="chatstream")
    house = House(FakeEngine(["x "] * 400, step_s=0.2), max_concurrency=4, adaptive="on", itl_target_s=0.05)
    caplog.clear()
    house.worker.set_limits(max_concurrency=3, by="admin", why="quiet night")
    house.worker.set_policy("fair", by="cron")
    house.worker.set_paused(True)
    house.worker.set_paused(False)
    streams = [house.submit(f"r{n}") for n in range(3)]
    await asyncio.gather(*map(read, streams))
    words = [record.getMessage() for record in caplog.records]
    assert words[:4] == [
        "max_concurrency is 3, max_queue_size 5 (admin: quiet night)",
        "the policy is fair (cron)",
        "paused: new requests are rejected",
        "unpaused: new requests are admitted",
    ]
    change = "max_concurrency is 2, max_queue_size 5 (adaptive: p90 of the gaps between tokens was 200 ms"
    assert words[4].startswith(change)


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
    house = sliced(
        engine, max_concurrency=2, max_queue_size=60, policy=policy, slice_tokens=4, max_resident=5, stall_timeout_s=9.0
    )

    async def client(name: str) -> None:
        await asyncio.sleep(rng.uniform(0, 20))
        stream = house.submit(name, client=f"c{rng.randint(0, 4)}", priority=rng.randint(-2, 2))
        if rng.random() < 0.2:
            asyncio.get_running_loop().call_later(rng.uniform(0, 10), stream.close)
        seen = text(await read(stream))
        generated = "".join(engine.generated.get(name, []))
        assert generated.startswith(seen)
        if isinstance(stream.end, Done):
            assert seen == generated == "".join(f"{name}.{n} " for n in range(lengths[name]))

    await asyncio.gather(*map(client, lengths))
    assert sum(isinstance(e, ev.Preempted) for e in house.log) > 20
    # A slot that was taken from an engine that hangs is somebody else's before that engine knows.
    assert engine.peak_active <= 2 or house.worker.stats().slots_reclaimed
    await house.check_nothing_is_left()
