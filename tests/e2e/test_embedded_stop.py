"""Shutdown of a host application: under plain uvicorn, and with the server of docs/embed-in-fastapi.md."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn
from fastapi import FastAPI

from chatstream import ChatStream
from tests.e2e.server import Seen, asking
from tests.test_docs import blocks_of

pytestmark = pytest.mark.anyio

PAGE = Path(__file__).parents[2] / "docs/embed-in-fastapi.md"
ANSWER = " ".join(f"w{n}" for n in range(40))


def documented_server(chat_stream: ChatStream) -> type[uvicorn.Server]:
    """The class from the page, for this ChatStream."""
    (block,) = (block for block in blocks_of(PAGE) if "class Server(uvicorn.Server)" in block.text)
    namespace: dict[str, Any] = {"__name__": "docs", "chat_stream": chat_stream}
    exec(compile(block.text, str(block), "exec"), namespace)
    server_class: type[uvicorn.Server] = namespace["Server"]
    return server_class


def embedding() -> tuple[ChatStream, FastAPI]:
    chat_stream = ChatStream(
        use_mock_response=True, mock_params={"type": "echo", "time_per_token_sec": 0.02}, max_concurrency=1
    )
    app = FastAPI(lifespan=chat_stream.lifespan)
    app.include_router(chat_stream.router)
    return chat_stream, app


@asynccontextmanager
async def hosting(server_class: type[uvicorn.Server], app: FastAPI) -> AsyncIterator[tuple[uvicorn.Server, str]]:
    """Run the server; yield it and its URL. The block must set `should_exit`."""
    server = server_class(uvicorn.Config(app, port=0, log_level="critical"))
    serving = asyncio.create_task(server.serve())
    while not server.started:
        assert not serving.done()
        await asyncio.sleep(0)
    port = server.servers[0].sockets[0].getsockname()[1]
    yield server, f"http://127.0.0.1:{port}"
    await serving


async def events_after_a_stop(server_class: type[uvicorn.Server], app: FastAPI) -> tuple[list[Seen], list[Seen]]:
    """Stop the server with one request running and one waiting; return the further events of each."""
    async with (
        hosting(server_class, app) as (server, url),
        httpx2.AsyncClient(base_url=url, timeout=30.0) as first,
        httpx2.AsyncClient(base_url=url, timeout=30.0) as second,
        asking(first, ANSWER) as runs,
    ):
        assert (await anext(runs)).kind == "started"
        async with asking(second, "Hello") as waits:
            assert (await anext(waits)).kind == "queued"
            server.should_exit = True  # as uvicorn does at a signal
            rest_of_waiting = [event async for event in waits]
        return [event async for event in runs], rest_of_waiting


async def test_the_documented_server_ends_waiting_requests_and_finishes_running_ones() -> None:
    chat_stream, app = embedding()
    running, waiting = await events_after_a_stop(documented_server(chat_stream), app)
    assert waiting[-1].kind == "error"
    assert waiting[-1].data["code"] == "shutting_down"
    assert "started" not in {event.kind for event in waiting}
    assert running[-1].kind == "done"
    assert "".join(event.data["text"] for event in running[:-1]) == ANSWER
    assert chat_stream.not_ready_because() == "shutting down"


async def test_under_plain_uvicorn_all_waiting_requests_are_served_first() -> None:
    _, app = embedding()
    running, waiting = await events_after_a_stop(uvicorn.Server, app)
    assert running[-1].kind == "done"
    assert waiting[-1].kind == "done"
