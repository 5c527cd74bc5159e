"""The streaming response of one request. It detects a client that disconnects or stops reading.

However the response ends, the `finally` of `__call__` closes the request's stream: its slot or position is released
even when the response was cancelled before its first byte; for a resumable request the grace time starts. (So this is
not Starlette's `StreamingResponse` or an SSE library: an async generator that was never started has no `finally`.)
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from math import inf
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatstream.api.framing import Framing
from chatstream.runtime import RequestStream, RuntimeSettings

MAX_CHUNK_BYTES = 64 * 1024
"""Buffered events are sent in chunks of about this size, which a connection accepts at once."""


class RequestStreamResponse(Response):
    """Sends a request's events as they happen."""

    def __init__(
        self,
        stream: RequestStream,
        framing: Framing,
        settings: RuntimeSettings,
        headers: Mapping[str, str],
        *,
        skip_parts: int = 0,
    ) -> None:
        """`skip_parts`: parts of the first event that the client has received in an earlier response."""
        self._stream = stream
        self._framing = framing
        self._settings = settings
        self._skip_parts = skip_parts
        self.status_code = 200
        self.background = None
        self.media_type = framing.media_type
        self.body = b""
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # Send in a task of its own: waking this task at each event would resume all middleware around it.
        sending = asyncio.create_task(self._send_all(send))
        watching = asyncio.create_task(cancel_on_disconnect(self._stream, receive, sending.cancel))
        self._alarm = Alarm(sending)
        try:
            await asyncio.wait((sending,))
            if not sending.cancelled() and not sending.result():
                await _break_connection(send)
        finally:
            self._alarm.close()
            sending.cancel()
            watching.cancel()
            self._stream.close("client_disconnected")

    async def _send_all(self, send: Send) -> bool:
        """Send headers and events to the end. False: the connection must be broken, because the body is incomplete."""
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while True:
            chunk, is_last = await self._next_chunk()
            if chunk is None:
                return False
            if not await self._send_in_time(send, chunk, more_body=not is_last):
                self._stream.close("slow_reader")
                return False
            if is_last:
                return True
            if len(chunk) >= MAX_CHUNK_BYTES:
                await asyncio.sleep(0)  # let other streams proceed while a long answer is sent again

    async def _next_chunk(self) -> tuple[bytes | None, bool]:
        """Return the bytes of all events available now (None: break the connection), and whether they are the last."""
        try:
            with self._alarm.after(self._settings.keepalive_s):
                event = await anext(self._stream, None)
        except TimeoutError:
            return self._framing.keepalive, False
        if event is None:  # another response has taken over this stream
            return self._framing.closing_bytes, True
        chunk = bytearray()
        while True:
            skip_parts, self._skip_parts = self._skip_parts, 0
            encoded = self._framing.encode(event, self._stream.last_id, skip_parts)
            if encoded is None:
                return None, True
            chunk += encoded
            if event is self._stream.end:
                return bytes(chunk), True
            more = self._stream.next_nowait() if len(chunk) < MAX_CHUNK_BYTES else None
            if more is None:
                return bytes(chunk), False
            event = more

    async def _send_in_time(self, send: Send, chunk: bytes, *, more_body: bool) -> bool:
        """False when the client accepted nothing for `reader_stall_timeout_s`."""
        if not chunk and more_body:
            return True
        try:
            with self._alarm.after(self._settings.reader_stall_timeout_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": more_body})
        except TimeoutError:
            return False
        return True


async def _break_connection(send: Send) -> None:
    """Break the connection, so that the client sees an incomplete response.

    An ASGI server does so when the application returns early. But Starlette's `BaseHTTPMiddleware`, if the host uses
    it, would complete the response, and also if this raised; only an invalid message makes it fail.
    """
    try:
        await send({"type": "chatstream.broken"})
    except Exception:
        pass  # the server rejects the message too, and breaks the connection when the application returns


async def cancel_on_disconnect(stream: RequestStream, receive: Receive, interrupt: Callable[[], object]) -> None:
    """End the request when its client disconnects. Works under any middleware, once the body has been read.

    Closes the stream, which releases the position or slot, before it calls `interrupt`.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close("client_disconnected")
    interrupt()


class Alarm:
    """Interrupts a waiting task at a deadline with `TimeoutError`, as `asyncio.timeout` does.

    For a deadline that often moves: moving it later sets no timer; the pending timer re-arms when it fires early.
    """

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._loop = task.get_loop()
        self._due_s = inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = inf
        self._has_fired = False

    def after(self, seconds: float | None) -> Alarm:
        """`with alarm.after(1.0):` limits the time that the task spends in the block, in seconds. None: no limit."""
        self._due_s = inf if seconds is None else self._loop.time() + seconds
        if self._due_s < self._timer_due_s:
            self._arm()
        return self

    def close(self) -> None:
        """Cancel the timer. The alarm never fires again."""
        self._due_s, self._has_fired = inf, False
        if self._timer is not None:
            self._timer.cancel()
        del self._task  # its exception may reference these frames: avoid the cycle

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._due_s = inf
        if self._has_fired:
            self._has_fired = False
            # A cancellation from elsewhere has precedence.
            if self._task.uncancel() == 0 and kind is asyncio.CancelledError:
                raise TimeoutError

    def _arm(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer, self._timer_due_s = self._loop.call_at(self._due_s, self._fire), self._due_s

    def _fire(self) -> None:
        self._timer, self._timer_due_s = None, inf
        if self._loop.time() < self._due_s < inf:
            self._arm()
        elif self._due_s < inf:
            self._has_fired = True
            self._task.cancel()
