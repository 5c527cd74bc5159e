"""A response that follows one request to its end, and notices when its client leaves or stops reading.

Whatever ends the response, the request's stream is closed in `__call__`'s `finally`: its slot or place is given back
also when the response was cancelled before its first byte; of a resumable one the grace time begins. (That is why this
is not Starlette's `StreamingResponse` or an SSE library: an async generator that was never started has no `finally`.)
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
"""What has happened already is said in pieces of this size: as much as a connection takes at once."""


class FollowingResponse(Response):
    """Sends a request's events as they happen."""

    def __init__(
        self,
        stream: RequestStream,
        framing: Framing,
        settings: RuntimeSettings,
        headers: Mapping[str, str],
        *,
        parts_taken: int = 0,
    ) -> None:
        """`parts_taken`: parts of the first event that the client has from an earlier response."""
        self._stream = stream
        self._framing = framing
        self._settings = settings
        self._parts_taken = parts_taken
        self.status_code = 200
        self.background = None
        self.media_type = framing.media_type
        self.body = b""
        self.init_headers({"Cache-Control": "no-store", "X-Accel-Buffering": "no", **headers})
        del self.headers["content-length"]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # In a task of its own: waking this one would wake the server and all middleware around it, at every event.
        following = asyncio.create_task(self._follow(send))
        watching = asyncio.create_task(cancel_on_disconnect(self._stream, receive, following.cancel))
        self._alarm = Alarm(following)
        try:
            await asyncio.wait((following,))
            if not following.cancelled() and not following.result():
                await _break_connection(send)
        finally:
            self._alarm.close()
            following.cancel()
            watching.cancel()
            self._stream.close("client_disconnected")

    async def _follow(self, send: Send) -> bool:
        """False when the answer has no end that the client could be told."""
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
                await asyncio.sleep(0)  # a long answer that is read again must not hold up the others

    async def _next_chunk(self) -> tuple[bytes | None, bool]:
        """Everything that can be said now, and whether it is the last."""
        try:
            with self._alarm.after(self._settings.keepalive_s):
                event = await anext(self._stream, None)
        except TimeoutError:
            return self._framing.keepalive, False
        if event is None:  # another response goes on with this stream
            return self._framing.closing_bytes, True
        chunk = bytearray()
        while True:
            parts_taken, self._parts_taken = self._parts_taken, 0
            encoded = self._framing.encode(event, self._stream.last_id, parts_taken)
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
        """False when the client's buffers stayed full for so long that it has stopped reading."""
        if not chunk and more_body:
            return True
        try:
            with self._alarm.after(self._settings.reader_stall_timeout_s):
                await send({"type": "http.response.body", "body": chunk, "more_body": more_body})
        except TimeoutError:
            return False
        return True


async def _break_connection(send: Send) -> None:
    """Let the client see that what it has is not all.

    A server breaks the connection of an application that returns too early. But Starlette's `BaseHTTPMiddleware`,
    where the host has one, would end the response properly, and also when we raised; only a message that no response
    can hold makes it give up.
    """
    try:
        await send({"type": "chatstream.broken"})
    except Exception:
        pass  # the server itself does not know the message either, and does the right thing when we return


async def cancel_on_disconnect(stream: RequestStream, receive: Receive, interrupt: Callable[[], object]) -> None:
    """End the request when its client is gone. Works under any middleware, once the body has been read.

    Its place is free before `interrupt` is called: what else there is to be cleared away can wait its turn.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close("client_disconnected")
    interrupt()


class Alarm:
    """Interrupts a task that waits for too long, with `TimeoutError`, as `asyncio.timeout` does.

    Made for a deadline that moves all the time: moving it sets no timer. The one that is set looks again when it fires.
    """

    def __init__(self, task: asyncio.Task[Any]) -> None:
        self._task = task
        self._loop = task.get_loop()
        self._due_s = inf
        self._timer: asyncio.TimerHandle | None = None
        self._timer_due_s = inf
        self._has_rung = False

    def after(self, seconds: float | None) -> Alarm:
        """`with alarm.after(1.0):` what the task waits for in the block. None: for ever."""
        self._due_s = inf if seconds is None else self._loop.time() + seconds
        if self._due_s < self._timer_due_s:
            self._arm()
        return self

    def close(self) -> None:
        """Never ring again."""
        self._due_s, self._has_rung = inf, False
        if self._timer is not None:
            self._timer.cancel()
        del self._task  # the frames in which we are may hang on what it raised: a cycle

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, *details: object) -> None:
        self._due_s = inf
        if self._has_rung:
            self._has_rung = False
            # Whoever else wants the task to end has precedence.
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
            self._has_rung = True
            self._task.cancel()
