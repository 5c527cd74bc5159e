"""The events of one request: a log with one writer, the worker, and one reader at a time.

    QueueWorker ──show_position, show_start, put, finish──▶ EventLog ◀──take, detach── RequestStream ◀── its reader

Events are numbered from 1, without gaps for a reader that keeps up. A position that was not taken before the next one
is replaced by it; the newer position gets the same number.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias

from chatstream.types import Done, Failed, Queued, Started, StreamEvent, Token

LoggedEvent: TypeAlias = Started | Token | Done | Failed


class ReaderStalled(Exception):
    """The buffer is full and the reader took nothing within the stall timeout."""


class Retention(Protocol):
    """Keeps delivered events, so that a client can resume."""

    def make_room(self, log: EventLog, token: Token) -> bool:
        """Make room for `token`. False: the reader has yet to take the events that would be dropped."""

    def on_event(self, log: EventLog, event: LoggedEvent) -> None:
        """`event` was appended to the log."""

    def on_detached(self, log: EventLog) -> None:
        """The log no longer has a reader."""


class RequestStream:
    """An async iterator over `Queued`… `Started`, `Token`…, then exactly one `Done` or `Failed`.

    The reader must iterate to the end or call `close()`; closing early cancels the request, waiting or running, unless
    it is resumable. Of the positions only the newest is kept. Tokens are buffered up to a bound; then the generation
    pauses. A reader that was replaced by a later one stops without a last event.
    """

    def __init__(self, log: EventLog, last_id: int = 0) -> None:
        """Created by `EventLog.attach`."""
        self._log = log
        self.last_id = last_id
        """Number of the event taken last."""
        self._waiting: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<RequestStream {self._log!r} taken={self.last_id}>"

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> StreamEvent:
        while (event := self.next_nowait()) is None:
            if self.is_dismissed or self.is_exhausted:
                raise StopAsyncIteration
            self._waiting = asyncio.get_running_loop().create_future()
            await self._waiting
        return event

    def next_nowait(self) -> StreamEvent | None:
        """The next event, None if there is none yet."""
        return None if self.is_dismissed else self._log.take(self)

    def close(self, by: str = "client_disconnected") -> None:
        """Stop reading. Cancels the request unless it has ended or is resumable. Idempotent.

        After the close of a request that had ended, nothing more can be read."""
        self._log.detach(self, by)

    @property
    def log(self) -> EventLog:
        return self._log

    @property
    def request_id(self) -> str:
        return self._log.request_id

    @property
    def has_started(self) -> bool:
        return self._log.has_started

    @property
    def end(self) -> Done | Failed | None:
        """The last event; None while the request is live."""
        return self._log.end

    @property
    def is_exhausted(self) -> bool:
        """The last event was taken."""
        return self._log.end is not None and self.last_id == self._log.last_id

    @property
    def is_dismissed(self) -> bool:
        """The reader closed a resumable stream, stalled, or was replaced by a later reader."""
        return self._log.reader is not self

    def wake(self) -> None:
        _wake(self._waiting)


class EventLog:
    """The writer's side. Buffers the events that the reader has not taken; a retention keeps delivered ones too."""

    def __init__(self, request_id: str, *, max_buffered: int, on_closed: Callable[[str], object]) -> None:
        """`on_closed(by)` is called when the reader closes before the end and the log has no retention.

        `max_buffered` bounds the tokens that the reader may lag behind; a retention has a bound of its own.
        """
        self.request_id = request_id
        self.retention: Retention | None = None
        self.reader: RequestStream | None = None
        """Dropped when the last event was taken or the reader closed after it, so that no reference cycle remains."""
        self.end: Done | Failed | None = None
        self.has_started = False
        self.last_id = 0
        """Number of the newest event."""
        self.dropped_id = 0
        """Number of the newest event that a retention has dropped; no reader can resume before it."""
        self._max_buffered = max_buffered
        self._on_closed = on_closed
        self._queued: Queued | None = None
        self._queued_id = 0
        self._taken_id = 0
        self._started_id = 0
        self._events: deque[LoggedEvent] = deque()
        self._writer: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "ended" if self.end else "running" if self.has_started else "waiting"
        return f"<EventLog {self.request_id} {state} events={self.last_id} buffered={len(self._events)}>"

    # --- readers ----------------------------------------------------------------------------------------------

    def attach(self, last_id: int = 0) -> RequestStream:
        """Attach a reader that has taken all events up to `last_id`. It replaces the current reader."""
        replaced, self.reader = self.reader, RequestStream(self, last_id)
        self._taken_id = max(self._taken_id, last_id)
        if replaced is not None:
            replaced.wake()
        _wake(self._writer)
        return self.reader

    def take(self, reader: RequestStream) -> StreamEvent | None:
        """The next event for this reader, None if there is none yet."""
        event: StreamEvent
        if self._queued is not None and reader.last_id < self._queued_id:
            event, reader.last_id = self._queued, self._queued_id
        elif reader.last_id < self.last_id:
            # Lower numbers belong to positions that were replaced.
            index = max(reader.last_id + 1 - self._first_id, 0)
            event, reader.last_id = self._events[index], self._first_id + index
            if self.retention is None:
                self._events.popleft()
            _wake(self._writer)
        else:
            return None
        self._taken_id = max(self._taken_id, reader.last_id)
        if event is self.end and self.retention is None:
            self.reader = None
        return event

    def detach(self, reader: RequestStream, by: str) -> None:
        """The reader closed its stream."""
        if self.retention is not None:
            if reader is self.reader:
                self._dismiss_reader(self.retention)
        elif self.end is None:
            self._on_closed(by)  # the reader stays attached and may still take the last event
        else:
            self.reader = None

    # --- the writer: the worker -------------------------------------------------------------------------------

    def show_position(self, queued: Queued) -> None:
        if not self.has_started and self.end is None:
            if self._queued_id <= self._taken_id:
                self.last_id += 1
                self._queued_id = self.last_id
            self._queued = queued
            self._wake_reader()

    def show_start(self, started: Started) -> None:
        """Append `started` once; a requeued request starts again without a second event."""
        if not self.has_started and self.end is None:
            self.has_started = True
            self._drop_untaken_position()
            self._append(started)
            self._started_id = self.last_id

    async def put(self, token: Token, *, stall_timeout_s: float | None) -> None:
        """Append a token as soon as there is room. Raises `ReaderStalled` after `stall_timeout_s` without room.

        With a retention the stalled reader is dismissed instead, because it can resume.
        """
        while self.end is None and not self._has_room(token):
            try:
                await self._wait_for_room(stall_timeout_s)
            except TimeoutError:
                if self.retention is None:
                    raise ReaderStalled from None
                self._dismiss_reader(self.retention)
        if self.end is None:
            self._append(token)

    def finish(self, end: Done | Failed) -> None:
        """Append the last event; later calls do nothing. Buffered events are still delivered before it."""
        if self.end is None:
            self.end = end
            self._drop_untaken_position()
            self._append(end)
            _wake(self._writer)

    # --- the retention -------------------------------------------------------------------------------------------

    def buffered(self) -> tuple[LoggedEvent, ...]:
        """All events in the log except the position."""
        return tuple(self._events)

    def drop_oldest(self) -> LoggedEvent | None:
        """Drop and return the oldest event. None when there is none, or the reader has yet to take it."""
        if not self._events or (self.reader is not None and self.reader.last_id < self._first_id):
            return None
        self.dropped_id = self._first_id
        return self._events.popleft()

    # ----------------------------------------------------------------------------------------------------------

    @property
    def _first_id(self) -> int:
        return self.last_id - len(self._events) + 1

    def _append(self, event: LoggedEvent) -> None:
        self.last_id += 1
        self._events.append(event)
        self._wake_reader()
        if self.retention is not None:
            self.retention.on_event(self, event)

    def _drop_untaken_position(self) -> None:
        if self._queued_id > self._taken_id:
            self._queued, self.last_id = None, self.last_id - 1

    def _has_room(self, token: Token) -> bool:
        if self.retention is not None:
            return self.retention.make_room(self, token)
        # The start is not counted: it is not a token.
        is_start_untaken = self._first_id == self._started_id
        return len(self._events) - is_start_untaken < self._max_buffered

    async def _wait_for_room(self, stall_timeout_s: float | None) -> None:
        self._writer = asyncio.get_running_loop().create_future()
        async with asyncio.timeout(stall_timeout_s):
            await self._writer

    def _dismiss_reader(self, retention: Retention) -> None:
        reader, self.reader = self.reader, None
        if reader is not None:
            reader.wake()
        _wake(self._writer)
        retention.on_detached(self)

    def _wake_reader(self) -> None:
        if self.reader is not None:
            self.reader.wake()


def _wake(future: asyncio.Future[None] | None) -> None:
    if future is not None and not future.done():
        future.set_result(None)
