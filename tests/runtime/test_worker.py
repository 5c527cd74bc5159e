"""The worker: the events that a client receives, and cleanup after the end of a request."""

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
from tests.runtime.harness import Harness, in_virtual_time, kinds, read, text


@in_virtual_time
async def test_a_request_that_starts_at_once_gets_started_tokens_done() -> None:
    harness = Harness()
    events = await read(harness.submit("a"))
    assert kinds(events) == ["started", "token", "token", "token", "done"]
    assert events[0] == Started("a", 0.0)
    assert events[-1] == Done("a", "", FinishReason.STOP, Usage(0, 3))
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_waiting_request_gets_its_position_and_starts_when_a_slot_is_free() -> None:
    harness = Harness(max_concurrency=1)
    first, second = harness.submit("a"), harness.submit("b")
    events = await read(second)
    assert events[:2] == [Queued("b", 1), Started("b", pytest.approx(0.3))]
    assert kinds(await read(first))[-1] == "done"
    end_of_a, start_of_b = [e for e in harness.log if isinstance(e, ev.Finished | ev.Started) and e.at_s > 0.0][:2]
    assert (end_of_a.request_id, start_of_b.request_id) == ("a", "b")
    assert end_of_a.at_s == start_of_b.at_s
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_changed_position_is_sent_at_most_once_a_second() -> None:
    harness = Harness(FakeEngine(["x"] * 4, step_s=0.11), max_concurrency=1, max_queue_size=20)
    streams = [harness.submit(f"r{n}") for n in range(11)]
    loop = asyncio.get_running_loop()
    sent: list[tuple[float, int]] = []

    async def watch() -> None:
        sent.extend([(loop.time(), e.position) async for e in streams[10] if isinstance(e, Queued)])

    await asyncio.gather(watch(), *(read(s) for s in streams[:10]))
    assert sent[0] == (0.0, 10)
    positions = [position for _, position in sent]
    assert positions == sorted(positions, reverse=True)
    assert len(sent) >= 4
    # A request ahead ends every 0.44 s; each position is correct when it is sent.
    assert all(position == 10 - int(at_s / 0.44 + 1e-6) for at_s, position in sent)
    assert all(later - earlier >= 0.98 for (earlier, _), (later, _) in pairwise(sent))
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_position_sent_shortly_before_a_round_is_updated_by_the_next_round() -> None:
    harness = Harness(FakeEngine(["x"] * 10_000, step_s=0.1), max_concurrency=1, max_queue_size=20)
    harness.submit("running")
    ahead = harness.submit("ahead")
    await asyncio.sleep(0.9)
    last = harness.submit("last")
    assert await anext(last) == Queued("last", 2)
    await asyncio.sleep(0.05)
    ahead.close()
    assert await anext(last) == Queued("last", 1)
    assert (
        asyncio.get_running_loop().time() <= 0.9 + 1.3
    )  # a second after the last update, plus the time between two rounds
    last.close()
    await harness.worker.stop()


@in_virtual_time
async def test_a_queue_of_many_batches_is_updated_completely() -> None:
    harness = Harness(is_started=False, max_concurrency=1, max_queue_size=300)
    streams = [harness.submit(f"r{n}") for n in range(200)]
    await asyncio.sleep(0.7)
    late = harness.submit("late")
    assert await anext(late) == Queued("late", 201, waits_for="opening")
    await asyncio.sleep(0.2)
    streams[0].close()
    async with asyncio.timeout(2.0):
        assert await anext(late) == Queued("late", 200, waits_for="opening")
    await harness.worker.stop()


@in_virtual_time
async def test_a_drain_rejects_a_long_queue_in_batches_between_which_tokens_are_delivered() -> None:
    """Without batches, a drain of 10,000 requests stopped the running streams for seconds."""
    harness = Harness(FakeEngine(["x"] * 20, step_s=0.0005), max_concurrency=1, max_queue_size=1000)
    running = asyncio.create_task(read(harness.submit("runs")))
    streams = [harness.submit(f"r{n}") for n in range(500)]
    await asyncio.sleep(0.001)
    harness.worker.drain()
    numbers = [e.number for e in harness.log if isinstance(e, ev.Cancelled)]
    assert len(numbers) == QueueWorker.DRAIN_BATCH_SIZE
    assert harness.worker.stats().running == 1
    ends = await asyncio.gather(*(read(stream) for stream in streams))
    assert {events[-1].error.code for events in ends if isinstance(events[-1], Failed)} == {"shutting_down"}
    assert kinds(await running)[-1] == "done"
    token_indices = [n for n, e in enumerate(harness.log) if isinstance(e, ev.Tokens)]
    rejection_indices = [n for n, e in enumerate(harness.log) if isinstance(e, ev.Cancelled)]
    assert rejection_indices[0] < token_indices[-1] < rejection_indices[-1], (
        "tokens were delivered between the rejections"
    )
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_request_not_yet_rejected_is_served_when_the_drain_ends() -> None:
    harness = Harness(FakeEngine(["x"], step_s=0.1), max_concurrency=4, max_queue_size=1000)
    streams = [harness.submit(f"r{n}") for n in range(100)]
    harness.worker.drain()
    harness.worker.start()
    ends = [(await read(stream))[-1] for stream in streams]
    assert sum(isinstance(end, Failed) for end in ends) == QueueWorker.DRAIN_BATCH_SIZE
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_the_limit_is_exact_and_all_slots_are_used() -> None:
    harness = Harness(FakeEngine(["x"] * 10, step_s=0.1), max_concurrency=3, max_queue_size=20)
    await asyncio.gather(*(read(harness.submit(f"r{n}")) for n in range(12)))
    assert harness.engine.peak_active == 3
    assert asyncio.get_running_loop().time() == pytest.approx(4 * 1.0, abs=0.01)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_full_queue_rejects_and_keeps_no_record_of_the_rejected_request() -> None:
    harness = Harness(max_concurrency=1, max_queue_size=1)
    admitted = [harness.submit("a"), harness.submit("b")]
    with pytest.raises(QueueFull):
        harness.submit("c")
    assert harness.worker.records()["jobs"] == 2
    assert "c" not in harness.engine.prompts
    await asyncio.gather(*map(read, admitted))
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_requests_before_the_start_wait_and_are_served_in_order() -> None:
    harness = Harness(is_started=False, max_concurrency=1)
    streams = [harness.submit(n) for n in "abc"]
    readers = [asyncio.create_task(read(s)) for s in streams]
    await asyncio.sleep(60.0)
    assert harness.engine.log == []
    harness.worker.start()
    await asyncio.gather(*readers)
    assert [i for _, i in harness.engine.log] == ["a"] * 3 + ["b"] * 3 + ["c"] * 3
    await harness.check_nothing_is_left()


# --- disconnects ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_waiting_client_that_disconnects_frees_its_position_at_once_and_never_reaches_the_engine() -> None:
    harness = Harness(max_concurrency=1, max_queue_size=1)
    running, waiting = harness.submit("a"), harness.submit("b")
    waiting.close()
    third = harness.submit("c")  # the position is free at once
    await asyncio.gather(read(running), read(third))
    assert "b" not in harness.engine.prompts
    assert [end.by for end in harness.ends["b"]] == ["client_disconnected"]
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_client_that_disconnects_while_streaming_frees_its_slot_within_one_step() -> None:
    harness = Harness(FakeEngine(["x"] * 100, step_s=0.1), max_concurrency=1)
    running, waiting = harness.submit("a"), harness.submit("b")
    async for event in running:
        if event.type == "token":
            break
    running.close()
    disconnected_s = asyncio.get_running_loop().time()
    reader = asyncio.create_task(read(waiting))
    await asyncio.sleep(0.15)
    started = next(e for e in harness.log if isinstance(e, ev.Started) and e.request_id == "b")
    assert started.at_s - disconnected_s <= 0.1
    assert len(harness.engine.generated["a"]) <= 2
    waiting.close()
    await reader
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_client_that_disconnects_before_its_task_first_runs_leaks_nothing() -> None:
    harness = Harness(max_concurrency=1)
    stream = harness.submit("a")
    stream.close()  # the task exists but has not run yet
    await read(harness.submit("b"))
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_cancel_by_id_ends_the_stream_with_an_error_and_is_harmless_twice() -> None:
    harness = Harness(FakeEngine(["x"] * 100, step_s=0.1))
    stream = harness.submit("a")
    reader = asyncio.create_task(read(stream))
    await asyncio.sleep(1.05)
    assert harness.worker.cancel("a")
    harness.worker.cancel("a")
    events = await reader
    assert text(events) == "x" * 10
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, Cancelled)
    await asyncio.sleep(0.1)  # the engine stops the generation
    assert not harness.worker.cancel("a")
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_client_that_stops_reading_is_disconnected_and_frees_its_slot() -> None:
    harness = Harness(
        FakeEngine(["x"] * 50, step_s=0.1),
        max_concurrency=1,
        runtime=RuntimeSettings(max_buffered_tokens=5, reader_stall_timeout_s=10.0),
    )
    stalled, waiting = harness.submit("a"), harness.submit("b")
    events = await read(waiting)
    started = next(e for e in harness.log if isinstance(e, ev.Started) and e.request_id == "b")
    assert started.at_s == pytest.approx(0.6 + 10.0)
    assert kinds(events)[-1] == "done"
    events = await read(stalled)
    assert text(events) == "x" * 5  # buffered tokens are still delivered
    assert isinstance(events[-1], Failed)
    assert harness.ends["a"][0].by == "slow_reader"
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_slow_reader_slows_down_its_own_generation_only_and_loses_nothing() -> None:
    harness = Harness(
        FakeEngine(["x"] * 20, step_s=0.1), max_concurrency=2, runtime=RuntimeSettings(max_buffered_tokens=2)
    )
    slow, fast = harness.submit("slow"), harness.submit("fast")

    async def read_slowly() -> str:
        seen = ""
        async for event in slow:
            await asyncio.sleep(1.0)
            seen += event.text if event.type == "token" else ""
        return seen

    reader = asyncio.create_task(read_slowly())
    await read(fast)
    assert asyncio.get_running_loop().time() == pytest.approx(2.0)
    assert len(harness.engine.generated["slow"]) < 8
    assert await reader == "x" * 20
    await harness.check_nothing_is_left()


# --- failures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [RuntimeError("boom"), EngineError("boom"), asyncio.CancelledError()])
@in_virtual_time
async def test_an_engine_that_fails_on_one_request_ends_that_one_and_serves_the_next(fault: BaseException) -> None:
    scripts = {"bad": ["x", fault], "good": ["y", "z"]}
    harness = Harness(FakeEngine(lambda r: scripts[r.request_id], step_s=0.1), max_concurrency=1)  # type: ignore[arg-type]
    if isinstance(fault, asyncio.CancelledError):
        harness.engine = CancellingEngine(step_s=0.1)
    bad, good = harness.submit("bad"), harness.submit("good")
    events = await read(bad)
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, EngineError)
    assert kinds(await read(good))[-1] == "done"
    await harness.check_nothing_is_left()


class CancellingEngine(FakeEngine):
    """Cancels itself during a request, as a library with tasks of its own may do."""

    async def stream(self, request):  # type: ignore[no-untyped-def]
        async for delta in super().stream(request):
            yield delta
            if request.request_id == "bad":
                raise asyncio.CancelledError


@pytest.mark.parametrize("script", [[], ["x", Fault.HANG]])
@in_virtual_time
async def test_an_engine_that_ends_too_early_or_never_costs_one_request_not_the_slot(script: list[object]) -> None:
    engine = FakeEngine(lambda r: script if r.request_id == "bad" else ["y"], step_s=0.1)  # type: ignore[arg-type,return-value]
    harness = Harness(engine, max_concurrency=1, stall_timeout_s=60.0)
    bad, good = harness.submit("bad"), harness.submit("good")
    assert isinstance((await read(bad))[-1], Failed)
    assert text(await read(good)) == "y"
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_an_engine_that_ignores_an_abort_loses_the_slot_after_the_abort_timeout() -> None:
    harness = Harness(
        FakeEngine(lambda r: [Fault.DEAF] if r.request_id == "deaf" else ["y"]), max_concurrency=1, abort_timeout_s=5.0
    )
    deaf, good = harness.submit("deaf"), harness.submit("good")
    await asyncio.sleep(1.0)
    deaf.close()
    assert text(await read(good)) == "y"
    assert asyncio.get_running_loop().time() == pytest.approx(6.0)
    assert harness.worker.stats().slots_reclaimed == 1
    harness.engine.heal()
    await asyncio.sleep(0.1)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_request_restarts_once_if_its_engine_is_lost_before_the_first_token() -> None:
    attempts: list[str] = []

    def script(request: object) -> list[object]:
        attempts.append("x")
        return [EngineUnavailable("lost")] if len(attempts) == 1 else ["y"]

    harness = Harness(FakeEngine(script, step_s=0.1))  # type: ignore[arg-type]
    assert kinds(await read(harness.submit("a"))) == ["started", "token", "done"]
    attempts[:] = []
    harness.engine = FakeEngine([EngineUnavailable("gone")])
    last = (await read(harness.submit("b")))[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, EngineUnavailable)
    assert harness.worker.stats().requeued == 2
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_an_error_of_the_request_itself_reaches_its_client_with_its_own_code() -> None:
    harness = Harness(FakeEngine([PromptTooLong("too long", param="messages")]))
    last = (await read(harness.submit("a")))[-1]
    assert isinstance(last, Failed)
    assert last.error.code == "prompt_too_long"
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_delta_after_the_last_one_is_a_failure_not_a_second_answer() -> None:
    class RepeatingEngine(FakeEngine):
        async def stream(self, request):  # type: ignore[no-untyped-def]
            for _ in range(2):
                async for delta in super().stream(request):
                    yield delta

    harness = Harness(RepeatingEngine())
    events = await read(harness.submit("a"))
    assert kinds(events) == ["started", "token", "token", "token", "error"]
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_request_that_does_not_start_in_time_ends_with_queue_timeout() -> None:
    harness = Harness(FakeEngine(["x"] * 100, step_s=1.0), max_concurrency=1, max_wait_s=10.0)
    running, waiting = harness.submit("a"), harness.submit("b")
    events = await read(waiting)
    assert isinstance(events[-1], Failed)
    assert isinstance(events[-1].error, QueueTimeout)
    assert events[-1].error.retry_after_s is not None
    assert asyncio.get_running_loop().time() == pytest.approx(10.0)
    running.close()
    await harness.check_nothing_is_left()


@pytest.mark.parametrize("reason", ["eos", "", 5])
@in_virtual_time
async def test_an_unknown_finish_reason_fails_only_its_request(reason: object) -> None:
    engine = FakeEngine(["x"], finish_reason=reason)  # type: ignore[arg-type]
    harness = Harness(engine, max_concurrency=1)
    bad, good = harness.submit("bad"), harness.submit("good")
    last = (await read(bad))[-1]
    assert isinstance(last, Failed)
    assert isinstance(last.error, EngineError)
    await read(good)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_blocked_event_loop_does_not_cost_running_requests_their_slots() -> None:
    harness = Harness(FakeEngine(["x"] * 20, step_s=0.5), stall_timeout_s=2.0)
    reader = asyncio.create_task(read(harness.submit("a")))
    await asyncio.sleep(1.2)
    asyncio.get_running_loop().jump(60.0)  # type: ignore[attr-defined]  # a blocking call
    assert kinds(await reader)[-1] == "done"
    assert harness.worker.stats().slots_reclaimed == 0


@in_virtual_time
async def test_two_concurrent_stops_return_when_the_last_request_has_ended() -> None:
    harness = Harness(FakeEngine(["x"] * 10, step_s=0.1))
    reader = asyncio.create_task(read(harness.submit("a")))
    await asyncio.sleep(0)
    await asyncio.gather(harness.worker.stop(60.0), harness.worker.stop(60.0))
    assert asyncio.get_running_loop().time() == pytest.approx(1.0)
    await reader


@pytest.mark.parametrize("bug", [RuntimeError("a user's bug"), asyncio.CancelledError()])
@in_virtual_time
async def test_callbacks_and_observers_that_raise_change_nothing(bug: BaseException) -> None:
    def explode(_: object) -> None:
        raise bug

    harness = Harness(max_concurrency=1, observers=(explode,))
    first = harness.submit("a", on_end=explode)
    second = harness.submit("b")
    assert kinds(await read(first))[-1] == "done"
    assert kinds(await read(second))[-1] == "done"
    assert len(harness.ends["a"]) == 1
    await harness.check_nothing_is_left()


# --- stop -----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stop_rejects_waiting_requests_and_lets_running_ones_finish_within_the_grace_time() -> None:
    harness = Harness(FakeEngine(["x"] * 10, step_s=0.5), max_concurrency=1)
    running, waiting = harness.submit("a"), harness.submit("b")
    readers = [asyncio.create_task(read(s)) for s in (running, waiting)]
    await asyncio.sleep(1.0)
    stopping = asyncio.create_task(harness.worker.stop(grace_s=30.0))
    await asyncio.sleep(0)
    with pytest.raises(ShuttingDown):
        harness.submit("c")
    of_running, of_waiting = await asyncio.gather(*readers)
    assert of_running[-1].type == "done"
    assert isinstance(of_waiting[-1], Failed)
    assert isinstance(of_waiting[-1].error, ShuttingDown)
    await stopping
    assert asyncio.get_running_loop().time() == pytest.approx(5.0)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_stop_ends_running_requests_after_the_grace_time_with_a_last_event() -> None:
    harness = Harness(FakeEngine(["x"] * 1000, step_s=0.5), max_concurrency=1)
    reader = asyncio.create_task(read(harness.submit("a")))
    await harness.worker.stop(grace_s=3.0)
    events = await reader
    assert isinstance(events[-1], Failed)
    assert events[-1].error.code == "shutting_down"
    assert asyncio.get_running_loop().time() == pytest.approx(3.0)
    await harness.worker.stop()
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_stopped_worker_can_be_started_again() -> None:
    harness = Harness()
    await harness.worker.stop()
    harness.worker.start()
    assert kinds(await read(harness.submit("a")))[-1] == "done"
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_limits_change_while_requests_run_and_wait() -> None:
    harness = Harness(FakeEngine(["x"] * 10, step_s=0.1), max_concurrency=1)
    streams = [harness.submit(n) for n in "abc"]
    harness.worker.set_limits(max_concurrency=3)
    await asyncio.gather(*map(read, streams))
    assert asyncio.get_running_loop().time() == pytest.approx(1.0, abs=0.01)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_limits_may_change_before_anything_has_started() -> None:
    harness = Harness(is_started=False, max_concurrency=1)
    harness.worker.set_limits(max_concurrency=3)
    harness.worker.start()
    await asyncio.gather(*(read(harness.submit(n)) for n in "abc"))
    assert harness.engine.peak_active == 3
    await harness.check_nothing_is_left()


@pytest.mark.parametrize(
    "wrong", [{"max_buffered_tokens": 0}, {"reader_stall_timeout_s": 0.0}, {"position_interval_s": -1.0}]
)
def test_an_impossible_setting_is_refused_by_name(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        RuntimeSettings(**wrong)  # type: ignore[arg-type]
