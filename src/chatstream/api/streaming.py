"""A response that follows one request to its end, and notices when its client leaves or stops reading.

Whatever ends the response, the request's stream is closed in `__call__`'s `finally`: its slot or place is given back
also when the response was cancelled before its first byte. (That is why this is not Starlette's `StreamingResponse`
or an SSE library: an async generator that was never started has no `finally`.)
"""

from __future__ import annotations

import anyio
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from chatstream.api.framing import Framing
from chatstream.runtime import RequestStream, RuntimeSettings


class FollowingResponse(Response):
    """Sends a request's events as they happen."""

    def __init__(
        self, stream: RequestStream, framing: Framing, settings: RuntimeSettings, headers: dict[str, str]
    ) -> None:
        self._stream = stream
        self._framing = framing
        self._settings = settings
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
                await self._follow(send)
                group.cancel_scope.cancel()
        finally:
            self._stream.close("client_disconnected")

    async def _follow(self, send: Send) -> None:
        await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
        while True:
            chunk, is_last = await self._next_chunk()
            if chunk is None:
                return  # the server breaks the connection of an answer without an end
            if not await self._send_in_time(send, chunk, more_body=not is_last):
                self._stream.close("slow_reader")
                return
            if is_last:
                return

    async def _next_chunk(self) -> tuple[bytes | None, bool]:
        """Everything that can be said now, and whether it is the last."""
        with anyio.move_on_after(self._settings.keepalive_s):
            event = await anext(self._stream)
            chunk = b""
            while True:
                encoded = self._framing.encode(event)
                if encoded is None:
                    return None, True
                chunk += encoded
                if event is self._stream.end:
                    return chunk, True
                more = self._stream.next_nowait()
                if more is None:
                    return chunk, False
                event = more
        return self._framing.keepalive, False

    async def _send_in_time(self, send: Send, chunk: bytes, *, more_body: bool) -> bool:
        """False when the client's buffers stayed full for so long that it has stopped reading."""
        if not chunk and more_body:
            return True
        with anyio.move_on_after(self._settings.reader_stall_timeout_s) as scope:
            await send({"type": "http.response.body", "body": chunk, "more_body": more_body})
        return not scope.cancelled_caught


async def leave_with_client(stream: RequestStream, receive: Receive, scope: anyio.CancelScope) -> None:
    """End the request when its client is gone. Works under any middleware, once the body has been read.

    The stream is closed here, not by the cancellation: anyio delivers that only to a task that it finds waiting, and
    an engine without a pause between its tokens never leaves the reader waiting.
    """
    while (await receive())["type"] != "http.disconnect":
        pass
    stream.close("client_disconnected")
    scope.cancel()
