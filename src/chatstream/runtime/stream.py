"""What happens to one request, as a bounded stream of events with one reader."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable

from chatstream.types import Done, Failed, Queued, Started, StreamEvent, Token


class ReaderStalled(Exception):
    """The reader did not take anything for too long, and the buffer is full."""


class RequestStream:
    """An async iterator over `Queued`… `Started`, `Token`…, then exactly one `Done` or `Failed`.

    The reader must iterate to the end or call `close()`; closing early cancels the request, wherever it is.
    Places in line are not buffered, only the newest is kept. Tokens are, up to `max_buffered`; then the writer waits.
    """

    def __init__(self, request_id: str, *, max_buffered: int, on_closed: Callable[[str], object]) -> None:
        """`on_closed(by)` is called when the reader leaves before the end."""
        self.request_id = request_id
        self._max_buffered = max_buffered
        self._on_closed = on_closed
        self._position: Queued | None = None
        self._started: Started | None = None
        self._tokens: deque[Token] = deque()
        self._end: Done | Failed | None = None
        self._is_exhausted = False
        self._has_started = False
        self._reader: asyncio.Future[None] | None = None
        self._writer: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = "ended" if self._end else "running" if self._has_started else "waiting"
        return f"<RequestStream {self.request_id} {state} buffered={len(self._tokens)}/{self._max_buffered}>"

    # --- the reader's side ------------------------------------------------------------------------------------

    def __aiter__(self) -> RequestStream:
        return self

    async def __anext__(self) -> StreamEvent:
        while (event := self.next_nowait()) is None:
            if self._is_exhausted:
                raise StopAsyncIteration
            self._reader = asyncio.get_running_loop().create_future()
            await self._reader
        return event

    def close(self, by: str = "client_disconnected") -> None:
        """The reader leaves. Ends the request unless it has ended. Idempotent."""
        if self._end is None:
            self._on_closed(by)

    @property
    def has_started(self) -> bool:
        return self._has_started

    @property
    def end(self) -> Done | Failed | None:
        """How it ended; None while it is live."""
        return self._end

    def next_nowait(self) -> StreamEvent | None:
        """The next event if it has happened already."""
        event: StreamEvent | None = None
        if self._started is not None:
            event, self._started = self._started, None
        elif self._position is not None:
            event, self._position = self._position, None
        elif self._tokens:
            event = self._tokens.popleft()
            _wake(self._writer)
        elif self._end is not None and not self._is_exhausted:
            event, self._is_exhausted = self._end, True
        return event

    # --- the writer's side: the worker ------------------------------------------------------------------------

    def show_position(self, queued: Queued) -> None:
        if not self._has_started and self._end is None:
            self._position = queued
            _wake(self._reader)

    def show_start(self, started: Started) -> None:
        """Shown once, however often the request is started."""
        if not self._has_started and self._end is None:
            self._has_started = True
            self._started, self._position = started, None
            _wake(self._reader)

    async def put(self, token: Token, *, stall_timeout_s: float | None) -> None:
        """Returns when there is room. Raises `ReaderStalled` when the reader took nothing for so long."""
        if len(self._tokens) >= self._max_buffered and self._end is None:
            await self._wait_for_room(stall_timeout_s)
        if self._end is None:
            self._tokens.append(token)
            _wake(self._reader)

    def finish(self, end: Done | Failed) -> None:
        """The first call counts. What is buffered is still delivered before it."""
        if self._end is None:
            self._end = end
            self._position = None
            _wake(self._reader)
            _wake(self._writer)

    async def _wait_for_room(self, stall_timeout_s: float | None) -> None:
        self._writer = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(stall_timeout_s):
                await self._writer
        except TimeoutError:
            raise ReaderStalled from None


def _wake(waiter: asyncio.Future[None] | None) -> None:
    if waiter is not None and not waiter.done():
        waiter.set_result(None)
