"""A response that follows one request to its end, and notices when its client leaves or stops reading.

Whatever ends the response, the request's stream is closed in `__call__`'s `finally`: its slot or place is given back
also when the response was cancelled before its first byte; of a resumable one the grace time begins. (That is why this
is not Starlette's `StreamingResponse` or an SSE library: an async generator that was never started has no `finally`.)
"""

from __future__ import annotations

from collections.abc import Mapping

import anyio
import anyio.lowlevel
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
        try:
            async with anyio.create_task_group() as group:
                group.start_soon(leave_with_client, self._stream, receive, group.cancel_scope)
                if not await self._follow(send):
                    await _break_connection(send)
                group.cancel_scope.cancel()
        finally:
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
                await anyio.lowlevel.checkpoint()  # a long answer that is read again must not hold up the others

    async def _next_chunk(self) -> tuple[bytes | None, bool]:
        """Everything that can be said now, and whether it is the last."""
        with anyio.move_on_after(self._settings.keepalive_s):
            event = await anext(self._stream, None)
            if event is None:  # another response goes on with this stream
                return self._framing.farewell, True
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
        return self._framing.keepalive, False

    async def _send_in_time(self, send: Send, chunk: bytes, *, more_body: bool) -> bool:
        """False when the client's buffers stayed full for so long that it has stopped reading."""
        if not chunk and more_body:
            return True
        with anyio.move_on_after(self._settings.reader_stall_timeout_s) as scope:
            await send({"type": "http.response.body", "body": chunk, "more_body": more_body})
        return not scope.cancelled_caught


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


async def leave_with_client(stream: RequestStream, receive: Receive, scope: anyio.CancelScope) -> None:
    """End the request when its client is gone. Works under any middleware, once the body has been read.

    The stream is closed here, not by the cancellation: anyio delivers that only to a task that it finds waiting, and
    an engine without a pause between its tokens never leaves the reader waiting.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close("client_disconnected")
    scope.cancel()
