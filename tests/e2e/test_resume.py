"""Broken connections over real sockets: during an answer, in the queue, and repeatedly."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from chatstream import ChatStream, RuntimeSettings
from chatstream.scheduler import events as ev
from tests.e2e.server import Server, serve

pytestmark = pytest.mark.anyio

WORDS = [f"w{n}" for n in range(60)]
ANSWER = " ".join(WORDS)
ENDLESS = " ".join(["on"] * 100_000)
SSE = {"accept": "text/event-stream"}


@contextmanager
def mock_server(max_concurrency: int = 1, **runtime: Any) -> Iterator[Server]:
    chat_stream = ChatStream(
        use_mock_response=True,
        mock_params={"type": "echo", "time_per_token_sec": 0.01},
        max_concurrency=max_concurrency,
        max_queue_size=50,
        runtime=RuntimeSettings(**runtime),
    )
    with serve(chat_stream) as server:
        yield server


class Browser:
    """A client with a resumable stream that stores the last event id."""

    def __init__(self, server: Server, user_input: str, **fields: Any) -> None:
        self.server = server
        self.body = {"user_input": user_input, "resumable": True, **fields}
        self.request_id = ""
        self.ids: list[str] = []
        self.events: list[tuple[str, dict[str, Any]]] = []
        self.has_all = False

    @property
    def text(self) -> str:
        return "".join(data["text"] for kind, data in self.events if kind == "token")

    @property
    def kinds(self) -> list[str]:
        return [kind for kind, _ in self.events]

    async def connect(self, num_events: int = 10**9) -> None:
        """Send or resume the request; reset the connection after `num_events` events."""
        path = f"/requests/{self.request_id}/stream" if self.request_id else "/chat_stream"
        last = {"last-event-id": self.ids[-1]} if self.ids else {}
        # A new connection, closed with an RST: data in flight is lost.
        options = [(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))]
        transport = httpx2.AsyncHTTPTransport(verify=False, socket_options=options)
        async with httpx2.AsyncClient(base_url=self.server.url, timeout=30.0, transport=transport) as client:
            method, body = ("GET", None) if self.request_id else ("POST", self.body)
            async with client.stream(method, path, json=body, headers={**SSE, **last}) as response:
                assert response.status_code == 200, await response.aread()
                self.request_id = response.headers["x-chatstream-request-id"]
                await self._read(response, num_events)

    async def _read(self, response: httpx2.Response, num_events: int) -> None:
        rest = ""
        async for piece in response.aiter_text():
            *blocks, rest = (rest + piece).split("\n\n")
            for block in blocks:
                fields = dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
                if not fields:
                    continue
                self.ids.append(fields["id"])
                self.events.append((fields["event"], json.loads(fields["data"])))
                self.has_all = fields["event"] in ("done", "error")
                num_events -= 1
                if num_events == 0:
                    return


def is_right(browser: Browser) -> bool:
    """Whether every event came once and in order, with the complete answer."""
    return (
        browser.ids == [str(n) for n in range(1, len(browser.ids) + 1)]
        and browser.text == browser.body["user_input"]
        and browser.kinds[-1] == "done"
    )


def has_lost_its_reader(server: Server) -> bool:
    return server.chat_stream.resumables.stats().disconnected == 1


async def test_an_answer_continues_after_a_connection_reset() -> None:
    with mock_server() as server:
        browser = Browser(server, ANSWER)
        await browser.connect(num_events=20)
        await server.until(lambda: has_lost_its_reader(server))
        assert server.running == 1
        await browser.connect()
        assert is_right(browser)
        await server.until_idle()
    assert not any(isinstance(event, ev.Cancelled) for event in server.log)


async def test_a_position_outlives_the_connection() -> None:
    with mock_server() as server:
        running, first, second = (Browser(server, user_input) for user_input in (ENDLESS, ANSWER, "x"))
        holding = asyncio.create_task(running.connect())
        await server.until(lambda: running.request_id != "")
        await first.connect(num_events=1)
        await server.until(lambda: has_lost_its_reader(server))
        await second.connect(num_events=1)
        assert second.events[0][1]["position"] == 2
        async with server.client() as client:
            await client.delete(f"/requests/{running.request_id}")
        await holding
        await first.connect()
        await second.connect()
        assert is_right(first)
        assert is_right(second)
        await server.until_idle()


@pytest.mark.parametrize("num_events", [1, 7])
async def test_an_answer_over_many_broken_connections_is_complete(num_events: int) -> None:
    with mock_server(max_concurrency=4) as server:
        browsers = [Browser(server, ANSWER) for _ in range(4)]

        async def read_to_the_end(browser: Browser) -> None:
            while not browser.has_all:
                await browser.connect(num_events)

        await asyncio.gather(*map(read_to_the_end, browsers))
        assert all(map(is_right, browsers))
        await server.until_idle()


async def test_a_request_whose_client_never_reconnects_is_cancelled() -> None:
    with mock_server(resume_grace_s=0.3) as server:
        browser = Browser(server, ENDLESS)
        await browser.connect(num_events=5)
        await server.until_idle()
        (end,) = (event for event in server.log if isinstance(event, ev.Cancelled))
        assert end.by == "client_disconnected"
        stats = server.chat_stream.resumables.stats()
        assert (stats.live, stats.ended, stats.bytes) == (0, 0, 0)
        async with server.client() as client:
            assert (await client.get(f"/requests/{browser.request_id}/stream")).status_code == 404


async def test_a_later_reader_closes_the_connection_of_the_earlier_one() -> None:
    with mock_server() as server:
        browser = Browser(server, ANSWER)
        first = asyncio.create_task(browser.connect())
        await server.until(lambda: len(browser.ids) > 5)
        later = Browser(server, ANSWER)
        later.request_id = browser.request_id
        await later.connect()
        await first
        assert is_right(later)
        assert not browser.has_all
        assert later.text.startswith(browser.text)
        await server.until_idle()


async def test_a_stopping_server_sends_shutting_down_to_connected_clients_and_drops_the_rest() -> None:
    with mock_server() as server:
        gone, waiting = Browser(server, ENDLESS), Browser(server, ANSWER)
        await gone.connect(num_events=3)
        there = asyncio.create_task(waiting.connect())
        await server.until(lambda: bool(waiting.ids))
        await asyncio.wrap_future(_in_server(server, server.chat_stream.drain(0.0)))
        await there
        assert (waiting.kinds[-1], waiting.events[-1][1]["code"]) == ("error", "shutting_down")
        stats = server.chat_stream.resumables.stats()
        assert (stats.live, stats.ended, stats.bytes) == (0, 0, 0)
        await server.until_idle()


def _in_server(server: Server, coroutine: Any) -> Any:
    assert server.loop is not None
    return asyncio.run_coroutine_threadsafe(coroutine, server.loop)


async def test_an_openai_client_resumes_a_stream_over_another_connection() -> None:
    with mock_server() as server:
        messages: list[Any] = [{"role": "user", "content": ANSWER}]
        http = httpx2.AsyncClient(verify=False)
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="x", max_retries=0, http_client=http) as client:
            seen, last_id = "", ""
            stream = await client.chat.completions.create(
                model="mock-echo", messages=messages, stream=True, extra_body={"resumable": True}
            )
            request_id = stream.response.headers["x-chatstream-request-id"]
            async for event in stream._iter_events():
                last_id = event.id or last_id
                seen += json.loads(event.data)["choices"][0]["delta"].get("content") or ""
                if len(seen) > 50:
                    break
            await stream.close()
            path, headers = f"{server.url}/requests/{request_id}/stream", {"last-event-id": last_id}
            rest = await client.get(
                path,
                cast_to=openai.types.chat.ChatCompletionChunk,
                options={"headers": headers},
                stream=True,
                stream_cls=openai.AsyncStream[openai.types.chat.ChatCompletionChunk],
            )
            async for chunk in rest:
                seen += chunk.choices[0].delta.content or ""
        assert seen == ANSWER
        await server.until_idle()
