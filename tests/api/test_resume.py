"""`"resumable": true` and `GET /requests/{request_id}/stream`, as a client sees them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from chatstream import AccessSettings, ChatStream, RuntimeSettings
from chatstream.api.app import create_app
from chatstream.api.streaming import MAX_CHUNK_BYTES
from chatstream.testing import FakeEngine
from tests.api.in_process import ANSWER, SSE, Event, Raw, Service, answer_of, kinds, open_service, parse_events
from tests.runtime.harness import in_virtual_time

HELLO = {"user_input": "hello", "resumable": True}
LONG = {"user_input": "long", "resumable": True}
HANG = {"user_input": "hang", "resumable": True}
COMPLETIONS = "/v1/chat/completions"
GRACE_S = 30.0


def completion(text: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": text}]
    return {"model": "fake", "messages": messages, "stream": True, "resumable": True, **more}


def stream_of(request_id: str) -> str:
    return f"/requests/{request_id}/stream"


def after(event_id: str) -> dict[str, str]:
    return {"last-event-id": event_id}


def start(service: Service, body: dict[str, Any], path: str = "/chat_stream", **headers: str) -> Raw:
    return Raw(service.app, path, body, headers={**SSE, **headers})


def resume(service: Service, request_id: str, last_id: str | None = None, **headers: str) -> Raw:
    if last_id is not None:
        headers |= after(last_id)
    return Raw(service.app, stream_of(request_id), method="GET", headers=headers)


def request_id_of(call: Raw) -> str:
    return call.headers["x-chatstream-request-id"]


async def cut(
    service: Service, body: dict[str, Any], num_events: int, path: str = "/chat_stream"
) -> tuple[str, list[Event]]:
    """Send a request, break its connection after `num_events` events, and return the request id and these events."""
    async with start(service, body, path) as call:
        await call.until(lambda: call.body.count(b"\nid: ") >= num_events)
        events = events_in(call)[:num_events]
        return request_id_of(call), events


def events_in(call: Raw) -> list[Event]:
    """Parse events and chunks; "[DONE]" becomes a string."""
    return parse_events(call.body.replace(b"data: [DONE]", b'data: "[DONE]"'))


async def rest(service: Service, request_id: str, last_id: str | None = None, **headers: str) -> list[Event]:
    async with resume(service, request_id, last_id, **headers) as call:
        await call.until(lambda: call.is_complete)
        assert call.status == 200
        return events_in(call)


# --- continuing -----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_stream_continues_after_the_last_received_event() -> None:
    async with open_service() as service:
        request_id, before = await cut(service, LONG, 4)
        await asyncio.sleep(0.3)
        following = await rest(service, request_id, before[-1].id)
    events = before + following
    assert [event.id for event in events] == [str(n) for n in range(1, 13)]
    assert kinds(events) == ["started"] + ["token"] * 10 + ["done"]
    assert answer_of(events) == "on " * 10


@pytest.mark.parametrize("last_id", [None, "", "0"])
@in_virtual_time
async def test_without_a_last_id_a_stream_starts_at_its_first_event(last_id: str | None) -> None:
    async with open_service() as service:
        request_id, before = await cut(service, LONG, 4)
        events = await rest(service, request_id, last_id)
    assert events[:4] == before
    assert answer_of(events) == "on " * 10


@in_virtual_time
async def test_a_position_is_kept_and_only_its_last_state_is_sent() -> None:
    async with open_service() as service:
        _, *others = await service.occupy(4)
        request_id, (queued,) = await cut(service, HELLO, 1)
        assert queued.data["position"] == 4
        for stream in others:
            await asyncio.sleep(2.0)
            stream.close()
        await asyncio.sleep(2.0)
        assert service.num_requests == 2
        async with resume(service, request_id, queued.id) as call:
            await call.until(lambda: call.body)
            (event,) = parse_events(call.body)
            assert (event.id, event.kind, event.data["position"]) == ("2", "queued", 1)


@in_virtual_time
async def test_a_request_that_waits_without_a_connection_is_answered() -> None:
    async with open_service() as service:
        (running,) = await service.occupy(1)
        request_id, before = await cut(service, HELLO, 1)
        running.close()
        await asyncio.sleep(5.0)
        assert service.num_requests == 0
        events = before + await rest(service, request_id, before[-1].id)
    assert kinds(events) == ["queued", "started", "token", "token", "token", "done"]
    assert [event.id for event in events] == ["1", "2", "3", "4", "5", "6"]
    assert answer_of(events) == ANSWER


@in_virtual_time
async def test_a_later_response_has_the_headers_of_the_first_one() -> None:
    async with open_service() as service:
        browser = service.browser()
        first = await browser.post("/chat_stream", json=HELLO, headers=SSE)
        path = stream_of(first.headers["x-chatstream-request-id"])
        again = await browser.get(path)
        head = await browser.head(path)
    for name in (
        "x-chatstream-request-id",
        "x-chatstream-last-generated-message-id",
        "content-type",
        "cache-control",
        "x-accel-buffering",
    ):
        assert again.headers[name] == first.headers[name]
    assert again.content == first.content
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == first.headers["content-type"]


@in_virtual_time
async def test_a_resumed_silent_stream_is_kept_alive() -> None:
    async with open_service(runtime=RuntimeSettings(keepalive_s=5.0)) as service:
        await service.occupy()
        request_id, _ = await cut(service, HELLO, 1)
        async with resume(service, request_id, "1") as call:
            await asyncio.sleep(11.0)
            assert call.body == b": keep-alive\n\n" * 2


@in_virtual_time
async def test_a_long_answer_is_sent_again_in_chunks_without_blocking_the_event_loop() -> None:
    async with open_service(FakeEngine(["word "] * 10_000)) as service:
        response = await service.browser().post("/chat_stream", json=HELLO, headers=SSE)
        num_ticks = 0

        async def count_ticks() -> None:
            nonlocal num_ticks
            while True:
                num_ticks += 1
                await asyncio.sleep(0)

        counting = asyncio.create_task(count_ticks())
        async with resume(service, response.headers["x-chatstream-request-id"]) as call:
            await call.task
            assert call.body == response.content
            pieces = [len(message["body"]) for message in call.sent[1:]]
            assert max(pieces) < MAX_CHUNK_BYTES + 100
            assert num_ticks >= len(pieces) > 5
        counting.cancel()


@in_virtual_time
async def test_a_client_with_all_events_gets_204() -> None:
    """After a 204 an `EventSource` does not reconnect (HTML standard, 9.2.3)."""
    async with open_service() as service:
        browser = service.browser()
        response = await browser.post("/chat_stream", json=HELLO, headers=SSE)
        path = stream_of(response.headers["x-chatstream-request-id"])
        last_id = parse_events(response.text)[-1].id
        again = await browser.get(path, headers=after(last_id))
        assert (again.status_code, again.content) == (204, b"")


# --- in the OpenAI format -------------------------------------------------------------------------------------------


@in_virtual_time
async def test_chunks_continue_as_chunks_from_any_point() -> None:
    """Also between the last chunks, which belong to one event."""
    options = {"stream_options": {"include_usage": True}}
    async with open_service() as service:
        _, whole = await cut(service, completion("hello", **options), 7, COMPLETIONS)
        assert [event.id for event in whole] == ["1", "2", "3", "4", "5.1", "5.2", "5"]
        for num_seen in range(1, len(whole)):
            request_id, before = await cut(service, completion("hello", **options), num_seen, COMPLETIONS)
            events = before + await rest(service, request_id, before[-1].id)
            assert [event.id for event in events] == [event.id for event in whole]
            chunks = [event.data for event in events[:-1]]
            assert len({(chunk["id"], chunk["created"]) for chunk in chunks}) == 1
            assert [chunk["choices"] for chunk in chunks] == [event.data["choices"] for event in whole[:-1]]
            assert "".join(c["choices"][0]["delta"].get("content", "") for c in chunks if c["choices"]) == ANSWER
            assert chunks[-1]["usage"]["completion_tokens"] == 3
            assert events[-1].data == "[DONE]"


@in_virtual_time
async def test_a_resumed_waiting_openai_stream_has_its_position_in_the_requested_form() -> None:
    async with open_service() as service:
        await service.occupy()
        for headers in ({}, {"x-chatstream-queue-events": "1"}):
            async with start(service, completion("hello"), COMPLETIONS, **headers) as call:
                await call.until(lambda call=call: call.body)  # type: ignore[misc]
                first = call.body
                request_id = request_id_of(call)
            async with resume(service, request_id) as call:
                await call.until(lambda call=call: call.body)  # type: ignore[misc]
                assert call.body == first
            assert (b"event: queued" in first) == bool(headers)
            await service.browser().delete(f"/requests/{request_id}")


@in_virtual_time
async def test_a_whole_answer_cannot_be_resumed() -> None:
    async with open_service() as service:
        response = await service.browser().post(COMPLETIONS, json=completion("hello", stream=False))
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"]) == ("unsupported_parameter", "resumable")
        assert "stream" in error["message"]
        assert service.chat_stream.stats().received == 0


@in_virtual_time
async def test_a_stream_that_is_not_resumable_has_chunks_without_ids() -> None:
    async with open_service() as service:
        response = await service.browser().post(COMPLETIONS, json=completion("hello", resumable=False))
        assert "id: " not in response.text.replace('"id"', "")


# --- two readers ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_later_reader_takes_over_and_the_stream_of_the_earlier_one_closes() -> None:
    async with open_service() as service, start(service, LONG) as first:
        await first.until(lambda: first.body.count(b"\nid: ") == 4)
        async with resume(service, request_id_of(first), "2") as second:
            await first.until(lambda: first.is_complete)
            await second.until(lambda: second.is_complete)
            assert kinds(events_in(first)) == ["started"] + ["token"] * 3
            assert [event.id for event in events_in(second)] == [str(n) for n in range(3, 13)]


@in_virtual_time
async def test_the_earlier_connection_of_an_openai_stream_is_broken_not_ended() -> None:
    async with open_service() as service, start(service, completion("long"), COMPLETIONS) as first:
        await first.until(lambda: first.body.count(b"\nid: ") == 4)
        async with resume(service, request_id_of(first)) as second:
            await first.until(first.task.done)
            assert not first.is_complete
            assert b"[DONE]" not in first.body
            await second.until(lambda: second.is_complete)


@in_virtual_time
async def test_a_head_request_or_a_wrong_id_does_not_replace_the_reader() -> None:
    async with open_service() as service, start(service, LONG) as first:
        await first.until(lambda: first.body)
        path = stream_of(request_id_of(first))
        assert (await service.browser().head(path)).status_code == 200
        assert (await service.browser().get(path, headers=after("99"))).status_code == 400
        await first.until(lambda: first.is_complete)
        assert kinds(events_in(first))[-1] == "done"


# --- the grace time -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("body", [HANG, HELLO])
@in_virtual_time
async def test_after_the_grace_time_a_request_is_cancelled_and_unknown(body: dict[str, Any]) -> None:
    async with open_service() as service:
        request_id, _ = await cut(service, body, 2)
        await asyncio.sleep(GRACE_S - 1.0)
        async with resume(service, request_id) as call:
            await call.until(lambda: call.body)
            assert call.status == 200
        await asyncio.sleep(GRACE_S + 1.0)
        assert service.num_requests == 0
        assert not service.engine.active
        assert (await service.browser().get(stream_of(request_id))).status_code == 404


@in_virtual_time
async def test_without_the_flag_a_lost_connection_frees_everything_at_once() -> None:
    async with open_service() as service:
        request_id, _ = await cut(service, {"user_input": "hang"}, 2)
        await asyncio.sleep(0.01)
        assert service.num_requests == 0
        assert (await service.browser().get(stream_of(request_id))).status_code == 404


@in_virtual_time
async def test_a_request_without_a_connection_can_be_cancelled_by_its_id() -> None:
    async with open_service() as service:
        request_id, before = await cut(service, HANG, 2)
        browser = service.browser()
        assert (await browser.delete(f"/requests/{request_id}")).status_code == 204
        await asyncio.sleep(0.01)
        assert service.num_requests == 0
        (error,) = await rest(service, request_id, before[-1].id)
        assert (error.kind, error.data["code"]) == ("error", "cancelled")
        assert (await browser.delete(f"/requests/{request_id}")).status_code == 204


@in_virtual_time
async def test_a_slow_reader_is_disconnected_but_its_request_continues() -> None:
    class Slow(Raw):
        async def _send(self, message: Any) -> None:
            if b"\nid: 3" in message.get("body", b""):
                await asyncio.sleep(1000.0)
            self.sent.append(message)

    async with open_service() as service, Slow(service.app, "/chat_stream", LONG, headers=SSE) as call:
        await call.until(call.task.done)
        assert not call.is_complete
        assert service.chat_stream.stats().finished == 1
        assert answer_of(await rest(service, request_id_of(call))) == "on " * 10


@in_virtual_time
async def test_a_request_that_is_refused_or_fails_before_its_headers_is_not_kept() -> None:
    async with open_service(q=0) as service:
        await service.occupy()
        assert (await service.browser().post("/chat_stream", json=HELLO, headers=SSE)).status_code == 429
        assert service.chat_stream.resumables.stats().live == 0


# --- owner ----------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_unknown_or_not_resumable_id_is_not_found() -> None:
    async with open_service() as service:
        browser = service.browser()
        response = await browser.post("/chat_stream", json={"user_input": "hello"}, headers=SSE)
        for request_id in ("0" * 32, response.headers["x-chatstream-request-id"]):
            refusal = await browser.get(stream_of(request_id))
            assert (refusal.status_code, refusal.json()["code"]) == (404, "not_found")


@in_virtual_time
async def test_on_a_server_with_keys_only_the_same_key_resumes_a_stream() -> None:
    access = AccessSettings(api_keys=("one", "two"), admin_key="admin")
    async with open_service(access=access) as service:
        async with start(service, HELLO, authorization="Bearer one") as call:
            await call.until(lambda: call.body)
            request_id = request_id_of(call)
        for headers, status in (({}, 401), (bearer("x"), 401), (bearer("two"), 404), (bearer("admin"), 404)):
            response = await service.browser().get(stream_of(request_id), headers=headers)
            assert response.status_code == status
        assert answer_of(await rest(service, request_id, **bearer("one"))) == ANSWER


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


@in_virtual_time
async def test_resuming_needs_no_cookie_and_keeps_the_conversation() -> None:
    async with open_service() as service:
        browser = service.browser()
        first = await browser.post("/chat_stream", json=HELLO, headers=SSE)
        again = await service.browser().get(stream_of(first.headers["x-chatstream-request-id"]))
        assert answer_of(parse_events(again.text)) == ANSWER
        second = await browser.post("/chat_stream", json=HELLO, headers=SSE)
        assert len(service.prompt_of(second.headers["x-chatstream-request-id"])) == 3


# --- refusals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrong", ["x", "-1", "1.5", "3.1", "٣", "1 2", "007", "99", "9" * 400])
@in_virtual_time
async def test_a_last_id_of_another_stream_is_refused_by_name(wrong: str) -> None:
    async with open_service() as service:
        browser = service.browser()
        response = await browser.post("/chat_stream", json=HELLO, headers=SSE)
        path = stream_of(response.headers["x-chatstream-request-id"])
        refusal = await browser.get(path, headers={"last-event-id": wrong.encode()})  # type: ignore[dict-item]
        assert (refusal.status_code, refusal.json()["code"], refusal.json()["param"]) == (
            400,
            "invalid_request",
            "Last-Event-ID",
        )
        assert "Last-Event-ID" in refusal.json()["message"]
        assert len(refusal.json()["message"]) < 200


@pytest.mark.parametrize("wrong", ["0.1", "9.1", "1.3", "1.0", "1.", ".1"])
@in_virtual_time
async def test_a_part_of_an_event_without_parts_is_refused_by_name(wrong: str) -> None:
    async with open_service() as service:
        browser = service.browser()
        response = await browser.post(COMPLETIONS, json=completion("hello"))
        refusal = await browser.get(stream_of(response.headers["x-chatstream-request-id"]), headers=after(wrong))
        assert (refusal.status_code, refusal.json()["param"]) == (400, "Last-Event-ID")


@in_virtual_time
async def test_events_that_are_no_longer_kept_are_refused_with_the_first_kept_id() -> None:
    async with open_service(runtime=RuntimeSettings(max_resume_bytes_per_request=500)) as service:
        browser = service.browser()
        response = await browser.post("/chat_stream", json=LONG, headers=SSE)
        path = stream_of(response.headers["x-chatstream-request-id"])
        refusal = await browser.get(path)
        assert (refusal.status_code, refusal.json()["param"]) == (400, "Last-Event-ID")
        last_id = refusal.json()["message"].split(" or later")[0].split()[-1]
        following = parse_events((await browser.get(path, headers=after(last_id))).text)
        assert [int(event.id) for event in following] == list(range(int(last_id) + 1, 13))


@in_virtual_time
async def test_the_0_3_format_has_no_ids_and_is_refused() -> None:
    async with open_service() as service:
        response = await service.browser().post("/chat_stream", json=HELLO)
        assert (response.status_code, response.json()["code"]) == (400, "unsupported_parameter")
        assert response.json()["param"] == "resumable"
        assert "text/event-stream" in response.json()["message"]
        assert service.chat_stream.stats().received == 0


@pytest.mark.parametrize("path", ["/chat_stream", COMPLETIONS])
@in_virtual_time
async def test_with_a_grace_time_of_0_resumable_is_refused_by_name(path: str) -> None:
    async with open_service(runtime=RuntimeSettings(resume_grace_s=0.0)) as service:
        body = HELLO if path == "/chat_stream" else completion("hello")
        response = await service.browser().post(path, json=body, headers=SSE)
        assert response.status_code == 400
        assert '"unsupported_parameter"' in response.text
        assert '"resumable"' in response.text
        plain = await service.browser().post(path, json={**body, "resumable": False}, headers=SSE)
        assert plain.status_code == 200


@in_virtual_time
async def test_a_page_of_another_origin_may_send_last_event_id() -> None:
    """`Last-Event-ID` is not a CORS-safelisted request header (Fetch standard)."""
    async with open_service(
        app=lambda chat_stream: create_app(chat_stream, cors_origins=["https://a.example"])
    ) as service:
        asked = {
            "origin": "https://a.example",
            "access-control-request-method": "GET",
            "access-control-request-headers": "last-event-id",
        }
        response = await service.browser().options(stream_of("0" * 32), headers=asked)
        assert response.status_code == 200
        assert "last-event-id" in response.headers["access-control-allow-headers"].lower()
        assert "GET" in response.headers["access-control-allow-methods"]


# --- in a host application ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("user_input", "comes_back", "word"),
    [
        ("hello", True, "success"),
        ("hello", False, "success"),
        ("hang", False, "client_disconnected_while_streaming"),
        ("wait", False, "client_disconnected_before_streaming"),
        ("hang", True, "client_disconnected_while_streaming"),
    ],
)
@in_virtual_time
async def test_the_callback_gets_the_end_of_the_request_not_the_broken_connection(
    user_input: str, comes_back: bool, word: str
) -> None:
    heard: list[str] = []

    def hosting(callback: Callable[[Request, str], object]) -> Callable[[ChatStream], ASGIApp]:
        def app(chat_stream: ChatStream) -> ASGIApp:
            application = create_app(chat_stream)

            @application.post("/mine")
            async def mine(request: Request) -> Response:
                return await chat_stream.handle_chat_stream_request(request, callback=callback)

            return application

        return app

    async with open_service(app=hosting(lambda request, message: heard.append(message))) as service:
        if user_input == "wait":
            await service.occupy()
        request_id, before = await cut(service, {"user_input": user_input, "resumable": True}, 1, "/mine")
        assert heard == []
        await asyncio.sleep(1.0)
        if comes_back:
            async with resume(service, request_id, before[-1].id) as call:
                await call.until(lambda: call.body)
        await asyncio.sleep(2 * GRACE_S)
        assert heard == [word]


@in_virtual_time
async def test_an_event_source_reads_the_whole_answer_over_many_connections() -> None:
    """`EventSource` requests the same URL after every break, with the last event id."""
    async with open_service() as service:
        request_id, events = await cut(service, LONG, 1)
        while True:
            async with resume(service, request_id, events[-1].id) as call:
                await call.until(lambda call=call: call.body or call.task.done())  # type: ignore[misc]
                if call.status == 204:
                    break
                events += events_in(call)
        assert [event.id for event in events] == [str(n) for n in range(1, 13)]
        assert answer_of(events) == "on " * 10
