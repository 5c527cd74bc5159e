"""A real server on a real socket in this process, and its clients."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any

import httpx2
import uvicorn
from httpx2 import EventSource

from chatstream import ChatStream
from chatstream.api.app import create_app
from chatstream.scheduler import events as ev
from chatstream.testing import History


@dataclass
class Server:
    """A running server. `chat_stream` and `log` can be read from the test's thread.

    `loop` is the server's event loop, once it has served a request.
    """

    url: str
    chat_stream: ChatStream
    history: History
    log: list[ev.Event] = field(default_factory=list)
    loop: asyncio.AbstractEventLoop | None = None

    @property
    def running(self) -> int:
        return self.chat_stream.stats().running

    @property
    def waiting(self) -> int:
        return self.chat_stream.stats().waiting

    def client(self, **options: Any) -> httpx2.AsyncClient:
        """Return a client with its own cookies."""
        # Without certificates: loading them takes longer than most answers.
        return httpx2.AsyncClient(base_url=self.url, timeout=30.0, verify=False, **options)

    async def until(self, condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
        """Wait until the condition is true."""
        deadline_s = time.monotonic() + timeout_s
        while not condition():
            assert time.monotonic() < deadline_s, f"the condition never became true: {self.chat_stream!r}"
            await asyncio.sleep(0.002)

    async def until_idle(self) -> None:
        """Wait until every request has ended; check that the event log is consistent."""
        await self.until(lambda: self.running == 0 and self.waiting == 0)
        self.history.check_complete()


@contextmanager
def serve(chat_stream: ChatStream, app: Any = None, **uvicorn_options: Any) -> Iterator[Server]:
    """Serve until the block ends. `app` is a host application with `chat_stream`; default: `create_app`."""
    stats = chat_stream.stats()
    history = History(stats.max_concurrency, stats.max_queue_size)
    server = Server("", chat_stream, history)

    def observe(event: ev.Event) -> None:
        server.loop = asyncio.get_running_loop()
        history.feed([event])
        server.log.append(event)

    chat_stream.observe(observe)
    options = {"log_level": "critical", "lifespan": "on", "timeout_graceful_shutdown": 5, **uvicorn_options}
    host = uvicorn.Server(uvicorn.Config(app or create_app(chat_stream), host="127.0.0.1", port=0, **options))
    thread = threading.Thread(target=host.run, name="test-server")
    thread.start()
    try:
        deadline_s = time.monotonic() + 30.0
        while not host.started:
            assert thread.is_alive(), "the server did not start"
            assert time.monotonic() < deadline_s, "the server did not start in time"
            time.sleep(0.005)
        port = host.servers[0].sockets[0].getsockname()[1]
        server.url = f"http://127.0.0.1:{port}"
        yield server
    finally:
        host.should_exit = True
        thread.join(20.0)
        assert not thread.is_alive(), "the server did not stop"


@dataclass
class Seen:
    """An event and the time at which a client received it."""

    at_s: float
    kind: str
    data: dict[str, Any]


@asynccontextmanager
async def asking(client: httpx2.AsyncClient, user_input: str, **fields: Any) -> AsyncIterator[AsyncIterator[Seen]]:
    """Open `/chat_stream` as server-sent events; leaving the block closes the connection."""
    body = {"user_input": user_input, **fields}
    async with client.stream("POST", "/chat_stream", json=body, headers={"accept": "text/event-stream"}) as response:
        assert response.status_code == 200, await response.aread()
        yield _events(response)


async def _events(response: httpx2.Response) -> AsyncIterator[Seen]:
    async for event in EventSource(response):
        yield Seen(time.monotonic(), event.event, json.loads(event.data))


async def ask(client: httpx2.AsyncClient, user_input: str, **fields: Any) -> list[Seen]:
    """Send a message and read all events."""
    async with asking(client, user_input, **fields) as events:
        return [event async for event in events]


async def ask_legacy(client: httpx2.AsyncClient, user_input: str) -> str:
    """Send a message and return the whole body in the wire format of 0.3."""
    response = await client.post("/chat_stream", json={"user_input": user_input})
    assert response.status_code == 200, response.text
    return response.text


def text(events: list[Seen]) -> str:
    return "".join(event.data["text"] for event in events if event.kind == "token")


def kinds(events: list[Seen]) -> list[str]:
    return [event.kind for event in events]
