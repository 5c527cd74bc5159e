"""A `ChatStream` with its HTTP endpoints in this process, without sockets: for tests in virtual time."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any

import httpx2
from starlette.types import ASGIApp

from chatstream import ChatRequest, ChatStream, Message, SchedulerSettings
from chatstream.api.app import create_app
from chatstream.runtime import RequestStream
from chatstream.testing import FakeEngine, Fault, History
from chatstream.testing.fake_engine import Step
from chatstream.types import GenerationRequest

SSE = {"accept": "text/event-stream"}
STEP_S = 0.1
LOCAL = ("127.0.0.1", 50000)


def script(request: GenerationRequest) -> Sequence[Step]:
    """Choose the fake model's answer by the first word of the message."""
    words = request.prompt.messages[-1].content.split()
    first = words[0] if words else ""
    match first:
        case "hang":
            return ["on ", Fault.HANG]
        case "fail":
            return ["half ", RuntimeError("boom")]
        case "fail-at-once":
            return [RuntimeError("boom")]
        case "long":
            return ["on "] * 10
    return [f"re {first}", " and", " more"]


ANSWER = "re hello and more"
"""The answer to "hello"."""


@dataclass
class Service:
    chat_stream: ChatStream
    engine: FakeEngine
    app: ASGIApp
    history: History
    clients: list[httpx2.AsyncClient] = field(default_factory=list)

    def browser(self, client: tuple[str, int] = LOCAL, base_url: str = "http://127.0.0.1:8000") -> httpx2.AsyncClient:
        """Return a client with its own cookies."""
        transport = httpx2.ASGITransport(app=self.app, client=client)
        browser = httpx2.AsyncClient(transport=transport, base_url=base_url)
        self.clients.append(browser)
        return browser

    async def occupy(self, count: int = 1) -> list[RequestStream]:
        """Submit `count` requests that run or wait until their streams are closed."""
        return [await self.chat_stream.submit(ChatRequest(messages=(Message("user", "hang"),))) for _ in range(count)]

    def prompt_of(self, request_id: str) -> list[tuple[str, str]]:
        return [(m.role, m.content) for m in self.engine.prompts[request_id].messages]

    @property
    def num_requests(self) -> int:
        stats = self.chat_stream.stats()
        return stats.running + stats.waiting

    async def close(self) -> None:
        await self.chat_stream.stop_queue_worker(0.0)
        await asyncio.sleep(0.01)  # callbacks and cancelled tasks
        for client in self.clients:
            await client.aclose()


@asynccontextmanager
async def open_service(
    engine: FakeEngine | None = None,
    *,
    n: int = 1,
    q: int = 5,
    is_started: bool = True,
    app: Callable[[ChatStream], ASGIApp] = create_app,
    **options: Any,
) -> AsyncIterator[Service]:
    """Start a service; at the end check that no request is left and that the event log is consistent."""
    engine = engine or FakeEngine(script, step_s=STEP_S)
    chat_stream = ChatStream(engine=engine, max_concurrency=n, max_queue_size=q, **options)
    settings = replace(options.get("scheduler") or SchedulerSettings(), max_concurrency=n)
    history = History(
        n,
        q,
        is_fcfs=chat_stream.stats().policy == "fcfs",
        max_running_per_client=settings.max_running_per_client,
        has_slices=settings.slice_tokens is not None or settings.is_adaptive,
    )
    service = Service(chat_stream, engine, app(chat_stream), history)
    chat_stream.observe(lambda event: service.history.feed([event]))
    if is_started:
        await chat_stream.start_queue_worker()
    try:
        yield service
    finally:
        await service.close()
    service.history.check_complete()
    assert not engine.active


class Raw:
    """One request over plain ASGI: records messages as they are sent. Leaving the block disconnects the client."""

    def __init__(
        self,
        app: ASGIApp,
        path: str,
        body: object = b"",
        *,
        method: str = "POST",
        headers: dict[str, str] | None = None,
        client: tuple[str, int] = LOCAL,
    ) -> None:
        self._app = app
        self._scope = {
            "type": "http", "asgi": {"version": "3.0"}, "http_version": "1.1", "method": method, "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"", "server": ("x", 80),
            "client": client, "headers": [(k.lower().encode(), v.encode()) for k, v in (headers or {}).items()],
        }  # fmt: skip
        self._body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self._is_body_read = False
        self._disconnected = asyncio.Event()
        self.sent: list[dict[str, Any]] = []

    async def __aenter__(self) -> Raw:
        self.task = asyncio.ensure_future(self._app(self._scope, self._receive, self._send))  # type: ignore[arg-type]
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._disconnected.set()
        await self.task

    @property
    def status(self) -> int | None:
        return self.sent[0]["status"] if self.sent else None

    @property
    def headers(self) -> dict[str, str]:
        return {name.decode(): value.decode() for name, value in self.sent[0]["headers"]}

    @property
    def body(self) -> bytes:
        return b"".join(m["body"] for m in self.sent if m["type"] == "http.response.body")

    @property
    def is_complete(self) -> bool:
        return any(m["type"] == "http.response.body" and not m.get("more_body", False) for m in self.sent)

    async def until(self, condition: Callable[[], object]) -> None:
        for _ in range(10_000):
            if condition():
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"it never came true; sent: {self.sent}")

    async def _receive(self) -> dict[str, Any]:
        if not self._is_body_read:
            self._is_body_read = True
            return {"type": "http.request", "body": self._body, "more_body": False}
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self.sent.append(message)


@dataclass
class Event:
    id: str
    kind: str
    data: dict[str, Any]


def parse_events(body: str | bytes) -> list[Event]:
    """Parse server-sent events strictly: each field at most once per event. Comments are skipped."""
    text = body.decode() if isinstance(body, bytes) else body
    assert text.endswith("\n\n")
    events = []
    for block in text.removesuffix("\n\n").split("\n\n"):
        lines = [line.split(": ", 1) for line in block.split("\n") if not line.startswith(":")]
        if lines:
            fields = dict(lines)
            assert len(fields) == len(lines), block
            events.append(Event(fields.get("id", ""), fields.get("event", ""), json.loads(fields["data"])))
    return events


async def ask(browser: httpx2.AsyncClient, user_input: str | None, **more: Any) -> list[Event]:
    response = await browser.post("/chat_stream", json={"user_input": user_input, **more}, headers=SSE)
    assert response.status_code == 200, response.text
    return parse_events(response.text)


def answer_of(events: list[Event]) -> str:
    return "".join(event.data["text"] for event in events if event.kind == "token")


def kinds(events: list[Event]) -> list[str]:
    return [event.kind for event in events]
