"""The log of one request and its reader: numbers, places that replace each other, and what is held."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from chatstream.errors import Cancelled
from chatstream.runtime.stream import EventLog, RequestStream
from chatstream.types import Done, Failed, FinishReason, Queued, Started, StreamEvent, Token, Usage
from tests.runtime.house import House, in_virtual_time, read

DONE = Done("r", "m", FinishReason.STOP, Usage(1, 2))


def make() -> tuple[EventLog, RequestStream]:
    log = EventLog("r", max_buffered=10, on_closed=lambda by: None)
    return log, log.attach()


async def put(log: EventLog, *texts: str) -> None:
    for text in texts:
        await log.put(Token(text), stall_timeout_s=None)


def taken(stream: RequestStream) -> list[tuple[int, StreamEvent]]:
    """Everything that has happened, with its numbers."""
    events = []
    while (event := stream.next_nowait()) is not None:
        events.append((stream.last_id, event))
    return events


@in_virtual_time
async def test_events_are_numbered_from_1_in_the_order_in_which_they_are_read() -> None:
    log, stream = make()
    log.show_position(Queued("r", 2))
    assert taken(stream) == [(1, Queued("r", 2))]
    log.show_position(Queued("r", 1))
    assert taken(stream) == [(2, Queued("r", 1))]
    log.show_start(Started("r", 3.0))
    await put(log, "a", "b")
    log.finish(DONE)
    assert taken(stream) == [(3, Started("r", 3.0)), (4, Token("a")), (5, Token("b")), (6, DONE)]
    assert stream.is_exhausted


def test_a_place_that_nobody_was_told_gives_its_number_to_the_newer_one() -> None:
    log, stream = make()
    for position in (3, 2, 1):
        log.show_position(Queued("r", position))
    assert taken(stream) == [(1, Queued("r", 1))]


def test_a_number_that_a_reader_claims_to_have_is_not_given_again() -> None:
    log, _ = make()
    log.show_position(Queued("r", 2))
    claiming = log.attach(1)
    log.show_position(Queued("r", 1))
    log.show_start(Started("r", 3.0))
    assert taken(claiming) == [(2, Started("r", 3.0))]


@pytest.mark.parametrize("was_told", [True, False])
def test_a_place_that_is_past_is_not_told_and_leaves_no_gap(was_told: bool) -> None:
    log, stream = make()
    log.show_position(Queued("r", 2))
    if was_told:
        taken(stream)
        log.show_position(Queued("r", 1))
    log.show_start(Started("r", 3.0))
    assert taken(stream) == [(1 + was_told, Started("r", 3.0))]


def test_a_request_that_ends_in_line_has_its_end_after_the_last_place_that_was_told() -> None:
    log, stream = make()
    log.show_position(Queued("r", 2))
    taken(stream)
    log.show_position(Queued("r", 1))
    end = Failed("r", Cancelled("by somebody"))
    log.finish(end)
    log.show_position(Queued("r", 1))
    log.show_start(Started("r", 3.0))
    assert taken(stream) == [(2, end)]


@in_virtual_time
async def test_what_was_read_is_not_held_unless_somebody_keeps_it() -> None:
    log, stream = make()
    log.show_start(Started("r", 0.0))
    await put(log, "a", "b")
    assert stream.next_nowait() == Started("r", 0.0)
    assert stream.next_nowait() == Token("a")
    assert log.buffered() == (Token("b"),)


@in_virtual_time
async def test_a_stream_that_was_closed_can_be_read_to_its_end() -> None:
    """Closing it asks for the end; who still listens hears that it came."""
    end = Failed("r", Cancelled("closed"))
    log = EventLog("r", max_buffered=10, on_closed=lambda by: log.finish(end))
    stream = log.attach()
    stream.close()
    assert [event async for event in stream] == [end]


def test_its_repr_tells_how_far_it_is() -> None:
    log, stream = make()
    log.show_start(Started("r", 0.0))
    stream.next_nowait()
    assert repr(stream) == "<RequestStream <EventLog r running events=1 buffered=0> taken=1>"


@in_virtual_time
async def test_nothing_of_a_request_that_was_closed_waits_for_a_look_for_cycles() -> None:
    """A stream and its log kept each other: 10,000 who left at once stood still for two seconds with all others."""
    house = House(max_concurrency=1)
    running = house.submit("running")
    waiting = house.submit("waiting")
    logs = [weakref.ref(waiting.log), weakref.ref(running.log)]
    gc.disable()
    try:
        waiting.close()
        waiting.close()  # as a response does, once when its client has left and once at its own end
        del waiting
        await read(running)
        del running
        await house.check_nothing_is_left()
        assert [log() for log in logs] == [None, None]
    finally:
        gc.enable()


@in_virtual_time
async def test_a_reader_whom_nobody_else_holds_reads_to_the_end() -> None:
    """While it waits, only its log may know of it: the event loop itself holds no tasks."""
    house = House(max_concurrency=1)
    ends: list[str] = []

    async def follow(request_id: str) -> None:
        ends.append((await read(house.submit(request_id)))[-1].type)

    for request_id in "abc":
        asyncio.get_running_loop().create_task(follow(request_id))
    await asyncio.sleep(0.05)
    gc.collect()
    await asyncio.sleep(5.0)
    assert ends == ["done"] * 3
    await house.check_nothing_is_left()
