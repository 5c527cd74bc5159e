"""What happens to one request: a log with one writer, the worker, and one reader at a time.

    QueueWorker ──show_position, show_start, put, finish──▶ EventLog ◀──take, left── RequestStream ◀── its reader

Events are numbered from 1, without a gap for whoever takes them in time. A place in line that nobody was told is
replaced by the newer one and leaves it its number.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Protocol, TypeAlias

from chatstream.types import Done, Failed, Queued, Started, StreamEvent, Token

LoggedEvent: TypeAlias = Started | Token | Done | Failed


class ReaderStalled(Exception):
    """The reader did not take anything for too long, and the buffer is full."""


class Retention(Protocol):
    """Who keeps a log also after it was read, for readers who come back."""

    def make_room(self, log: EventLog, token: Token) -> bool:
        """May this log grow? False: not before its reader has taken what would have to go."""

    def on_event(self, log: EventLog, event: LoggedEvent) -> None:
        """It has grown by one event."""

    def on_left(self, log: EventLog) -> None:
        """It has no reader any more."""


class RequestStream:
    """An async iterator over `Queued`… `Started`, `Token`…, then exactly one `Done` or `Failed`.

    The reader must iterate to the end or call `close()`; closing early cancels the request, wherever it is, unless it
    is resumable. Places in line are not buffered, only the newest is kept. Tokens are, up to a bound; then the
    generation waits. A reader who was replaced by a later one comes to an end without that last event.
    """

    def __init__(self, log: EventLog, last_id: int = 0) -> None:
        """Made by `EventLog.attach`."""
        self._log = log
        self.last_id = last_id
        """The number of the event taken last."""
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
        """The next event if it has happened already."""
        return None if self.is_dismissed else self._log.take(self)

    def close(self, by: str = "client_disconnected") -> None:
        """The reader leaves. Ends the request unless it has ended or is resumable; of one that had ended nothing more
        can be read. Idempotent."""
        self._log.left(self, by)

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
        """How it ended; None while it is live."""
        return self._log.end

    @property
    def is_exhausted(self) -> bool:
        """The last event was taken."""
        return self._log.end is not None and self.last_id == self._log.last_id

    @property
    def is_dismissed(self) -> bool:
        """It left a resumable stream, did not take anything for too long, or a later reader took over."""
        return self._log.reader is not self

    def wake(self) -> None:
        _wake(self._waiting)


class EventLog:
    """The writer's side. Holds what the reader has not taken yet, and with a retention also what it has."""

    def __init__(self, request_id: str, *, max_buffered: int, on_closed: Callable[[str], object]) -> None:
        """`on_closed(by)` is called when the reader leaves before the end and the log has no retention.

        `max_buffered` is the number of tokens that its reader may lag behind; a retention has a bound of its own.
        """
        self.request_id = request_id
        self.retention: Retention | None = None
        self.reader: RequestStream | None = None
        """Held until it has left after the end, or has taken it: then nothing is left for a look for cycles."""
        self.end: Done | Failed | None = None
        self.has_started = False
        self.last_id = 0
        """The number of the newest event."""
        self.forgotten_id = 0
        """The number of the newest event that a retention has given up; a reader must have taken it."""
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
        return f"<EventLog {self.request_id} {state} events={self.last_id} held={len(self._events)}>"

    # --- readers ----------------------------------------------------------------------------------------------

    def attach(self, last_id: int = 0) -> RequestStream:
        """A reader who has taken the event `last_id`. It replaces the reader before it."""
        replaced, self.reader = self.reader, RequestStream(self, last_id)
        self._taken_id = max(self._taken_id, last_id)
        if replaced is not None:
            replaced.wake()
        _wake(self._writer)
        return self.reader

    def take(self, reader: RequestStream) -> StreamEvent | None:
        """The next event for its reader, if it has happened."""
        event: StreamEvent
        if self._queued is not None and reader.last_id < self._queued_id:
            event, reader.last_id = self._queued, self._queued_id
        elif reader.last_id < self.last_id:
            # Numbers below the first one here are places in line that were replaced.
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

    def left(self, reader: RequestStream, by: str) -> None:
        if self.retention is not None:
            if reader is self.reader:
                self._dismiss_reader(self.retention)
        elif self.end is None:
            self._on_closed(by)  # it may still read how it ended
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
        """Shown once, however often the request is started."""
        if not self.has_started and self.end is None:
            self.has_started = True
            self._drop_unsent_position()
            self._append(started)
            self._started_id = self.last_id

    async def put(self, token: Token, *, stall_timeout_s: float | None) -> None:
        """Returns when there is room. Raises `ReaderStalled` when the reader took nothing for so long.

        With a retention such a reader is dismissed instead: it may come back.
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
        """The first call counts. What is buffered is still delivered before it."""
        if self.end is None:
            self.end = end
            self._drop_unsent_position()
            self._append(end)
            _wake(self._writer)

    # --- the retention -------------------------------------------------------------------------------------------

    def held(self) -> tuple[LoggedEvent, ...]:
        """All events that are here, but for the place in line."""
        return tuple(self._events)

    def forget_oldest(self) -> LoggedEvent | None:
        """Give up the oldest event. None when there is none, or its reader has yet to take it."""
        if not self._events or (self.reader is not None and self.reader.last_id < self._first_id):
            return None
        self.forgotten_id = self._first_id
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

    def _drop_unsent_position(self) -> None:
        if self._queued_id > self._taken_id:
            self._queued, self.last_id = None, self.last_id - 1

    def _has_room(self, token: Token) -> bool:
        if self.retention is not None:
            return self.retention.make_room(self, token)
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
        retention.on_left(self)

    def _wake_reader(self) -> None:
        if self.reader is not None:
            self.reader.wake()


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
