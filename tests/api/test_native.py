"""The native endpoints, as a client sees them."""

from __future__ import annotations

import asyncio
import json
import threading
import uuid
from itertools import pairwise

import httpx2
import pytest
from starlette.middleware.base import BaseHTTPMiddleware

from chatstream import AccessSettings, ChatStream, RuntimeSettings, SessionSettings
from chatstream.api.app import create_app
from chatstream.api.bodies import parse_body
from chatstream.api.native import ChatBody
from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel
from chatstream.errors import InvalidRequest
from chatstream.testing import FakeEngine
from tests.api.in_process import ANSWER, SSE, Raw, answer_of, ask, kinds, open_service, parse_events, script
from tests.e2e.server import serve
from tests.engines.batching.scripted import CharCodec, ScriptedRunner, until
from tests.runtime.harness import in_virtual_time

HELLO = {"user_input": "hello"}


# --- the stream of events -------------------------------------------------------------------------------------------


@in_virtual_time
async def test_an_answer_is_one_started_event_tokens_and_done() -> None:
    async with open_service() as service:
        response = await service.browser().post("/chat_stream", json=HELLO, headers=SSE)
        events = parse_events(response.text)
        request_id = response.headers["x-chatstream-request-id"]
        message_id = response.headers["x-chatstream-last-generated-message-id"]
    assert kinds(events) == ["started", "token", "token", "token", "done"]
    assert events[0].data == {"request_id": request_id, "waited_seconds": 0.0}
    assert [event.data for event in events[1:4]] == [{"text": "re hello"}, {"text": " and"}, {"text": " more"}]
    assert events[-1].data == {
        "request_id": request_id,
        "message_id": message_id,
        "finish_reason": "stop",
        "usage": {"prompt_tokens": 1, "completion_tokens": 3},
    }
    assert [event.id for event in events] == ["1", "2", "3", "4", "5"]


@pytest.mark.parametrize("accept", ["text/event-stream", "*/*"])
@in_virtual_time
async def test_the_headers_of_an_admitted_request(accept: str) -> None:
    async with open_service() as service:
        headers = (await service.browser().post("/chat_stream", json=HELLO, headers={"accept": accept})).headers
    assert headers["x-accel-buffering"] == "no"
    assert headers["cache-control"] == "no-store"
    assert len(bytes.fromhex(headers["x-chatstream-request-id"])) == 16  # 128 random bits
    assert uuid.UUID(headers["x-chatstream-last-generated-message-id"]).version == 4
    assert "content-length" not in headers
    kind = "text/event-stream" if accept == "text/event-stream" else "text/plain"
    assert headers["content-type"] == f"{kind}; charset=utf-8"


@in_virtual_time
async def test_the_headers_are_sent_as_soon_as_the_request_is_admitted() -> None:
    async with open_service() as service:
        await service.occupy()
        for headers in (SSE, {}):
            async with Raw(service.app, "/chat_stream", HELLO, headers=headers) as call:
                await call.until(lambda call=call: call.sent)  # type: ignore[misc]
                assert call.status == 200
                assert call.headers["x-chatstream-request-id"]
                assert service.chat_stream.stats().waiting == 1


@in_virtual_time
async def test_a_waiting_request_gets_its_position_on_arrival_and_on_change_and_then_started() -> None:
    async with open_service() as service:
        first, *others = await service.occupy(3)
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as call:
            await call.until(lambda: call.body)
            assert [event.data["position"] for event in parse_events(call.body)] == [3]
            await asyncio.sleep(2.0)
            for stream in (*others, first):
                stream.close("client")
                await asyncio.sleep(2.0)
            await call.until(lambda: call.is_complete)
            events = parse_events(call.body)
    assert kinds(events) == ["queued", "queued", "queued", "started", "token", "token", "token", "done"]
    assert [event.data["position"] for event in events[:3]] == [3, 2, 1]
    queued = events[0].data
    assert set(queued) == {
        "request_id", "position", "position_kind", "eta_seconds", "eta_p90_seconds", "waits_for"
    }  # fmt: skip
    assert (queued["eta_seconds"], queued["eta_p90_seconds"]) == (None, None)
    assert events[3].data["waited_seconds"] == pytest.approx(6.0, abs=0.1)
    assert [int(event.id) for event in events] == list(range(1, 9))


@in_virtual_time
async def test_position_changes_within_a_second_are_merged() -> None:
    async with open_service() as service:
        _, *others = await service.occupy(5)
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as call:
            await call.until(lambda: call.body)
            for stream in others:
                stream.close("client")
                await asyncio.sleep(0.1)
            await asyncio.sleep(2.0)
            assert [event.data["position"] for event in parse_events(call.body)] == [5, 1]


@in_virtual_time
async def test_before_the_worker_starts_requests_wait_at_positions_from_1_and_are_served_afterwards() -> None:
    async with open_service(n=2, q=1, is_started=False) as service:
        calls = [Raw(service.app, "/chat_stream", HELLO, headers=SSE) for _ in range(4)]
        async with calls[0], calls[1], calls[2], calls[3]:
            for call in calls:
                await call.until(lambda call=call: call.sent)  # type: ignore[misc]
            assert [call.status for call in calls] == [200, 200, 200, 429]
            positions = [parse_events(call.body)[0].data["position"] for call in calls[:3]]
            assert positions == [1, 2, 3]
            await asyncio.sleep(60.0)
            assert service.engine.log == []
            await service.chat_stream.start_queue_worker()
            for call in calls[:3]:
                await call.until(lambda call=call: call.is_complete)  # type: ignore[misc]
                assert answer_of(parse_events(call.body)) == ANSWER


@in_virtual_time
async def test_a_silent_stream_is_kept_alive_by_comments() -> None:
    async with open_service(runtime=RuntimeSettings(keepalive_s=5.0)) as service:
        await service.occupy()
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as call:
            await asyncio.sleep(11.0)
            assert call.body.count(b": keep-alive\n\n") == 2
        async with Raw(service.app, "/chat_stream", HELLO) as call:  # the 0.3 format has no comments
            await asyncio.sleep(11.0)
            assert call.body == b""


@in_virtual_time
async def test_exactly_one_done_or_error_ends_every_stream() -> None:
    async with open_service(n=2) as service:
        for words, expected in (("hello", "done"), ("fail", "error"), ("fail-at-once", "error")):
            events = await ask(service.browser(), words)
            assert [kind for kind in kinds(events) if kind in ("done", "error")] == [expected]
            assert (events[0].kind, events[-1].kind) == ("started", expected)


@in_virtual_time
async def test_an_engine_error_is_an_event_once_the_headers_are_sent() -> None:
    async with open_service() as service:
        events = await ask(service.browser(), "fail")
    assert kinds(events) == ["started", "token", "error"]
    assert set(events[-1].data) == {"code", "message"}
    assert events[-1].data["code"] == "engine_error"
    assert "boom" not in events[-1].data["message"]  # an exception's text may contain private data


@in_virtual_time
async def test_an_expired_request_gets_queue_timeout_and_never_starts() -> None:
    async with open_service() as service:
        await service.occupy()
        events = await ask(service.browser(), "hello", max_wait_seconds=7.5)
        assert asyncio.get_running_loop().time() == pytest.approx(7.5)
    assert kinds(events) == ["queued", "error"]
    assert events[-1].data["code"] == "queue_timeout"


# --- the wire format of 0.3 -----------------------------------------------------------------------------------------


@in_virtual_time
async def test_without_an_accept_header_for_events_the_answer_is_in_the_0_3_format() -> None:
    async with open_service(FakeEngine(["ab", " cd"])) as service:
        for headers in ({}, {"accept": "*/*"}, {"accept": "application/json"}):
            response = await service.browser().post("/chat_stream", json=HELLO, headers=headers)
            assert response.content == b"ab<::EOS::>ab cd<::EOS::>"


@pytest.mark.anyio
@pytest.mark.parametrize("with_middleware", [False, True])
@pytest.mark.parametrize("words", ["fail", "fail-at-once"])
async def test_a_failed_answer_has_no_terminal_chunk_in_the_0_3_format(words: str, with_middleware: bool) -> None:
    """Also under the host's `BaseHTTPMiddleware`, which completes an unfinished response."""

    async def pass_on(request, call_next):  # type: ignore[no-untyped-def]
        return await call_next(request)

    chat_stream = ChatStream(engine=FakeEngine(script, step_s=0.001), max_concurrency=1)
    app = create_app(chat_stream)
    if with_middleware:
        app.add_middleware(BaseHTTPMiddleware, dispatch=pass_on)
    with serve(chat_stream, app) as server:
        async with server.client() as client:
            with pytest.raises(httpx2.RemoteProtocolError, match="incomplete chunked read"):
                await client.post("/chat_stream", json={"user_input": words})
            answer = await client.post("/chat_stream", json=HELLO)
            assert answer.text.endswith(f"{ANSWER}<::EOS::>")
        await server.until_idle()


# --- conversations --------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_browser_session_has_a_history() -> None:
    async with open_service() as service:
        browser, other = service.browser(), service.browser()
        await ask(browser, "one")
        await ask(other, "alien")
        last = (await ask(browser, "two"))[-1].data["request_id"]
        assert service.prompt_of(last) == [("user", "one"), ("assistant", "re one and more"), ("user", "two")]


@in_virtual_time
async def test_a_session_has_a_conversation_for_each_name_in_the_header() -> None:
    async with open_service() as service:
        browser = service.browser()
        await ask(browser, "one")
        browser.headers["X-ChatStream-Conversation"] = "tab-2"
        first_in_tab = (await ask(browser, "two"))[-1].data["request_id"]
        assert service.prompt_of(first_in_tab) == [("user", "two")]
        second_in_tab = (await ask(browser, "three"))[-1].data["request_id"]
        assert service.prompt_of(second_in_tab)[0] == ("user", "two")
        browser.headers["X-ChatStream-Conversation"] = "x" * 65
        response = await browser.post("/chat_stream", json=HELLO)
        assert (response.status_code, response.json()["param"]) == (400, "X-ChatStream-Conversation")


@in_virtual_time
async def test_regenerate_replaces_the_last_answer_under_a_new_message_id() -> None:
    answers = iter(["first", "again", "third"])
    async with open_service(FakeEngine(lambda request: [next(answers)])) as service:
        browser = service.browser()
        first = (await ask(browser, "one"))[-1].data
        again = await ask(browser, None, regenerate=True)
        assert answer_of(again) == "again"
        assert again[-1].data["message_id"] != first["message_id"]
        assert service.prompt_of(again[-1].data["request_id"]) == [("user", "one")]
        last = (await ask(browser, "two"))[-1].data["request_id"]
        assert service.prompt_of(last) == [("user", "one"), ("assistant", "again"), ("user", "two")]


@pytest.mark.parametrize("body", [{"regenerate": True}, {"regenerate": True, "user_input": "ignored"}])
@in_virtual_time
async def test_there_is_nothing_to_regenerate_in_a_new_conversation(body: dict[str, object]) -> None:
    async with open_service() as service:
        response = await service.browser().post("/chat_stream", json=body)
        assert response.status_code == 400
        assert (response.json()["code"], response.json()["param"]) == ("invalid_request", "regenerate")
        await asyncio.sleep(0.01)  # until it has released its slot
        assert service.num_requests == 0


@in_virtual_time
async def test_a_partial_answer_stays_in_the_history_after_a_disconnect() -> None:
    async with open_service() as service:
        browser = service.browser()
        await ask(browser, "one")
        cookie = {"cookie": f"chatstream_session={browser.cookies['chatstream_session']}"}
        async with Raw(service.app, "/chat_stream", {"user_input": "long"}, headers=SSE | cookie) as call:
            await call.until(lambda: call.body.count(b"token") == 3)
        last = (await ask(browser, "two"))[-1].data["request_id"]
        assert service.prompt_of(last)[2:] == [("user", "long"), ("assistant", "on on on "), ("user", "two")]


@in_virtual_time
async def test_a_disconnect_before_the_first_token_leaves_no_history() -> None:
    async with open_service(FakeEngine(lambda r: ["x"] * 3, step_s=1.0)) as service:
        browser = service.browser()
        await ask(browser, "one")
        cookie = {"cookie": f"chatstream_session={browser.cookies['chatstream_session']}"}
        async with Raw(service.app, "/chat_stream", {"user_input": "lost"}, headers=SSE | cookie) as call:
            await call.until(lambda: call.body.count(b"started"))
        last = (await ask(browser, "two"))[-1].data["request_id"]
        assert [content for _, content in service.prompt_of(last)] == ["one", "xxx", "two"]


@in_virtual_time
async def test_a_failed_answer_leaves_no_history() -> None:
    async with open_service() as service:
        browser = service.browser()
        await ask(browser, "one")
        await ask(browser, "fail")
        last = (await ask(browser, "two"))[-1].data["request_id"]
        assert [content for _, content in service.prompt_of(last)] == ["one", "re one and more", "two"]


@in_virtual_time
async def test_clear_context_deletes_the_conversation() -> None:
    async with open_service() as service:
        browser = service.browser()
        for _ in range(2):  # also without a conversation
            response = await browser.post("/clear_context")
            assert response.status_code == 200
            assert response.json() == {"success": True, "message": "Context successfully cleared"}
            last = (await ask(browser, "one"))[-1].data["request_id"]
            assert service.prompt_of(last) == [("user", "one")]


@in_virtual_time
async def test_after_clear_context_a_running_answer_is_not_kept() -> None:
    async with open_service() as service:
        browser = service.browser()
        await ask(browser, "one")
        answering = asyncio.create_task(ask(browser, "long"))
        await asyncio.sleep(0.35)
        await browser.post("/clear_context")
        assert kinds(await answering)[-1] == "done"
        last = (await ask(browser, "two"))[-1].data["request_id"]
        assert service.prompt_of(last) == [("user", "two")]


@in_virtual_time
async def test_requests_of_one_session_run_in_sequence_while_others_pass() -> None:
    async with open_service(n=2) as service:
        browser = service.browser()
        await ask(browser, "zero")
        cookie = {"cookie": f"chatstream_session={browser.cookies['chatstream_session']}"}
        long = Raw(service.app, "/chat_stream", {"user_input": "long"}, headers=SSE | cookie)
        held = Raw(service.app, "/chat_stream", {"user_input": "held"}, headers=SSE | cookie)
        async with long, held:
            await held.until(lambda: held.body)
            assert service.chat_stream.stats().running == 1  # the second waits without the other slot
            assert kinds(await ask(service.browser(), "hello"))[0] == "started"
            assert [event.data.get("position") for event in parse_events(held.body)] == [1]
            await held.until(lambda: held.is_complete)
            prompt = service.prompt_of(held.headers["x-chatstream-request-id"])
    assert [content for _, content in prompt] == ["zero", "re zero and more", "long", "on " * 10, "held"]


@in_virtual_time
async def test_a_regeneration_sent_during_an_answer_replaces_that_answer() -> None:
    async with open_service() as service:
        browser = service.browser()
        await ask(browser, "zero")
        answering = asyncio.create_task(ask(browser, "one"))
        await asyncio.sleep(0.05)
        last = (await ask(browser, None, regenerate=True))[-1].data["request_id"]
        await answering
        assert [content for _, content in service.prompt_of(last)] == ["zero", "re zero and more", "one"]


@in_virtual_time
async def test_the_number_of_conversations_is_limited() -> None:
    async with open_service(session_settings=SessionSettings(max_conversations=2)) as service:
        one, two, three = service.browser(), service.browser(), service.browser()
        for browser in (one, two, one, three):  # the least recently used one is deleted
            await ask(browser, "first")
        of_two = (await ask(two, "second"))[-1].data["request_id"]
        of_three = (await ask(three, "second"))[-1].data["request_id"]
        assert service.prompt_of(of_two) == [("user", "second")]
        assert len(service.prompt_of(of_three)) == 3


# --- the session cookie ---------------------------------------------------------------------------------------------


@in_virtual_time
async def test_the_cookie_is_same_site_and_http_only() -> None:
    async with open_service() as service:
        for base_url, is_secure in (("http://testserver", False), ("https://testserver", True)):
            response = await service.browser(base_url=base_url).post("/chat_stream", json=HELLO)
            name, *attributes = response.headers["set-cookie"].split("; ")
            assert name.startswith("chatstream_session=")
            assert set(attributes) == {"HttpOnly", "Path=/", "SameSite=lax"} | ({"Secure"} if is_secure else set())


@in_virtual_time
async def test_a_browser_with_a_cookie_gets_no_new_one() -> None:
    async with open_service() as service:
        browser = service.browser()
        assert "set-cookie" in (await browser.post("/chat_stream", json=HELLO)).headers
        assert "set-cookie" not in (await browser.post("/chat_stream", json=HELLO)).headers


@pytest.mark.parametrize("garbage", ["garbage", "a.b.c", "", '"', "%00", "e30.x", "é"])
@in_virtual_time
async def test_an_invalid_cookie_starts_a_new_session(garbage: str) -> None:
    async with open_service() as service:
        cookie = {"cookie": f"chatstream_session={garbage}".encode("latin-1")}
        response = await service.browser().post("/chat_stream", json=HELLO, headers=cookie)  # type: ignore[arg-type]
        assert response.status_code == 200
        assert "chatstream_session=" in response.headers["set-cookie"]


@in_virtual_time
async def test_a_cookie_of_another_server_starts_a_new_session_unless_the_secret_is_shared() -> None:
    for secrets, num_messages in (((None, None), 1), (("s", "other"), 1), (("s", "s"), 1)):
        async with (
            open_service(access=AccessSettings(session_secret=secrets[0])) as here,
            open_service(access=AccessSettings(session_secret=secrets[1])) as there,
        ):
            browser, moved = here.browser(), there.browser()
            await ask(browser, "one")
            moved.cookies = browser.cookies
            response = await moved.post("/chat_stream", json=HELLO, headers=SSE)
            assert ("set-cookie" not in response.headers) == (secrets == ("s", "s"))
            assert len(there.prompt_of(response.headers["x-chatstream-request-id"])) == num_messages


# --- refusals -------------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_a_full_queue_is_a_429_with_retry_after_and_without_work() -> None:
    async with open_service(n=1, q=2) as service:
        await service.occupy(3)
        prepared = service.engine.num_prepared
        response = await service.browser().post("/chat_stream", json=HELLO)
        assert response.status_code == 429
        body = response.json()
        assert (body["error"], body["code"]) == ("too_many_requests", "queue_full")
        assert body["message"]
        assert response.headers["retry-after"].isdigit()
        assert 1 <= int(response.headers["retry-after"]) <= 120
        assert 1000 <= int(response.headers["retry-after-ms"]) <= 120_000
        assert "set-cookie" not in response.headers
        assert service.engine.num_prepared == prepared
        assert service.num_requests == 3


@in_virtual_time
async def test_retry_after_grows_with_the_backlog() -> None:
    hints = []
    for backlog in (1, 5, 25):
        async with open_service(FakeEngine(["x"] * 30, step_s=0.1), n=1, q=backlog) as service:
            await ask(service.browser(), "warm-up")  # 3 s
            await service.occupy(backlog + 1)
            response = await service.browser().post("/chat_stream", json=HELLO)
            hints.append(int(response.headers["retry-after-ms"]) / 1000)
    for hint, expected in zip(hints, (6.0, 18.0, 78.0), strict=True):
        assert expected <= hint <= expected * 1.1 + 0.001


@pytest.mark.parametrize(
    ("body", "code", "param"),
    [
        (b"", "invalid_request", None),
        (b"{", "invalid_request", None),
        (b"\xff\xfe", "invalid_request", None),
        (b'{"user_input": "\\ud83c"}', "invalid_request", "user_input"),
        (b'{"user_input": "x", "stop": ["\\udf63"]}', "invalid_request", "stop"),
        (b'{"user_input": "x", "\\ud83c": 1}', "invalid_request", None),
        (b'{"user_input": "x", "seed": %b}' % (b"9" * 5000), "invalid_request", "seed"),
        (b'{"user_input": "x", "seed": %b}' % (b"9" * 70_000), "invalid_request", None),
        (b"[" * 100_000, "invalid_request", None),
        (b"[]", "invalid_request", None),
        (b"null", "invalid_request", None),
        (b'"hello"', "invalid_request", None),
        ({}, "invalid_request", "user_input"),
        ({"user_input": None}, "invalid_request", "user_input"),
        ({"user_input": ""}, "invalid_request", "user_input"),
        ({"user_input": " \n"}, "invalid_request", "user_input"),
        ({"user_input": 5}, "invalid_request", "user_input"),
        ({"user_input": ["hello"]}, "invalid_request", "user_input"),
        ({**HELLO, "regenerate": "True"}, "invalid_request", "regenerate"),
        ({**HELLO, "regenerate": 1}, "invalid_request", "regenerate"),
        ({**HELLO, "max_new_tokens": 0}, "invalid_request", "max_new_tokens"),
        ({**HELLO, "max_new_tokens": 1.5}, "invalid_request", "max_new_tokens"),
        ({**HELLO, "max_new_tokens": "5"}, "invalid_request", "max_new_tokens"),
        ({**HELLO, "max_new_tokens": 10**30}, "invalid_request", "max_new_tokens"),
        ({**HELLO, "temperature": -0.1}, "invalid_request", "temperature"),
        ({**HELLO, "temperature": 2.1}, "invalid_request", "temperature"),
        ({**HELLO, "temperature": True}, "invalid_request", "temperature"),
        (b'{"user_input": "x", "temperature": NaN}', "invalid_request", "temperature"),
        (b'{"user_input": "x", "temperature": 1e999}', "invalid_request", "temperature"),
        ({**HELLO, "top_p": 0}, "invalid_request", "top_p"),
        ({**HELLO, "top_p": 1.1}, "invalid_request", "top_p"),
        ({**HELLO, "top_k": 0}, "invalid_request", "top_k"),
        ({**HELLO, "min_p": -0.1}, "invalid_request", "min_p"),
        ({**HELLO, "frequency_penalty": 3}, "invalid_request", "frequency_penalty"),
        ({**HELLO, "presence_penalty": "1"}, "invalid_request", "presence_penalty"),
        ({**HELLO, "logprobs": True}, "unsupported_parameter", "logprobs"),
        ({**HELLO, "seed": "7"}, "invalid_request", "seed"),
        ({**HELLO, "seed": 2**65}, "invalid_request", "seed"),
        ({**HELLO, "stop": ""}, "invalid_request", "stop"),
        ({**HELLO, "stop": ["a"] * 17}, "invalid_request", "stop"),
        ({**HELLO, "stop": [1]}, "invalid_request", "stop[0]"),
        ({**HELLO, "priority": 2**40}, "invalid_request", "priority"),
        ({**HELLO, "max_wait_seconds": 0}, "invalid_request", "max_wait_seconds"),
        ({**HELLO, "max_wait_seconds": -1}, "invalid_request", "max_wait_seconds"),
        (b'{"user_input": "x", "max_wait_seconds": Infinity}', "invalid_request", "max_wait_seconds"),
        ({**HELLO, "resumable": True}, "unsupported_parameter", "resumable"),
        ({**HELLO, "repetition_penalty": 1.1}, "unsupported_parameter", "repetition_penalty"),
        ({"user_inptu": "hello"}, "unsupported_parameter", "user_inptu"),
        ({**HELLO, "user input": "hello"}, "unsupported_parameter", "user input"),
    ],
)
@in_virtual_time
async def test_invalid_input_is_a_400_with_the_field_and_without_work(
    body: object, code: str, param: str | None
) -> None:
    async with open_service() as service:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = await service.browser().post("/chat_stream", content=content)
        assert response.status_code == 400
        error_body = response.json()
        assert (error_body["error"], error_body["code"], error_body["param"]) == (code, code, param)
        assert param is None or param in error_body["message"]
        assert (service.engine.num_prepared, service.num_requests) == (0, 0)
        assert service.chat_stream.stats().received == 0


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        (b'{"user_input": "sushi \\ud83c"}', "user_input: a lone surrogate is not valid Unicode"),
        (b'{"user_input": "x", "seed": %b}' % (b"9" * 5000), "seed: the number is out of range"),
        (b'{"\\ud83c": "\\ud83c"}', "\\ud83c: a lone surrogate is not valid Unicode"),
        (b'{"seed": 1e999, "user_input": "\\ud83c"}', "user_input: a lone surrogate is not valid Unicode"),
        (b'{"user_input": "x", "%b": 1}' % (b"x" * 60_000), "x" * 100 + " is not supported"),
        (b'{"user_input": "x"', "the body cannot be read as JSON: EOF while parsing an object at line 1 column 18"),
    ],
    ids=["half an emoji", "thousands of digits", "halves only", "next to a large number", "a long name", "half a body"],
)
def test_an_unreadable_body_is_refused_with_the_reason(body: bytes, reason: str) -> None:
    """Only the last body is no JSON. JavaScript sends the first one for a text that was cut within an emoji."""
    with pytest.raises(InvalidRequest) as refusal:
        parse_body(ChatBody, body)
    assert refusal.value.message == reason
    assert (refusal.value.param or "").encode() in reason.encode()  # the response must be encodable


@in_virtual_time
async def test_null_means_not_given() -> None:
    fields = ChatBody.model_fields.keys() - {"user_input"}
    async with open_service() as service:
        events = await ask(service.browser(), "hello", **dict.fromkeys(fields))
        assert answer_of(events) == ANSWER


@in_virtual_time
async def test_sampling_parameters_reach_the_engine() -> None:
    seen = []
    engine = FakeEngine(lambda request: seen.append(request.sampling) or ["x"])  # type: ignore[func-returns-value]
    given = {
        "max_new_tokens": 7, "temperature": 0.5, "top_p": 0.9, "top_k": 3, "min_p": 0.05, "frequency_penalty": -1.5,
        "presence_penalty": 2, "seed": 2**63,
    }  # fmt: skip
    async with open_service(engine, temperature=0.1, repetition_penalty=1.3) as service:
        await ask(service.browser(), "x", **given, stop=["a", "b"])
        await ask(service.browser(), "x", stop="a")
    assert {name: getattr(seen[0], name) for name in given} == given
    assert (seen[0].stop, seen[1].stop) == (("a", "b"), ("a",))
    assert (seen[1].temperature, seen[1].repetition_penalty) == (0.1, 1.3)


@in_virtual_time
async def test_a_body_over_the_limit_is_a_413_declared_or_not() -> None:
    async def in_chunks():  # type: ignore[no-untyped-def]
        for _ in range(50):
            yield b" " * 100

    async with open_service(max_body_bytes=1000) as service:
        browser = service.browser()
        declared = await browser.post("/chat_stream", json={"user_input": "x" * 2000})
        chunked = await browser.post("/chat_stream", content=in_chunks())
        for response in (declared, chunked):
            assert response.status_code == 413
            assert response.json()["code"] == "body_too_large"
        fits = json.dumps(HELLO).encode().ljust(1000)
        assert (await browser.post("/chat_stream", content=fits)).status_code == 200
        assert (await browser.post("/chat_stream", content=fits + b" ")).status_code == 413
        assert service.engine.num_prepared == 2  # on admission, and in the slot


@pytest.mark.anyio
async def test_a_client_that_sends_a_far_too_large_body_can_read_the_error() -> None:
    async def in_chunks():  # type: ignore[no-untyped-def]
        for _ in range(64):
            yield b" " * 64 * 1024

    chat_stream = ChatStream(engine=FakeEngine(), max_body_bytes=1000)
    with serve(chat_stream) as server:
        async with server.client() as client:
            for content in (b" " * 4_000_000, in_chunks()):
                response = await client.post("/chat_stream", content=content)
                assert (response.status_code, response.json()["code"]) == (413, "body_too_large")


@in_virtual_time
async def test_a_stopped_worker_refuses_with_shutting_down() -> None:
    async with open_service() as service:
        await service.chat_stream.stop_queue_worker()
        response = await service.browser().post("/chat_stream", json=HELLO)
        assert response.status_code == 503
        assert response.json()["error"] == response.json()["code"] == "shutting_down"
        assert 1 <= int(response.headers["retry-after"]) <= 120


@in_virtual_time
async def test_waiting_requests_get_shutting_down_when_the_server_stops() -> None:
    async with open_service() as service:
        await service.occupy()
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as call:
            await call.until(lambda: call.body)
            await service.chat_stream.stop_queue_worker(1.0)
            await call.until(lambda: call.is_complete)
            assert parse_events(call.body)[-1].data["code"] == "shutting_down"


@in_virtual_time
async def test_a_request_that_ended_before_its_headers_were_sent_has_a_real_status() -> None:
    class SlowToPrepare(FakeEngine):
        async def prepare(self, prompt, sampling, *, may_drop_history=False):  # type: ignore[no-untyped-def]
            await asyncio.sleep(3.0 if prompt[-1].content == "hello" else 0.0)
            return await super().prepare(prompt, sampling)

    async with open_service(SlowToPrepare(["x"] * 200, step_s=0.1)) as service:
        await service.occupy()
        expired = await service.browser().post("/chat_stream", json={**HELLO, "max_wait_seconds": 1.0}, headers=SSE)
        assert (expired.status_code, expired.json()["code"]) == (429, "queue_timeout")
        assert expired.headers["retry-after"]
        async with Raw(service.app, "/chat_stream", HELLO, headers=SSE) as call:
            await call.until(lambda: service.chat_stream.stats().waiting)
            (waiting,) = [view.request_id for view in service.chat_stream.requests() if view.position]
            await service.browser().delete(f"/requests/{waiting}")
            await call.until(lambda: call.sent)
            assert call.status == 409
            assert json.loads(call.body)["code"] == "cancelled"


# --- cancelling -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ahead", [0, 1])
@in_virtual_time
async def test_delete_cancels_a_waiting_or_running_request_and_is_idempotent(num_ahead: int) -> None:
    async with open_service() as service:
        await service.occupy(num_ahead)
        async with Raw(service.app, "/chat_stream", {"user_input": "hang"}, headers=SSE) as call:
            await call.until(lambda: call.body)
            request_id = call.headers["x-chatstream-request-id"]
            stranger = service.browser()  # knowing the id is enough, without a cookie
            for _ in range(2):
                response = await stranger.delete(f"/requests/{request_id}")
                assert (response.status_code, response.content) == (204, b"")
            await call.until(lambda: call.is_complete)
            events = parse_events(call.body)
        assert events[-1].kind == "error"
        assert events[-1].data["code"] == "cancelled"
        assert service.num_requests == num_ahead


@in_virtual_time
async def test_an_ended_request_is_remembered_for_sixty_seconds() -> None:
    async with open_service() as service:
        browser = service.browser()
        ended_at_s = asyncio.get_running_loop().time() + 3 * 0.1
        request_id = (await ask(browser, "hello"))[-1].data["request_id"]
        await asyncio.sleep(ended_at_s + 59.9 - asyncio.get_running_loop().time())
        assert (await browser.delete(f"/requests/{request_id}")).status_code == 204
        await asyncio.sleep(0.2)
        response = await browser.delete(f"/requests/{request_id}")
        assert response.status_code == 404
        assert response.json()["error"] == response.json()["code"] == "not_found"


@pytest.mark.parametrize("request_id", ["unknown", "0" * 32, "%00", "a" * 5000])
@in_virtual_time
async def test_an_unknown_request_cannot_be_cancelled(request_id: str) -> None:
    async with open_service() as service:
        assert (await service.browser().delete(f"/requests/{request_id}")).status_code == 404


@in_virtual_time
async def test_with_api_keys_only_the_same_key_or_the_admin_key_cancels() -> None:
    async with open_service(n=2, access=AccessSettings(api_keys=("a", "b"), admin_key="root")) as service:
        for key, status in ((None, 401), ("wrong", 401), ("b", 404), ("a", 204), ("root", 204)):
            async with Raw(
                service.app, "/chat_stream", {"user_input": "hang"}, headers=SSE | {"authorization": "Bearer a"}
            ) as call:
                await call.until(lambda call=call: call.body)  # type: ignore[misc]
                headers = {"authorization": f"Bearer {key}"} if key else {}
                url = f"/requests/{call.headers['x-chatstream-request-id']}"
                assert (await service.browser().delete(url, headers=headers)).status_code == status
                if status == 204:
                    await call.until(lambda call=call: call.is_complete)  # type: ignore[misc]
                assert call.is_complete == (status == 204)


@in_virtual_time
async def test_a_client_that_disconnects_frees_its_position_or_slot() -> None:
    async with open_service(n=1, q=1) as service:
        for headers in (SSE, {}):
            async with Raw(service.app, "/chat_stream", {"user_input": "hang"}, headers=headers) as running:
                await running.until(lambda: service.chat_stream.stats().running == 1)
                async with Raw(service.app, "/chat_stream", HELLO, headers=headers) as waiting:
                    await waiting.until(lambda: service.chat_stream.stats().waiting == 1)
                assert service.chat_stream.stats().waiting == 0
            await asyncio.sleep(0.1)
            assert service.num_requests == 0


# --- load, queue, health --------------------------------------------------------------------------------------------


@in_virtual_time
async def test_get_load_counts_running_and_waiting_requests_and_needs_no_key() -> None:
    async with open_service(n=2, q=5, name="node:7", access=AccessSettings(api_keys=("k",))) as service:

        async def load() -> dict[str, object]:
            response = await service.browser().get("/get_load")
            assert response.status_code == 200
            body = response.json()
            assert (body["success"], body["message"]) == (True, "success")
            (worker,) = body["chatstream_workers"]
            return dict(worker)

        limits = {"name": "node:7", "max_processing": 2, "max_waiting": 5}
        assert await load() == limits | {
            "processing": 0, "waiting": 0, "_num_of_next_queue": 0, "_num_of_request_queue": 0
        }  # fmt: skip
        await service.occupy(6)
        assert await load() == limits | {
            "processing": 2, "waiting": 4, "_num_of_next_queue": 1, "_num_of_request_queue": 3
        }  # fmt: skip


@in_virtual_time
async def test_the_queue_lists_every_request_with_its_figures() -> None:
    async with open_service(n=1, q=5) as service:
        browser = service.browser()
        await browser.get("/health/live")
        async with (
            Raw(service.app, "/chat_stream", {"user_input": "hang"}, headers=SSE) as running,
            Raw(service.app, "/chat_stream", {**HELLO, "priority": 3}, headers=SSE) as waiting,
        ):
            await waiting.until(lambda: waiting.body)
            await asyncio.sleep(4.0)
            queue = (await browser.get("/queue")).json()
            running_row, waiting_row = queue.pop("running"), queue.pop("waiting")
            running_id = running.headers["x-chatstream-request-id"]
            waiting_id = waiting.headers["x-chatstream-request-id"]
    assert queue == {
        "max_concurrency": 1, "max_queue_size": 5, "policy": "fcfs", "paused": False, "draining": False,
        "num_waiting": 1,
        "engine": {
            "batched": True, "slow_because": "", "slots": 1, "prefix_cache_sequences": None, "prefix_cache_bytes": None,
            "prompt_tokens": None, "reused_prompt_tokens": None,
        },
    }  # fmt: skip
    (row,) = running_row
    assert row.pop("running_seconds") == pytest.approx(4.0, abs=0.1)
    assert row.pop("last_token_seconds_ago") == pytest.approx(3.9, abs=0.1)
    assert row == {
        "request_id": running_id, "client": "address:127.0.0.1", "slot": 0, "generated_tokens": 1, "waited_seconds": 0.0
    }  # fmt: skip
    (row,) = waiting_row
    assert row.pop("waited_seconds") == pytest.approx(4.0, abs=0.1)
    assert row == {
        "request_id": waiting_id, "client": "address:127.0.0.1", "position": 1, "eta_seconds": None, "priority": 3,
        "preempted": False, "generated_tokens": 0, "waits_for": "slot", "why": "all slots are in use",
    }  # fmt: skip


@in_virtual_time
async def test_a_held_request_has_the_reason() -> None:
    """It is at position 1 without an ETA, which needs an explanation."""
    async with open_service(n=4) as service:
        browser = service.browser()
        await ask(browser, "hello")  # for the cookie
        hang = {"user_input": "hang"}
        cookie = {"cookie": f"chatstream_session={browser.cookies['chatstream_session']}"}
        async with (
            Raw(service.app, "/chat_stream", hang, headers=SSE | cookie) as running,
            Raw(service.app, "/chat_stream", HELLO, headers=SSE | cookie) as waiting,
        ):
            await running.until(lambda: running.body)
            await waiting.until(lambda: waiting.body)
            [row] = (await browser.get("/queue")).json()["waiting"]
            [queued] = parse_events(waiting.body)
    assert (row["waits_for"], queued.data["waits_for"]) == ("conversation", "conversation")
    assert row["why"] == "an earlier request of the same conversation has not ended"
    assert queued.data["position"] == 1


@in_virtual_time
async def test_the_positions_in_the_queue_view_are_those_that_clients_received() -> None:
    async with open_service(n=1, q=9) as service:
        await service.occupy(5)
        rows = (await service.browser().get("/queue")).json()["waiting"]
        assert [row["position"] for row in rows] == [1, 2, 3, 4]
        assert all(b >= a for a, b in pairwise([-row["waited_seconds"] for row in rows]))


@in_virtual_time
async def test_the_queue_view_lists_the_first_waiting_requests_and_their_total() -> None:
    async with open_service(n=2, q=1100) as service:
        browser = service.browser()
        await service.occupy(1102)

        async def shown(query: str) -> tuple[int, int, list[int]]:
            queue = (await browser.get(f"/queue{query}")).json()
            return len(queue["running"]), queue["num_waiting"], [row["position"] for row in queue["waiting"]]

        assert await shown("") == (2, 1100, [*range(1, 1001)])
        assert await shown("?limit=3&at=noon") == (2, 1100, [1, 2, 3])
        assert await shown("?limit=0") == (2, 1100, [])
        assert await shown("?limit=1000000") == (2, 1100, [*range(1, 1101)])


@pytest.mark.parametrize("limit", ["-1", "1.5", "all", "", "1000001", "9" * 400, "9" * 5000], ids=lambda text: text[:9])
@in_virtual_time
async def test_a_wrong_limit_of_the_queue_view_is_refused_by_name_and_changes_nothing(limit: str) -> None:
    async with open_service() as service:
        browser = service.browser()
        for response in (
            await browser.get("/queue", params={"limit": limit}),
            await browser.patch("/queue", params={"limit": limit}, json={"paused": True}),
        ):
            assert response.status_code == 400
            assert (response.json()["code"], response.json()["param"]) == ("invalid_request", "limit")
            assert response.json()["message"].startswith("limit: ")
        assert not service.chat_stream.stats().is_paused


@in_virtual_time
async def test_the_queue_view_shows_that_the_server_drains() -> None:
    async with open_service() as service:
        await service.chat_stream.drain()
        assert (await service.browser().get("/queue")).json()["draining"] is True


@in_virtual_time
async def test_without_an_admin_key_only_this_machine_sees_the_queue() -> None:
    async with open_service() as service:
        for address, headers, status in (
            ("127.0.0.1", {}, 200),
            ("127.8.9.1", {}, 200),
            ("::1", {}, 200),
            ("::ffff:127.0.0.1", {}, 200),
            ("203.0.113.7", {}, 403),
            ("10.0.0.1", {}, 403),
            ("testclient", {}, 403),
            ("127.0.0.1", {"x-forwarded-for": "203.0.113.7"}, 403),
            ("127.0.0.1", {"x-forwarded-for": "127.0.0.1"}, 403),
            ("127.0.0.1", {"forwarded": "for=127.0.0.1"}, 403),
        ):
            response = await service.browser((address, 1)).get("/queue", headers=headers)
            assert response.status_code == status, (address, headers)
            if status == 403:
                assert response.json()["code"] == "forbidden"


@in_virtual_time
async def test_with_an_admin_key_the_queue_needs_it_from_any_address() -> None:
    async with open_service(access=AccessSettings(api_keys=("k",), admin_key="root")) as service:
        for address in ("127.0.0.1", "203.0.113.7"):
            browser = service.browser((address, 1))
            for authorization, status in (
                (None, 401),
                ("Basic cm9vdA==", 401),
                ("Bearer ", 401),
                ("Bearer k", 403),
                ("Bearer roo", 403),
                ("Bearer root", 200),
                ("bearer root", 200),
            ):
                headers = {"authorization": authorization} if authorization else {}
                response = await browser.get("/queue", headers=headers)
                assert response.status_code == status, authorization
                assert (status == 401) == ("www-authenticate" in response.headers)


@pytest.mark.anyio
async def test_while_the_model_loads_ready_reports_the_progress() -> None:
    may_go_on = threading.Event()

    def load() -> LoadedModel:
        engine.report_progress("reading weights", 0.43)
        may_go_on.wait(60)
        return LoadedModel(ScriptedRunner(), CharCodec())

    engine = StepEngine("scripted", load)
    chat_stream = ChatStream(engine=engine)
    transport = httpx2.ASGITransport(app=create_app(chat_stream))
    async with httpx2.AsyncClient(transport=transport, base_url="http://127.0.0.1:8000") as browser:
        starting = asyncio.create_task(chat_stream.start_queue_worker())
        await until(lambda: engine.health().detail not in ("not started", "loading"))
        response = await browser.get("/health/ready")
        assert (response.status_code, response.json()) == (503, {"status": "loading: reading weights, 43%"})
        may_go_on.set()
        await starting
        assert (await browser.get("/health/ready")).status_code == 200
    await chat_stream.stop_queue_worker()


@in_virtual_time
async def test_ready_means_started_and_not_draining_while_live_means_up() -> None:
    async with open_service(is_started=False) as service:
        browser = service.browser()

        async def statuses() -> tuple[int, int]:
            live, ready = await browser.get("/health/live"), await browser.get("/health/ready")
            head = await browser.head("/health/ready")
            assert (head.status_code, head.content) == (ready.status_code, b"")
            return live.status_code, ready.status_code

        assert await statuses() == (200, 503)
        await service.chat_stream.start_queue_worker()
        assert await statuses() == (200, 200)
        await service.occupy(6)
        assert await statuses() == (200, 200)  # full
        stopping = asyncio.create_task(service.chat_stream.stop_queue_worker(5.0))
        await asyncio.sleep(1.0)
        assert await statuses() == (200, 503)  # draining
        await stopping
        assert await statuses() == (200, 503)


@in_virtual_time
async def test_requests_and_clear_context_need_the_api_key() -> None:
    async with open_service(access=AccessSettings(api_keys=("k", "other"))) as service:
        browser = service.browser()
        for path in ("/chat_stream", "/clear_context"):
            for headers, status in (
                ({}, 401),
                ({"authorization": "Bearer no"}, 401),
                ({"authorization": "Bearer k"}, 200),
            ):
                response = await browser.post(path, json=HELLO, headers=headers)
                assert response.status_code == status
                if status == 401:
                    assert response.json()["error"] == response.json()["code"] == "unauthorized"
                    assert response.headers["www-authenticate"] == "Bearer"
        assert service.chat_stream.stats().received == 1
