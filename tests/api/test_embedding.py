"""ChatStream inside a host application: prefix, routes, middleware, bodies and callbacks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI, Request
from starlette.applications import Starlette
from starlette.middleware.base import BaseHTTPMiddleware
from starlette.responses import Response
from starlette.routing import Mount, Route

from chatstream import ChatStream
from chatstream.api.app import create_app
from chatstream.errors import ConfigError
from chatstream.testing import FakeEngine
from tests.api.in_process import ANSWER, SSE, Raw, answer_of, ask, open_service, parse_events, script
from tests.e2e.server import serve
from tests.runtime.harness import in_virtual_time

HELLO = {"user_input": "hello"}


async def add_header(request: Request, call_next: Any) -> Any:
    response = await call_next(request)
    response.headers["x-host"] = "yes"
    return response


def under_a_prefix(chat_stream: ChatStream) -> FastAPI:
    app = FastAPI()

    @app.get("/")
    async def own() -> dict[str, str]:
        return {"page": "of the host"}

    app.include_router(chat_stream.router, prefix="/ai")
    app.add_middleware(BaseHTTPMiddleware, dispatch=add_header)
    return app


@pytest.mark.anyio  # a thread serves the page, which virtual time does not wait for
async def test_the_router_works_under_a_prefix_with_routes_and_middleware_of_the_host() -> None:
    async with open_service(app=under_a_prefix, q=0) as service:
        browser = service.browser()
        assert (await browser.get("/")).json() == {"page": "of the host"}
        response = await browser.post("/ai/chat_stream", json=HELLO, headers=SSE)
        assert answer_of(parse_events(response.text)) == ANSWER
        assert response.headers["x-host"] == "yes"
        assert "Path=/;" in response.headers["set-cookie"]
        assert (await browser.get("/ai/health/ready")).status_code == 200
        assert (await browser.get("/ai/v1/models")).json()["data"][0]["id"] == "fake"
        assert "text/html" in (await browser.get("/ai/")).headers["content-type"]
        assert (await browser.get("/ai/queue")).status_code == 200
        await service.occupy()
        assert (await browser.post("/ai/chat_stream", json=HELLO)).status_code == 429
        assert (await browser.get("/chat_stream")).status_code == 404


@in_virtual_time
async def test_a_mounted_application_limits_its_cookie_to_its_path() -> None:
    def mounted(chat_stream: ChatStream) -> Starlette:
        return Starlette(routes=[Mount("/ai", create_app(chat_stream))])

    async with open_service(app=mounted) as service:
        browser = service.browser()
        for turn in (1, 2):
            response = await browser.post("/ai/chat_stream", json=HELLO, headers=SSE)
            assert len(service.prompt_of(response.headers["x-chatstream-request-id"])) == 2 * turn - 1
            assert ("set-cookie" in response.headers) == (turn == 1)
            if turn == 1:
                assert "Path=/ai;" in response.headers["set-cookie"]


@pytest.mark.anyio
async def test_the_hosts_middleware_passes_chunks_and_the_disconnect() -> None:
    chat_stream = ChatStream(engine=FakeEngine(script, step_s=0.001), max_concurrency=1)
    app = under_a_prefix(chat_stream)
    app.router.lifespan_context = chat_stream.lifespan
    with serve(chat_stream, app) as server:
        async with server.client() as client:
            async with client.stream("POST", "/ai/chat_stream", json={"user_input": "hang"}, headers=SSE) as response:
                pieces = response.aiter_text()
                seen = ""
                while "token" not in seen:  # it arrives although the answer never ends
                    seen += await anext(pieces)
                await pieces.aclose()
        await server.until_idle()


def calling(handle: Callable[[ChatStream, Request], Any]) -> Callable[[ChatStream], Starlette]:
    """A host in plain Starlette whose endpoint is `handle`."""

    def app(chat_stream: ChatStream) -> Starlette:
        async def endpoint(request: Request) -> Response:
            response: Response = await handle(chat_stream, request)
            return response

        return Starlette(routes=[Route("/chat_stream", endpoint, methods=["POST"])])

    return app


@pytest.mark.parametrize("body", [b'{"user_input": "hello"}', '{"user_input": "hello"}'])
@in_virtual_time
async def test_a_host_may_pass_the_body(body: bytes | str) -> None:
    async def handle(chat_stream: ChatStream, request: Request) -> Response:
        assert await request.body() == b"what the client sent"
        return await chat_stream.handle_chat_stream_request(request, body)

    async with open_service(app=calling(handle)) as service:
        response = await service.browser().post("/chat_stream", content=b"what the client sent", headers=SSE)
        assert answer_of(parse_events(response.text)) == ANSWER


@in_virtual_time
async def test_a_host_that_passes_the_body_need_not_read_the_clients_body() -> None:
    async def handle(chat_stream: ChatStream, request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request, '{"user_input": "long"}')

    async with open_service(app=calling(handle)) as service:
        async with Raw(service.app, "/chat_stream", b"never read", headers=SSE) as call:
            await call.until(lambda: b"token" in call.body)
        await asyncio.sleep(0.1)
        assert service.num_requests == 0


@in_virtual_time
async def test_a_host_that_has_read_the_body_need_not_pass_it() -> None:
    async def handle(chat_stream: ChatStream, request: Request) -> Response:
        assert (await request.json()) == HELLO
        return await chat_stream.handle_chat_stream_request(request)

    async with open_service(app=calling(handle)) as service:
        assert answer_of(await ask(service.browser(), "hello")) == ANSWER


@pytest.mark.parametrize("body", [b"", "{", "[]", '{"user_input": 5}', '"\ud800"'])
@in_virtual_time
async def test_an_invalid_body_from_the_host_is_a_400(body: bytes | str) -> None:
    async def handle(chat_stream: ChatStream, request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request, body)

    async with open_service(app=calling(handle)) as service:
        response = await service.browser().post("/chat_stream")
        assert (response.status_code, response.json()["code"]) == (400, "invalid_request")


# --- callbacks ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("is_async", [False, True])
@in_virtual_time
async def test_a_callback_is_called_once_with_the_end_of_each_admitted_request(is_async: bool) -> None:
    calls: list[tuple[str, str]] = []

    def callback(request: Request, message: str) -> None:
        calls.append((request.headers["x-name"], message))

    async def callback_later(request: Request, message: str) -> None:
        await asyncio.sleep(0.001)
        callback(request, message)

    async def handle(chat_stream: ChatStream, request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request, callback=callback_later if is_async else callback)

    async with open_service(app=calling(handle), n=1, q=1) as service:

        async def send(name: str, **body: Any) -> int:
            response = await service.browser().post("/chat_stream", json=body, headers=SSE | {"x-name": name})
            return response.status_code

        assert await send("success", user_input="hello") == 200
        assert await send("failed", user_input="fail") == 200
        assert await send("bad", user_input=5) == 400
        name = SSE | {"x-name": "gone-streaming"}
        async with Raw(service.app, "/chat_stream", {"user_input": "long"}, headers=name) as call:
            await call.until(lambda: b"token" in call.body)
            assert await send("expired", user_input="hello", max_wait_seconds=0.2) == 200
            async with Raw(service.app, "/chat_stream", HELLO, headers=SSE | {"x-name": "gone-waiting"}) as waiting:
                await waiting.until(lambda: waiting.body)
                assert await send("refused", user_input="hello") == 429
        await asyncio.sleep(0.1)
        async with Raw(
            service.app, "/chat_stream", {"user_input": "long"}, headers=SSE | {"x-name": "cancelled"}
        ) as call:
            await call.until(lambda: b"token" in call.body)
            service.chat_stream.cancel(call.headers["x-chatstream-request-id"])
            await call.until(lambda: call.is_complete)
        await asyncio.sleep(0.1)
        async with Raw(
            service.app, "/chat_stream", {"user_input": "long"}, headers=SSE | {"x-name": "stopped"}
        ) as call:
            await call.until(lambda: b"token" in call.body)
            await service.chat_stream.stop_queue_worker(0.0)
            await call.until(lambda: call.is_complete)
        await asyncio.sleep(0.1)
    names = [name for name, _ in calls]
    assert sorted(names) == sorted(set(names))  # one call per request
    messages = dict(calls)
    assert messages.pop("failed").startswith("unknown_error_occurred,")
    assert messages == {
        "success": "success",
        "expired": "queue_timeout",
        "gone-waiting": "client_disconnected_before_streaming",
        "gone-streaming": "client_disconnected_while_streaming",
        "cancelled": "cancelled",
        "stopped": "cancelled",
    }


@pytest.mark.parametrize("is_async", [False, True])
@in_virtual_time
async def test_a_callback_that_raises_changes_nothing_and_is_logged(
    is_async: bool, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(request: Request, message: str) -> None:
        raise RuntimeError("a user's bug")

    async def explode_later(request: Request, message: str) -> None:
        explode(request, message)

    async def handle(chat_stream: ChatStream, request: Request) -> Response:
        return await chat_stream.handle_chat_stream_request(request, callback=explode_later if is_async else explode)

    async with open_service(app=calling(handle)) as service:
        for _ in range(2):
            assert answer_of(await ask(service.browser(), "hello")) == ANSWER
    assert caplog.text.count("RuntimeError: a user's bug") == 2


# --- pages of other origins -----------------------------------------------------------------------------------------


@in_virtual_time
async def test_only_allowed_origins_may_call_and_read_the_headers() -> None:
    def with_cors(chat_stream: ChatStream) -> FastAPI:
        return create_app(chat_stream, cors_origins=["https://a.example"])

    async with open_service(app=with_cors, q=0) as service:
        browser = service.browser()
        for origin, is_allowed in (("https://a.example", True), ("https://b.example", False)):
            response = await browser.post("/chat_stream", json=HELLO, headers={"origin": origin})
            assert response.headers.get("access-control-allow-origin") == (origin if is_allowed else None)
        exposed = response.headers["access-control-expose-headers"].lower()
        for name in (
            "x-chatstream-request-id",
            "x-chatstream-last-generated-message-id",
            "retry-after",
            "retry-after-ms",
        ):
            assert name in exposed
        preflight = {"origin": "https://a.example", "access-control-request-method": "DELETE"}
        preflight["access-control-request-headers"] = "authorization, content-type, x-chatstream-conversation"
        response = await browser.options("/requests/x", headers=preflight)
        assert response.status_code == 200
        assert response.headers["access-control-allow-credentials"] == "true"
        await service.occupy()
        refused = await browser.post("/chat_stream", json=HELLO, headers={"origin": "https://a.example"})
        assert refused.status_code == 429
        assert refused.headers["access-control-allow-origin"] == "https://a.example"


@in_virtual_time
async def test_with_all_origins_allowed_every_page_may_call_without_cookies() -> None:
    async with open_service(app=lambda chat_stream: create_app(chat_stream, cors_origins=["*"])) as service:
        response = await service.browser().post("/chat_stream", json=HELLO, headers={"origin": "https://a.example"})
        assert response.headers["access-control-allow-origin"] == "*"
        assert "access-control-allow-credentials" not in response.headers


@in_virtual_time
async def test_without_allowed_origins_no_page_of_another_origin_may_read_a_response() -> None:
    async with open_service() as service:
        response = await service.browser().post("/chat_stream", json=HELLO, headers={"origin": "https://a.example"})
        assert "access-control-allow-origin" not in response.headers


@pytest.mark.parametrize(
    "origin", ["foo", "a.example", "https://a.example/", "https://A.example", "https://", "https://*.a.example", ""]
)
def test_a_value_that_no_browser_sends_as_an_origin_is_refused(origin: str) -> None:
    """It was accepted, and the calls of every page failed without a message of the server."""
    with pytest.raises(ConfigError, match=r"cors_origins must be \* or like"):
        create_app(ChatStream(engine=FakeEngine()), cors_origins=["https://b.example", origin])


@pytest.mark.parametrize(
    "origin",
    ["*", "null", "http://localhost:3000", "http://[::1]:8000", "capacitor://localhost", "file://", "x-app://3A2C"],
)
def test_every_origin_that_a_browser_may_send_is_accepted(origin: str) -> None:
    create_app(ChatStream(engine=FakeEngine()), cors_origins=[origin])


# --- the OpenAPI document -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "/ai"])
def test_the_openapi_document_lists_the_endpoints_with_their_bodies(prefix: str) -> None:
    chat_stream = ChatStream(engine=FakeEngine())
    app = create_app(chat_stream)
    if prefix:
        app = FastAPI()
        app.include_router(chat_stream.router, prefix=prefix)
    document = app.openapi()
    listed = {(method.upper(), path) for path, item in document["paths"].items() for method in item}
    assert listed == {
        (method, prefix + path)
        for method, path in (
            ("POST", "/chat_stream"),
            ("POST", "/clear_context"),
            ("GET", "/get_load"),
            ("GET", "/queue"),
            ("PATCH", "/queue"),
            ("DELETE", "/requests/{request_id}"),
            ("GET", "/requests/{request_id}/stream"),
            ("GET", "/metrics"),
            ("GET", "/health/live"),
            ("GET", "/health/ready"),
            ("POST", "/v1/chat/completions"),
            ("GET", "/v1/models"),
            ("GET", "/v1/models/{model}"),
        )
    }
    assert "$ref" not in str(document["paths"])

    def fields(path: str) -> dict[str, Any]:
        body = document["paths"][prefix + path]["post"]["requestBody"]["content"]["application/json"]["schema"]
        return dict(body["properties"])

    assert {"user_input", "regenerate", "temperature"} <= set(fields("/chat_stream"))
    for method in ("get", "patch"):
        (limit,) = document["paths"][f"{prefix}/queue"][method]["parameters"]
        assert (limit["name"], limit["in"], limit["required"], limit["schema"]["default"]) == (
            "limit",
            "query",
            False,
            1000,
        )
    (request_id,) = document["paths"][f"{prefix}/requests/{{request_id}}"]["delete"]["parameters"]
    assert (request_id["name"], request_id["in"], request_id["required"]) == ("request_id", "path", True)
    message = fields("/v1/chat/completions")["messages"]["items"]
    assert set(message["properties"]["role"]["enum"]) == {"system", "developer", "user", "assistant"}
    assert all(item["description"] for operations in document["paths"].values() for item in operations.values())
