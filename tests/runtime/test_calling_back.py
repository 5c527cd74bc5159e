"""Callbacks and observers that call back into the worker, while it acts on what the scheduler decided."""

from __future__ import annotations

import asyncio

from chatstream.runtime import QueueWorker, RequestStream
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine
from chatstream.types import Done, Failed
from tests.runtime.house import House, in_virtual_time, kinds, read


@in_virtual_time
async def test_a_callback_that_asks_for_the_next_one_leaves_the_events_in_order() -> None:
    """Observers saw the events of the new request before those that had led to it."""
    house = House(max_concurrency=1, max_queue_size=3)
    next_ones: list[RequestStream] = []
    first = house.submit("a", on_end=lambda end: next_ones.append(house.submit("c")))
    second = house.submit("b")
    for stream in (first, second, *next_ones):
        await read(stream)
    assert kinds(await read(next_ones[0]))[-1] == "done"
    numbers = [event.number for event in house.log]
    assert numbers == sorted(numbers)
    await house.check_nothing_is_left()


@in_virtual_time
async def test_an_observer_that_cancels_on_arrival_ends_the_generation() -> None:
    """The abort was acted on before the start, so the generation ran to its end for nobody."""
    house = House(FakeEngine(["x"] * 50, step_s=1.0), max_concurrency=1, abort_timeout_s=None, stall_timeout_s=None)

    def cancel(event: ev.Event) -> None:
        if isinstance(event, ev.Admitted):
            house.worker.cancel(event.request_id)

    house.worker.observe(cancel)
    await read(house.submit("a"))
    await asyncio.sleep(2.0)
    assert house.worker.stats().running == 0
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_drain_from_a_callback_ends_who_waits_and_nobody_who_has_begun() -> None:
    """The next one had its slot already, and was ended; one that had come in the same moment was forgotten."""
    house = House(max_concurrency=1, max_queue_size=9)

    def at_the_end_of_a(event: ev.Event) -> None:
        if isinstance(event, ev.Finished) and event.request_id == "a":
            late.append(house.submit("late"))
            house.worker.drain()

    late: list[RequestStream] = []
    house.worker.observe(at_the_end_of_a)
    a, b, c = (house.submit(request_id) for request_id in "abc")
    assert [type((await read(stream))[-1]) for stream in (a, b, c)] == [Done, Done, Failed]
    assert [type((await read(stream))[-1]) for stream in late] == [Failed]
    await house.check_nothing_is_left()


@in_virtual_time
async def test_a_start_from_a_callback_ends_a_drain_that_is_on_its_way() -> None:
    house = House(max_concurrency=3, max_queue_size=50)

    def at_the_first_that_is_sent_away(event: ev.Event) -> None:
        if isinstance(event, ev.Cancelled):
            house.worker.start()

    house.worker.observe(at_the_first_that_is_sent_away)
    streams = [house.submit(f"r{n}") for n in range(3 + QueueWorker.DRAIN_BATCH_SIZE + 5)]
    house.worker.drain()
    ends = [(await read(stream))[-1] for stream in streams]
    assert [isinstance(end, Done) for end in ends] == [True] * 3 + [False] * QueueWorker.DRAIN_BATCH_SIZE + [True] * 5
    await house.check_nothing_is_left()
