"""Eighteen defects of the queue of ChatStream 0.3, one test for each, named after the defect."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Awaitable, Callable

import httpx2
import pytest
from fastapi import FastAPI, Request
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import JSONResponse, Response
from starlette.testclient import TestClient

from chatstream import ChatRequest, ChatStream, Message, RuntimeSettings, SchedulerSettings
from chatstream.api.app import create_app
from chatstream.engines.base import Engine
from chatstream.errors import ConfigError
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, Fault
from tests.e2e.server import Server, ask, ask_legacy, asking, kinds, serve, text

pytestmark = pytest.mark.anyio

ENDLESS = ["on "] * 1_000_000
SHORT = ["all ", "is ", "well"]


class Pace(FakeEngine):
    """Answers endlessly to a message with "endless", else briefly."""

    def __init__(self, step_s: float = 0.005) -> None:
        super().__init__(lambda r: ENDLESS if "endless" in r.prompt.messages[-1].content else SHORT, step_s=step_s)


def chat_stream_with(engine: Engine | None = None, n: int = 1, q: int = 5, **options: object) -> ChatStream:
    return ChatStream(engine=engine or Pace(), max_concurrency=n, max_queue_size=q, **options)


async def serves_the_next(server: Server) -> None:
    async with server.client() as client:
        assert text(await ask(client, "next")) == "all is well"
    await server.until_idle()


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
@pytest.mark.parametrize("path", ["/chat_stream", "/v1/chat/completions"])
async def test_01_clients_that_disconnected_leaked_their_slots(accept: str, path: str) -> None:
    with serve(chat_stream_with(n=2)) as server:
        for _ in range(6):
            await drop_a_stream(server, path, accept)
        await serves_the_next(server)
        assert server.chat_stream.stats().cancelled == 6


async def drop_a_stream(server: Server, path: str, accept: str) -> None:
    body: dict[str, object] = {"user_input": "endless"}
    if path.startswith("/v1"):
        body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "endless"}]}
    async with server.client() as client:
        async with client.stream("POST", path, json=body, headers={"accept": accept}) as response:
            async for _ in response.aiter_bytes():
                break


@pytest.mark.parametrize("step_s", [0.0, 0.002])
async def test_02_a_disconnect_that_landed_while_sending_leaked_the_slot(step_s: float) -> None:
    with serve(chat_stream_with(Pace(step_s), n=2)) as server:
        for _ in range(20):
            await drop_a_stream(server, "/chat_stream", "text/event-stream")
        await serves_the_next(server)


async def test_03_a_handler_cancelled_by_its_host_ended_the_server() -> None:
    class SlowToPrepare(Pace):
        async def prepare(self, prompt, sampling, *, may_drop_history=False):  # type: ignore[no-untyped-def]
            if "slow" in prompt[-1].content:
                await asyncio.sleep(3600)
            return await super().prepare(prompt, sampling)

    chat_stream = chat_stream_with(SlowToPrepare())
    app = FastAPI(lifespan=chat_stream.lifespan)

    @app.post("/chat_stream")
    async def impatient(request: Request) -> Response:
        try:
            return await asyncio.wait_for(chat_stream.handle_chat_stream_request(request), timeout=0.05)
        except TimeoutError:
            return JSONResponse({"error": "too slow for us"}, 504)

    with serve(chat_stream, app) as server:
        async with server.client() as client:
            response = await client.post("/chat_stream", json={"user_input": "slow"})
            assert response.status_code == 504
        await serves_the_next(server)


async def test_03b_a_response_discarded_by_its_host_frees_the_slot() -> None:
    chat_stream = chat_stream_with()
    app = FastAPI(lifespan=chat_stream.lifespan)

    @app.post("/thrown_away")
    async def careless(request: Request) -> Response:
        await chat_stream.handle_chat_stream_request(request)
        return JSONResponse({})

    @app.post("/chat_stream")
    async def careful(request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request)

    with serve(chat_stream, app) as server:
        async with server.client() as client:
            await client.post("/thrown_away", json={"user_input": "x"})
        await serves_the_next(server)


def calling(chat_stream: ChatStream, callback: Callable[[Request, str], object]) -> FastAPI:
    app = FastAPI(lifespan=chat_stream.lifespan)

    @app.post("/chat_stream")
    async def stream_api(request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request, callback=callback)

    return app


async def test_04_a_callback_that_raised_freed_its_slot_twice_or_ended_the_worker() -> None:
    called: list[str] = []

    def explode(request: Request, message: str) -> None:
        called.append(message)
        raise RuntimeError("a user's bug")

    async def explode_later(request: Request, message: str) -> None:
        explode(request, message)

    for callback in (explode, explode_later):
        called.clear()
        chat_stream = chat_stream_with()
        with serve(chat_stream, calling(chat_stream, callback)) as server:
            for _ in range(3):
                await serves_the_next(server)
            assert server.history.peak_running == 1
            await server.until(lambda: called == ["success"] * 3)


async def test_05_an_error_in_the_engine_ended_the_worker() -> None:
    engine = FakeEngine(
        lambda r: ["x", RuntimeError("boom")] if "bad" in r.prompt.messages[-1].content else SHORT, step_s=0.001
    )
    with serve(chat_stream_with(engine)) as server:
        async with server.client() as client:
            for _ in range(3):
                events = await ask(client, "bad")
                assert kinds(events) == ["started", "token", "error"]
                assert events[-1].data["code"] == "engine_error"
        await serves_the_next(server)


async def test_05b_a_request_before_the_start_hung() -> None:
    chat_stream = chat_stream_with(max_wait_s=0.1)
    app = FastAPI()

    @app.post("/chat_stream")
    async def stream_api(request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request)

    with serve(chat_stream, app) as server:
        async with server.client() as client:
            events = await ask(client, "x")
        assert kinds(events) == ["queued", "error"]
        assert events[-1].data["code"] == "queue_timeout"


async def test_06_a_client_that_sent_no_body_blocked_the_server() -> None:
    with serve(chat_stream_with()) as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as silent:
            silent.sendall(b"POST /chat_stream HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n")
            await serves_the_next(server)


async def test_07_waiting_clients_that_disconnected_kept_their_positions() -> None:
    engine = Pace()
    with serve(chat_stream_with(engine, q=3)) as server:
        async with server.client() as client, asking(client, "endless"):
            for _ in range(4):
                await leave_while_waiting(server)
            assert len(engine.prompts) == 1  # none of them reached the engine
            async with server.client() as live, asking(live, "x") as events:
                assert (await anext(events)).data["position"] == 1


async def leave_while_waiting(server: Server) -> None:
    async with server.client() as client, asking(client, "x") as events:
        assert (await anext(events)).kind == "queued"
    await server.until(lambda: server.waiting == 0)


@pytest.mark.parametrize(("q", "accepted"), [(0, 1), (1, 2)])
async def test_08_a_queue_size_of_one_or_zero_was_unbounded(q: int, accepted: int) -> None:
    assert await accepted_of(10, chat_stream_with(q=q)) == accepted


async def test_09_a_burst_filled_only_five_of_seven_slots_and_positions() -> None:
    assert await accepted_of(10, chat_stream_with(n=2, q=5)) == 7


async def accepted_of(count: int, chat_stream: ChatStream) -> int:
    """The number of requests admitted in a burst of which none ends."""
    with serve(chat_stream) as server:
        async with server.client() as client:
            requests = [
                client.send(client.build_request("POST", "/chat_stream", json={"user_input": "endless"}), stream=True)
                for _ in range(count)
            ]
            for _request in requests:  # sessions: each is its own conversation
                client.cookies.clear()
            responses = await asyncio.gather(*requests)
            statuses = [response.status_code for response in responses]
            assert set(statuses) <= {200, 429}
            await asyncio.gather(*(response.aclose() for response in responses))
        await server.until_idle()
    return statuses.count(200)


async def test_10_get_load_overstated_the_queue_limit() -> None:
    with serve(chat_stream_with(n=2, q=5)) as server:
        async with server.client() as client, asking(client, "endless"):
            worker = (await client.get("/get_load")).json()["chatstream_workers"][0]
    assert (worker["processing"], worker["max_processing"], worker["waiting"], worker["max_waiting"]) == (1, 2, 0, 5)


@pytest.mark.parametrize("wrong", [0, -1, 1.5, "2"])
def test_11_a_limit_of_zero_was_accepted_and_nothing_ever_ran(wrong: object) -> None:
    with pytest.raises(ConfigError, match="max_concurrency"):
        ChatStream(use_mock_response=True, num_of_concurrent_executions=wrong)  # type: ignore[arg-type]


async def test_12_a_client_that_disconnected_while_waiting_was_reported_as_an_unknown_error() -> None:
    messages: list[str] = []
    chat_stream = chat_stream_with()
    with serve(chat_stream, calling(chat_stream, lambda _, message: messages.append(message))) as server:
        async with server.client() as client, asking(client, "endless"):
            await leave_while_waiting(server)
        await server.until_idle()
    assert messages == ["client_disconnected_before_streaming", "client_disconnected_while_streaming"]


async def test_13_two_requests_of_one_session_mixed_their_answers() -> None:
    engine = FakeEngine(lambda r: [f"re {r.prompt.messages[-1].content}"], step_s=0.05)
    with serve(chat_stream_with(engine, n=2)) as server:
        async with server.client() as client:
            await ask(client, "zero")  # gives the session its cookie
            one, two = await asyncio.gather(ask(client, "one"), ask(client, "two"))
            assert sorted([text(one), text(two)]) == ["re one", "re two"]
            await ask(client, "three")
        prompt = [m.content for m in engine.prompts[started_last(server)].messages]
    assert prompt in (
        ["zero", "re zero", "one", "re one", "two", "re two", "three"],
        ["zero", "re zero", "two", "re two", "one", "re one", "three"],
    )


def started_last(server: Server) -> str:
    return [event.request_id for event in server.log if isinstance(event, ev.Started)][-1]


def test_14_the_library_took_over_the_signals_and_could_not_run_in_a_thread() -> None:
    before = [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)]
    with TestClient(create_app(chat_stream_with())) as client:  # its loop runs in another thread
        response = client.post("/chat_stream", json={"user_input": "x"})
        assert response.text.endswith("all is well<::EOS::>")
    assert [signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)] == before


async def test_15_waiting_was_silent_endless_and_without_a_position() -> None:
    chat_stream = chat_stream_with(max_wait_s=0.4, runtime=RuntimeSettings(keepalive_s=0.1))
    with serve(chat_stream) as server:
        async with server.client() as client, asking(client, "endless"):
            headers = {"accept": "text/event-stream"}
            async with server.client() as other:
                response = await other.post("/chat_stream", json={"user_input": "x"}, headers=headers)
    assert response.text.count(": keep-alive") >= 2
    assert '"position":1' in response.text
    assert '"code":"queue_timeout"' in response.text


async def test_16_a_refusal_was_a_200() -> None:
    with serve(chat_stream_with(q=0)) as server:
        async with server.client() as client, asking(client, "endless"):
            async with server.client() as other:
                response = await other.post("/chat_stream", json={"user_input": "x"})
    assert response.status_code == 429
    assert response.json()["error"] == "too_many_requests"
    assert 1 <= int(response.headers["retry-after"]) <= 120


def test_17_an_object_created_outside_an_event_loop_failed_inside() -> None:
    chat_stream = ChatStream(use_mock_response=True, mock_params={"type": "echo", "time_per_token_sec": 0})

    async def once() -> str:
        async with chat_stream:
            return "".join([e.text async for e in chat_stream.stream("hello you") if e.type == "token"])

    assert [asyncio.run(once()) for _ in range(2)] == ["hello you"] * 2


def test_18_several_workers_were_recommended_although_each_has_its_own_queue(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("WEB_CONCURRENCY", "4")

    async def start() -> None:
        async with chat_stream_with():
            pass

    asyncio.run(start())
    assert "each worker process has a queue of its own" in caplog.text


# --- related defects, found later -----------------------------------------------------------------------------------


async def test_a_disconnect_is_detected_under_the_hosts_base_http_middleware() -> None:
    chat_stream = chat_stream_with(n=1, q=1)
    app = create_app(chat_stream)

    async def pass_on(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        return await call_next(request)

    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    with serve(chat_stream, app) as server:
        async with server.client() as client, asking(client, "endless"):
            await leave_while_waiting(server)
        await server.until(lambda: server.running == 0)
        body = {"model": "fake", "messages": [{"role": "user", "content": "endless"}]}
        async with server.client() as client:  # without streaming
            asking_whole = asyncio.create_task(client.post("/v1/chat/completions", json=body))
            await server.until(lambda: server.running == 1)
            asking_whole.cancel()
            await asyncio.gather(asking_whole, return_exceptions=True)
        await serves_the_next(server)


async def test_a_client_that_stops_reading_is_disconnected_and_the_next_request_starts() -> None:
    words = "0123456789" * 500
    engine = FakeEngine(lambda r: [words] * 10_000 if "endless" in r.prompt.messages[-1].content else SHORT)
    chat_stream = chat_stream_with(engine, runtime=RuntimeSettings(reader_stall_timeout_s=0.3))
    messages: list[str] = []
    with serve(chat_stream, calling(chat_stream, lambda _, message: messages.append(message))) as server:
        async with server.client() as client, asking(client, "endless") as events:
            await anext(events)
            await serves_the_next(server)
    assert messages == ["client_disconnected_while_streaming", "success"]


async def test_a_waiting_client_with_full_buffers_is_disconnected() -> None:
    """Over plain ASGI, where the client's buffers can be full from the first byte."""
    chat_stream = chat_stream_with(runtime=RuntimeSettings(reader_stall_timeout_s=0.05, keepalive_s=0.05))
    app = create_app(chat_stream)
    async with chat_stream:
        running = await chat_stream.submit(_request("endless"))
        sent: list[dict[str, object]] = []

        async def receive() -> dict[str, object]:
            if not sent:
                return {"type": "http.request", "body": b'{"user_input": "x"}', "more_body": False}
            await asyncio.sleep(3600)
            raise AssertionError

        async def send(message: dict[str, object]) -> None:
            sent.append(message)
            if message["type"] == "http.response.body":
                await asyncio.sleep(3600)

        scope = {
            "type": "http", "method": "POST", "path": "/chat_stream", "raw_path": b"/chat_stream", "root_path": "",
            "query_string": b"", "headers": [(b"accept", b"text/event-stream")], "http_version": "1.1",
            "scheme": "http", "server": ("x", 80), "client": ("127.0.0.1", 1), "asgi": {"version": "3.0"},
        }  # fmt: skip
        await app(scope, receive, send)  # type: ignore[arg-type]
        assert chat_stream.stats().waiting == 0
        assert chat_stream.stats().cancelled == 1
        running.close()


def _request(words: str) -> ChatRequest:
    return ChatRequest(messages=(Message("user", words),))


async def test_the_watchdog_reclaims_the_slot_of_an_engine_that_hangs() -> None:
    engine = FakeEngine(lambda r: ["x", Fault.HANG] if "bad" in r.prompt.messages[-1].content else SHORT, step_s=0.001)
    with serve(chat_stream_with(engine, scheduler=SchedulerSettings(stall_timeout_s=0.3))) as server:
        async with server.client() as client:
            assert kinds(await ask(client, "bad")) == ["started", "token", "error"]
        await serves_the_next(server)


async def test_a_partial_answer_that_fails_has_no_end_in_the_0_3_format() -> None:
    engine = FakeEngine(["half an ", RuntimeError("boom")], step_s=0.001)
    with serve(chat_stream_with(engine)) as server:
        async with server.client() as client:
            with pytest.raises(httpx2.RemoteProtocolError):
                await ask_legacy(client, "x")
