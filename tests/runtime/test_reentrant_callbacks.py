"""Callbacks and observers that call the worker while it applies events."""

from __future__ import annotations

import asyncio

from chatstream.runtime import QueueWorker, RequestStream
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine
from chatstream.types import Done, Failed
from tests.runtime.harness import Harness, in_virtual_time, kinds, read


@in_virtual_time
async def test_a_callback_that_submits_a_request_leaves_the_events_in_order() -> None:
    """Observers saw the events of the new request before those that had caused it."""
    harness = Harness(max_concurrency=1, max_queue_size=3)
    submitted: list[RequestStream] = []
    first = harness.submit("a", on_end=lambda end: submitted.append(harness.submit("c")))
    second = harness.submit("b")
    for stream in (first, second, *submitted):
        await read(stream)
    assert kinds(await read(submitted[0]))[-1] == "done"
    numbers = [event.number for event in harness.log]
    assert numbers == sorted(numbers)
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_an_observer_that_cancels_on_arrival_ends_the_generation() -> None:
    """The abort was applied before the start, so the generation ran to its end without a reader."""
    harness = Harness(FakeEngine(["x"] * 50, step_s=1.0), max_concurrency=1, abort_timeout_s=None, stall_timeout_s=None)

    def cancel(event: ev.Event) -> None:
        if isinstance(event, ev.Admitted):
            harness.worker.cancel(event.request_id)

    harness.worker.observe(cancel)
    await read(harness.submit("a"))
    await asyncio.sleep(2.0)
    assert harness.worker.stats().running == 0
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_drain_from_a_callback_ends_waiting_requests_and_no_started_one() -> None:
    """The next request already had its slot and was ended; a request submitted in the same tick was missed."""
    harness = Harness(max_concurrency=1, max_queue_size=9)

    def drain_at_the_end_of_a(event: ev.Event) -> None:
        if isinstance(event, ev.Finished) and event.request_id == "a":
            late.append(harness.submit("late"))
            harness.worker.drain()

    late: list[RequestStream] = []
    harness.worker.observe(drain_at_the_end_of_a)
    a, b, c = (harness.submit(request_id) for request_id in "abc")
    assert [type((await read(stream))[-1]) for stream in (a, b, c)] == [Done, Done, Failed]
    assert [type((await read(stream))[-1]) for stream in late] == [Failed]
    await harness.check_nothing_is_left()


@in_virtual_time
async def test_a_start_from_a_callback_ends_a_drain_in_progress() -> None:
    harness = Harness(max_concurrency=3, max_queue_size=50)

    def start_at_the_first_rejection(event: ev.Event) -> None:
        if isinstance(event, ev.Cancelled):
            harness.worker.start()

    harness.worker.observe(start_at_the_first_rejection)
    streams = [harness.submit(f"r{n}") for n in range(3 + QueueWorker.DRAIN_BATCH_SIZE + 5)]
    harness.worker.drain()
    ends = [(await read(stream))[-1] for stream in streams]
    assert [isinstance(end, Done) for end in ends] == [True] * 3 + [False] * QueueWorker.DRAIN_BATCH_SIZE + [True] * 5
    await harness.check_nothing_is_left()
