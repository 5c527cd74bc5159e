"""The shell: what a client sees of its request, and what is left when it is gone."""

from __future__ import annotations

import asyncio
from itertools import pairwise

import pytest

from chatstream.errors import (
    Cancelled,
    ConfigError,
    EngineError,
    EngineUnavailable,
    PromptTooLong,
    QueueFull,
    QueueTimeout,
    ShuttingDown,
)
from chatstream.runtime import QueueWorker, RuntimeSettings
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, Fault
from chatstream.types import Done, Failed, FinishReason, Queued, Started, Usage
from tests.runtime.house import House, in_virtual_time, kinds, read, text


@in_virtual_time
async def test_a_request_that_need_not_wait_is_told_started_tokens_done() -> None:
    house = House()
    events = await read(house.submit("a"))
    assert kinds(events) == ["started", "token", "token", "token", "done"]
    assert events[0] == Started("a", 0.0)
    assert events[-1] == Done("a", "", FinishReason.STOP, Usage(0, 3))
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_waiting_request_is_told_its_place_and_starts_the_moment_a_slot_is_free() -> None:
    house = House(max_concurrency=1)
    first, second = house.submit("a"), house.submit("b")
    events = await read(second)
    assert events[:2] == [Queued("b", 1), Started("b", pytest.approx(0.3))]
    assert kinds(await read(first))[-1] == "done"
    end_of_a, start_of_b = [e for e in house.log if isinstance(e, ev.Finished | ev.Started) and e.at_s > 0.0][:2]
    assert (end_of_a.request_id, start_of_b.request_id) == ("a", "b")
    assert end_of_a.at_s == start_of_b.at_s
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_place_is_told_when_it_changes_and_at_most_once_a_second() -> None:
    house = House(FakeEngine(["x"] * 4, step_s=0.11), max_concurrency=1, max_queue_size=20)
    streams = [house.submit(f"r{n}") for n in range(11)]
    loop = asyncio.get_running_loop()
    told: list[tuple[float, int]] = []

    async def watch() -> None:
        told.extend([(loop.time(), e.position) async for e in streams[10] if isinstance(e, Queued)])

    await asyncio.gather(watch(), *(read(s) for s in streams[:10]))
    assert told[0] == (0.0, 10)
    positions = [position for _, position in told]
    assert positions == sorted(positions, reverse=True)
    assert len(told) >= 4
    # One of those ahead ends every 0.44 s, and what is told is true when it is told.
    assert all(position == 10 - int(at_s / 0.44 + 1e-6) for at_s, position in told)
    assert all(later - earlier >= 0.98 for (earlier, _), (later, _) in pairwise(told))
    await house.check_nothing_is_left()


@in_virtual_time
async def test_who_was_told_shortly_before_a_round_is_told_by_the_next_one() -> None:
    house = House(FakeEngine(["x"] * 10_000, step_s=0.1), max_concurrency=1, max_queue_size=20)
    house.submit("running")
    ahead = house.submit("ahead")
    await asyncio.sleep(0.9)
    last = house.submit("last")
    assert await anext(last) == Queued("last", 2)
    await asyncio.sleep(0.05)
    ahead.close()
    assert await anext(last) == Queued("last", 1)
    assert asyncio.get_running_loop().time() <= 0.9 + 1.3  # a second after it was told, and a round's distance
    last.close()
    await house.worker.stop()


@in_virtual_time
async def test_everybody_in_a_line_of_many_slices_is_told() -> None:
    house = House(is_started=False, max_concurrency=1, max_queue_size=300)
    streams = [house.submit(f"r{n}") for n in range(200)]
    await asyncio.sleep(0.7)
    late = house.submit("late")
    assert await anext(late) == Queued("late", 201, waits_for="opening")
    await asyncio.sleep(0.2)
    streams[0].close()
    async with asyncio.timeout(2.0):
        assert await anext(late) == Queued("late", 200, waits_for="opening")
    await house.worker.stop()


@in_virtual_time
async def test_a_long_line_is_sent_away_in_slices_between_which_the_others_get_their_tokens() -> None:
    """All at once, a drain of 10,000 stopped the running streams for seconds."""
    house = House(FakeEngine(["x"] * 20, step_s=0.0005), max_concurrency=1, max_queue_size=1000)
    running = asyncio.create_task(read(house.submit("runs")))
    streams = [house.submit(f"r{n}") for n in range(500)]
    await asyncio.sleep(0.001)
    house.worker.drain()
    numbers = [e.number for e in house.log if isinstance(e, ev.Cancelled)]
    assert len(numbers) == QueueWorker.DRAIN_BATCH_SIZE
    assert house.worker.stats().running == 1
    ends = await asyncio.gather(*(read(stream) for stream in streams))
    assert {events[-1].error.code for events in ends if isinstance(events[-1], Failed)} == {"shutting_down"}
    assert kinds(await running)[-1] == "done"
    of_runs = [n for n, e in enumerate(house.log) if isinstance(e, ev.Tokens)]
    of_others = [n for n, e in enumerate(house.log) if isinstance(e, ev.Cancelled)]
    assert of_others[0] < of_runs[-1] < of_others[-1], "tokens came while they were sent away"
    await house.check_nothing_is_left()


@in_virtual_time
async def test_who_was_not_sent_away_yet_is_served_when_a_drain_ends() -> None:
    house = House(FakeEngine(["x"], step_s=0.1), max_concurrency=4, max_queue_size=1000)
    streams = [house.submit(f"r{n}") for n in range(100)]
    house.worker.drain()
    house.worker.start()
    ends = [(await read(stream))[-1] for stream in streams]
    assert sum(isinstance(end, Failed) for end in ends) == QueueWorker.DRAIN_BATCH_SIZE
    await house.check_nothing_is_left()


@in_virtual_time
async def test_the_limit_is_exact_and_all_slots_are_used() -> None:
    house = House(FakeEngine(["x"] * 10, step_s=0.1), max_concurrency=3, max_queue_size=20)
    await asyncio.gather(*(read(house.submit(f"r{n}")) for n in range(12)))
    assert house.engine.peak_active == 3
    assert asyncio.get_running_loop().time() == pytest.approx(4 * 1.0, abs=0.01)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_full_line_refuses_and_holds_nothing_for_the_refused() -> None:
    house = House(max_concurrency=1, max_queue_size=1)
    held = [house.submit("a"), house.submit("b")]
    with pytest.raises(QueueFull):
        house.submit("c")
    assert house.worker.records()["jobs"] == 2
    assert "c" not in house.engine.prompts
    await asyncio.gather(*map(read, held))
    await house.check_nothing_is_left()


@in_virtual_time
async def test_requests_before_the_start_wait_and_are_served_in_order_once_it_runs() -> None:
    house = House(is_started=False, max_concurrency=1)
    streams = [house.submit(n) for n in "abc"]
    readers = [asyncio.create_task(read(s)) for s in streams]
    await asyncio.sleep(60.0)
    assert house.engine.log == []
    house.worker.start()
    await asyncio.gather(*readers)
    assert [i for _, i in house.engine.log] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    await house.check_nothing_is_left()


# --- leaving --------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_waiting_client_that_leaves_gives_up_its_place_at_once_and_never_reaches_the_engine() -> None:
    house = House(max_concurrency=1, max_queue_size=1)
    running, waiting = house.submit("a"), house.submit("b")
    waiting.close()
    third = house.submit("c")  # the place is free within the same instant
    await asyncio.gather(read(running), read(third))
    assert "b" not in house.engine.prompts
    assert [end.by for end in house.ends["b"]] == ["client_disconnected"]
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_client_that_leaves_while_it_streams_frees_its_slot_within_one_step() -> None:
    house = House(FakeEngine(["x"] * 100, step_s=0.1), max_concurrency=1)
    running, waiting = house.submit("a"), house.submit("b")
    async for event in running:
        if event.type == "token":
            break
    running.close()
    left_s = asyncio.get_running_loop().time()
    reader = asyncio.create_task(read(waiting))
    await asyncio.sleep(0.15)
    started = next(e for e in house.log if isinstance(e, ev.Started) and e.request_id == "b")
    assert started.at_s - left_s <= 0.1
    assert len(house.engine.generated["a"]) <= 2
    waiting.close()
    await reader
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_client_that_leaves_before_its_generation_took_its_first_breath_leaks_nothing() -> None:
    house = House(max_concurrency=1)
    stream = house.submit("a")
    stream.close()  # the task exists but has not run yet
    await read(house.submit("b"))
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_cancel_by_id_ends_the_stream_with_an_error_and_is_harmless_twice() -> None:
    house = House(FakeEngine(["x"] * 100, step_s=0.1))
    stream = house.submit("a")
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(1.05)
    assert house.worker.cancel("a")
    house.worker.cancel("a")
    events = await reader
    assert text(events) == "x" * 10
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, Cancelled)
    await asyncio.sleep(0.1)  # the engine lets go
    assert not house.worker.cancel("a")
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_reader_that_stops_reading_is_cut_and_frees_its_slot() -> None:
    house = House(
        FakeEngine(["x"] * 50, step_s=0.1),
        max_concurrency=1,
        runtime=RuntimeSettings(max_buffered_tokens=5, reader_stall_timeout_s=10.0),
    )
    stalled, waiting = house.submit("a"), house.submit("b")
    events = await read(waiting)
    started = next(e for e in house.log if isinstance(e, ev.Started) and e.request_id == "b")
    assert started.at_s == pytest.approx(0.6 + 10.0)
    assert kinds(events)[-1] == "done"
    events = await read(stalled)
    assert text(events) == "x" * 5  # what was buffered is still there, a prefix of what was generated
    assert isinstance(events[-1], Failed)
    assert house.ends["a"][0].by == "slow_reader"
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_slow_reader_slows_down_its_own_generation_only_and_loses_nothing() -> None:
    house = House(FakeEngine(["x"] * 20, step_s=0.1), max_concurrency=2, runtime=RuntimeSettings(max_buffered_tokens=2))
    slow, fast = house.submit("slow"), house.submit("fast")

    async def read_slowly() -> str:
        seen = ""
        async for event in slow:
            await asyncio.sleep(1.0)
            seen += event.text if event.type == "token" else ""
        return seen

    reader = asyncio.create_task(read_slowly())
    await read(fast)
    assert asyncio.get_running_loop().time() == pytest.approx(2.0)
    assert len(house.engine.generated["slow"]) < 8
    assert await reader == "x" * 20
    await house.check_nothing_is_left()


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [RuntimeError("boom"), EngineError("boom"), asyncio.CancelledError()])
@in_virtual_time
async def test_an_engine_that_fails_on_one_request_ends_that_one_and_serves_the_next(fault: BaseException) -> None:
    scripts = {"bad": ["x", fault], "good": ["y", "z"]}
    house = House(FakeEngine(lambda r: scripts[r.request_id], step_s=0.1), max_concurrency=1)  # type: ignore[arg-type]
    if isinstance(fault, asyncio.CancelledError):
        house.engine = CancellingEngine(step_s=0.1)
    bad, good = house.submit("bad"), house.submit("good")
    events = await read(bad)
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, EngineError)
    assert kinds(await read(good))[-1] == "done"
    await house.check_nothing_is_left()


class CancellingEngine(FakeEngine):
    """Cancels itself in the middle of one request, as a library with tasks of its own may do."""

    async def stream(self, request):  # type: ignore[no-untyped-def]
        async for delta in super().stream(request):
            yield delta
            if request.request_id == "bad":
                raise asyncio.CancelledError


@pytest.mark.parametrize("script", [[], ["x", Fault.HANG]])
@in_virtual_time
async def test_an_engine_that_ends_too_early_or_never_costs_one_request_not_the_slot(script: list[object]) -> None:
    engine = FakeEngine(lambda r: script if r.request_id == "bad" else ["y"], step_s=0.1)  # type: ignore[arg-type,return-value]
    house = House(engine, max_concurrency=1, stall_timeout_s=60.0)
    bad, good = house.submit("bad"), house.submit("good")
    assert isinstance((await read(bad))[-1], Failed)
    assert text(await read(good)) == "y"
    await house.check_nothing_is_left()


@in_virtual_time
async def test_an_engine_that_does_not_let_go_loses_the_slot_after_the_abort_timeout() -> None:
    house = House(
        FakeEngine(lambda r: [Fault.DEAF] if r.request_id == "deaf" else ["y"]), max_concurrency=1, abort_timeout_s=5.0
    )
    deaf, good = house.submit("deaf"), house.submit("good")
    await asyncio.sleep(1.0)
    deaf.close()
    assert text(await read(good)) == "y"
    assert asyncio.get_running_loop().time() == pytest.approx(6.0)
    assert house.worker.stats().slots_reclaimed == 1
    house.engine.heal()
    await asyncio.sleep(0.1)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_an_engine_lost_before_the_first_token_is_tried_again_once_and_the_client_does_not_notice() -> None:
    attempts: list[str] = []

    def script(request: object) -> list[object]:
        attempts.append("x")
        return [EngineUnavailable("lost")] if len(attempts) == 1 else ["y"]

    house = House(FakeEngine(script, step_s=0.1))  # type: ignore[arg-type]
    assert kinds(await read(house.submit("a"))) == ["started", "token", "done"]
    attempts[:] = []
    house.engine = FakeEngine([EngineUnavailable("gone")])
    last = (await read(house.submit("b")))[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, EngineUnavailable)
    assert house.worker.stats().requeued == 2
    await house.check_nothing_is_left()


@in_virtual_time
async def test_an_error_of_the_request_itself_reaches_its_client_with_its_own_code() -> None:
    house = House(FakeEngine([PromptTooLong("too long", param="messages")]))
    last = (await read(house.submit("a")))[-1]
    assert isinstance(last, Failed)
    assert last.error.code == "prompt_too_long"
    await house.check_nothing_is_left()


@in_virtual_time
async def test_an_engine_that_goes_on_after_its_last_delta_is_a_failure_not_a_second_answer() -> None:
    class Babbler(FakeEngine):
        async def stream(self, request):  # type: ignore[no-untyped-def]
            for _ in range(2):
                async for delta in super().stream(request):
                    yield delta

    house = House(Babbler())
    events = await read(house.submit("a"))
    assert kinds(events) == ["started", "token", "token", "token", "error"]
    await house.check_nothing_is_left()


@in_virtual_time
async def test_whoever_waited_as_long_as_allowed_is_told_so() -> None:
    house = House(FakeEngine(["x"] * 100, step_s=1.0), max_concurrency=1, max_wait_s=10.0)
    running, waiting = house.submit("a"), house.submit("b")
    events = await read(waiting)
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, QueueTimeout)
    assert events[-1].error.retry_after_s is not None
    assert asyncio.get_running_loop().time() == pytest.approx(10.0)
    running.close()
    await house.check_nothing_is_left()


@pytest.mark.parametrize("reason", ["eos", "", 5])
@in_virtual_time
async def test_an_engine_with_a_finish_reason_of_its_own_fails_alone(reason: object) -> None:
    engine = FakeEngine(["x"], finish_reason=reason)  # type: ignore[arg-type]
    house = House(engine, max_concurrency=1)
    bad, good = house.submit("bad"), house.submit("good")
    last = (await read(bad))[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, EngineError)
    await read(good)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_loop_that_was_held_up_does_not_cost_the_running_their_slots() -> None:
    house = House(FakeEngine(["x"] * 20, step_s=0.5), stall_timeout_s=2.0)
    reader = asyncio.create_task(read(house.submit("a")))
    await asyncio.sleep(1.2)
    asyncio.get_running_loop().jump(60.0)  # type: ignore[attr-defined]  # somebody's blocking call
    assert kinds(await reader)[-1] == "done"
    assert house.worker.stats().slots_reclaimed == 0


@in_virtual_time
async def test_two_who_stop_it_at_once_both_return_when_the_last_one_has_ended() -> None:
    house = House(FakeEngine(["x"] * 10, step_s=0.1))
    reader = asyncio.create_task(read(house.submit("a")))
    await asyncio.sleep(0)
    await asyncio.gather(house.worker.stop(60.0), house.worker.stop(60.0))
    assert asyncio.get_running_loop().time() == pytest.approx(1.0)
    await reader


@pytest.mark.parametrize("bug", [RuntimeError("a user's bug"), asyncio.CancelledError()])
@in_virtual_time
async def test_callbacks_and_observers_that_raise_change_nothing(bug: BaseException) -> None:
    def explode(_: object) -> None:
        raise bug

    house = House(max_concurrency=1, observers=(explode,))
    first = house.submit("a", on_end=explode)
    second = house.submit("b")
    assert kinds(await read(first))[-1] == "done"
    assert kinds(await read(second))[-1] == "done"
    assert len(house.ends["a"]) == 1
    await house.check_nothing_is_left()


# --- stop -----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stop_refuses_the_waiting_and_lets_the_running_finish_within_the_grace() -> None:
    house = House(FakeEngine(["x"] * 10, step_s=0.5), max_concurrency=1)
    running, waiting = house.submit("a"), house.submit("b")
    readers = [asyncio.create_task(read(s)) for s in (running, waiting)]
    await asyncio.sleep(1.0)
    stopping = asyncio.create_task(house.worker.stop(grace_s=30.0))
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        house.submit("c")
    of_running, of_waiting = await asyncio.gather(*readers)
    assert of_running[-1].type == "done"
    assert isinstance(of_waiting[-1], Failed)
    assert isinstance(of_waiting[-1].error, ShuttingDown)
    await stopping
    assert asyncio.get_running_loop().time() == pytest.approx(5.0)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_stop_cuts_what_still_runs_after_the_grace_with_a_last_event() -> None:
    house = House(FakeEngine(["x"] * 1000, step_s=0.5), max_concurrency=1)
    reader = asyncio.create_task(read(house.submit("a")))
    await house.worker.stop(grace_s=3.0)
    events = await reader
    assert isinstance(events[-1], Failed)
    assert events[-1].error.code == "shutting_down"
    assert asyncio.get_running_loop().time() == pytest.approx(3.0)
    await house.worker.stop()
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_stopped_worker_can_be_started_again() -> None:
    house = House()
    await house.worker.stop()
    house.worker.start()
    assert kinds(await read(house.submit("a")))[-1] == "done"
    await house.check_nothing_is_left()


@in_virtual_time
async def test_limits_change_while_requests_run_and_wait() -> None:
    house = House(FakeEngine(["x"] * 10, step_s=0.1), max_concurrency=1)
    streams = [house.submit(n) for n in "abc"]
    house.worker.set_limits(max_concurrency=3)
    await asyncio.gather(*map(read, streams))
    assert asyncio.get_running_loop().time() == pytest.approx(1.0, abs=0.01)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_limits_may_change_before_anything_has_started() -> None:
    house = House(is_started=False, max_concurrency=1)
    house.worker.set_limits(max_concurrency=3)
    house.worker.start()
    await asyncio.gather(*(read(house.submit(n)) for n in "abc"))
    assert house.engine.peak_active == 3
    await house.check_nothing_is_left()


@pytest.mark.parametrize(
    "wrong", [{"max_buffered_tokens": 0}, {"reader_stall_timeout_s": 0.0}, {"position_interval_s": -1.0}]
)
def test_an_impossible_setting_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RuntimeSettings(**wrong)  # type: ignore[arg-type]
