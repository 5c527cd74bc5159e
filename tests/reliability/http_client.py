"""A minimal HTTP client over a `Peer` that exposes every byte of the response. It parses with h11."""

from __future__ import annotations

import json
import re
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import h11

from tests.reliability.network import Peer


class Broken(Exception):
    """The connection ended before the response did."""


@dataclass(frozen=True, slots=True)
class SseEvent:
    """One server-sent event."""

    kind: str
    data: str
    id: str


class Exchange:
    """One request on a connection of its own, and its response."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer
        self._parser = h11.Connection(h11.CLIENT)
        self.status = 0
        self.headers: dict[str, str] = {}

    def ask(self, method: str, path: str, body: object = None, headers: dict[str, str] | None = None) -> None:
        self.peer.send(self.request_bytes(method, path, body, headers))

    def request_bytes(self, method: str, path: str, body: object, headers: dict[str, str] | None) -> bytes:
        content = b"" if body is None else json.dumps(body).encode()
        all_headers = {"host": "server", "content-length": str(len(content)), **(headers or {})}
        request = h11.Request(method=method, target=path, headers=list(all_headers.items()))
        sent = self._parser.send(request) + self._parser.send(h11.Data(data=content))
        return sent + self._parser.send(h11.EndOfMessage())

    async def head(self) -> int:
        """Wait for the status line and headers. Raises `Broken`."""
        event = await self._next()
        assert isinstance(event, h11.Response), event
        self.status = event.status_code
        self.headers = {name.decode(): value.decode() for name, value in event.headers}
        return self.status

    async def chunks(self) -> AsyncIterator[bytes]:
        """Yield the body in pieces as they arrive. Raises `Broken` if it does not end."""
        while not isinstance(event := await self._next(), h11.EndOfMessage):
            assert isinstance(event, h11.Data), event
            yield bytes(event.data)

    async def body(self) -> bytes:
        return b"".join([chunk async for chunk in self.chunks()])

    async def json(self) -> Any:
        return json.loads(await self.body())

    async def sse(self) -> AsyncIterator[SseEvent]:
        """Yield the server-sent events, without comments."""
        text = ""
        async for chunk in self.chunks():
            text += chunk.decode()
            *frames, text = text.split("\n\n")
            for frame in frames:
                fields = dict(re.findall(r"^(\w+): ?(.*)$", frame, re.MULTILINE))
                if "data" in fields:
                    yield SseEvent(fields.get("event", ""), fields["data"], fields.get("id", ""))

    async def _next(self) -> Any:
        try:
            while (event := self._parser.next_event()) is h11.NEED_DATA:
                self._parser.receive_data(await self.peer.receive())
        except (ConnectionError, h11.RemoteProtocolError) as error:
            raise Broken from error
        return event
