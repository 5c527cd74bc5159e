"""The event log of one request and its reader: event numbers, replaced positions, buffered events."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from chatstream.errors import Cancelled
from chatstream.runtime.stream import EventLog, RequestStream
from chatstream.types import Done, Failed, FinishReason, Queued, Started, StreamEvent, Token, Usage
from tests.runtime.harness import Harness, in_virtual_time, read

DONE = Done("r", "m", FinishReason.STOP, Usage(1, 2))


def make() -> tuple[EventLog, RequestStream]:
    log = EventLog("r", max_buffered=10, on_closed=lambda by: None)
    return log, log.attach()


async def put(log: EventLog, *texts: str) -> None:
    for text in texts:
        await log.put(Token(text), stall_timeout_s=None)


def taken(stream: RequestStream) -> list[tuple[int, StreamEvent]]:
    """All available events, with their numbers."""
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


def test_a_replaced_position_passes_its_number_to_the_newer_one() -> None:
    log, stream = make()
    for position in (3, 2, 1):
        log.show_position(Queued("r", position))
    assert taken(stream) == [(1, Queued("r", 1))]


def test_a_number_that_a_reader_claims_to_have_is_not_reused() -> None:
    log, _ = make()
    log.show_position(Queued("r", 2))
    claiming = log.attach(1)
    log.show_position(Queued("r", 1))
    log.show_start(Started("r", 3.0))
    assert taken(claiming) == [(2, Started("r", 3.0))]


@pytest.mark.parametrize("was_taken", [True, False])
def test_an_outdated_position_is_dropped_and_leaves_no_gap(was_taken: bool) -> None:
    log, stream = make()
    log.show_position(Queued("r", 2))
    if was_taken:
        taken(stream)
        log.show_position(Queued("r", 1))
    log.show_start(Started("r", 3.0))
    assert taken(stream) == [(1 + was_taken, Started("r", 3.0))]


def test_the_end_of_a_waiting_request_follows_the_last_position_taken() -> None:
    log, stream = make()
    log.show_position(Queued("r", 2))
    taken(stream)
    log.show_position(Queued("r", 1))
    end = Failed("r", Cancelled("cancelled"))
    log.finish(end)
    log.show_position(Queued("r", 1))
    log.show_start(Started("r", 3.0))
    assert taken(stream) == [(2, end)]


@in_virtual_time
async def test_taken_events_are_dropped_without_a_retention() -> None:
    log, stream = make()
    log.show_start(Started("r", 0.0))
    await put(log, "a", "b")
    assert stream.next_nowait() == Started("r", 0.0)
    assert stream.next_nowait() == Token("a")
    assert log.buffered() == (Token("b"),)


@in_virtual_time
async def test_a_stream_that_was_closed_can_be_read_to_its_end() -> None:
    """A close requests the cancellation; the reader can still take the last event."""
    end = Failed("r", Cancelled("closed"))
    log = EventLog("r", max_buffered=10, on_closed=lambda by: log.finish(end))
    stream = log.attach()
    stream.close()
    assert [event async for event in stream] == [end]


def test_the_repr_shows_the_progress() -> None:
    log, stream = make()
    log.show_start(Started("r", 0.0))
    stream.next_nowait()
    assert repr(stream) == "<RequestStream <EventLog r running events=1 buffered=0> taken=1>"


@in_virtual_time
async def test_a_closed_request_leaves_no_reference_cycle() -> None:
    """A cycle of stream and log delayed all streams by two seconds when 10,000 clients disconnected at once."""
    harness = Harness(max_concurrency=1)
    running = harness.submit("running")
    waiting = harness.submit("waiting")
    logs = [weakref.ref(waiting.log), weakref.ref(running.log)]
    gc.disable()
    try:
        waiting.close()
        waiting.close()  # as a response does: once at the disconnect and once at its own end
        del waiting
        await read(running)
        del running
        await harness.check_nothing_is_left()
        assert [log() for log in logs] == [None, None]
    finally:
        gc.enable()


@in_virtual_time
async def test_a_reader_referenced_only_by_its_log_reads_to_the_end() -> None:
    """While the reader waits, only its log references it: the event loop holds no strong references to tasks."""
    harness = Harness(max_concurrency=1)
    ends: list[str] = []

    async def follow(request_id: str) -> None:
        ends.append((await read(harness.submit(request_id)))[-1].type)

    for request_id in "abc":
        asyncio.get_running_loop().create_task(follow(request_id))
    await asyncio.sleep(0.05)
    gc.collect()
    await asyncio.sleep(5.0)
    assert ends == ["done"] * 3
    await harness.check_nothing_is_left()
