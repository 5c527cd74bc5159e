"""The table of errors, and their native and OpenAI shapes on every endpoint."""

from __future__ import annotations

import asyncio
import json
import math
from typing import Any

import pytest
from pydantic import ValidationError

from chatstream import AccessSettings, errors
from chatstream.api.bodies import Body, parse_body
from chatstream.api.errors import error_headers, native_body, openai_body
from chatstream.api.native import ChatBody
from chatstream.api.openai import ChatCompletionBody
from chatstream.errors import ChatStreamError
from chatstream.testing import FakeEngine
from tests.api.in_process import open_service
from tests.runtime.harness import in_virtual_time

TABLE: dict[type[ChatStreamError], tuple[str, int, str]] = {
    errors.QueueFull: ("queue_full", 429, "rate_limit_error"),
    errors.ClientLimit: ("client_limit", 429, "rate_limit_error"),
    errors.Infeasible: ("infeasible", 429, "rate_limit_error"),
    errors.Paused: ("paused", 503, "server_error"),
    errors.QueueTimeout: ("queue_timeout", 429, "rate_limit_error"),
    errors.ShuttingDown: ("shutting_down", 503, "server_error"),
    errors.EngineUnavailable: ("engine_unavailable", 503, "server_error"),
    errors.Cancelled: ("cancelled", 409, "invalid_request_error"),
    errors.InvalidRequest: ("invalid_request", 400, "invalid_request_error"),
    errors.PromptTooLong: ("prompt_too_long", 400, "invalid_request_error"),
    errors.UnsupportedParameter: ("unsupported_parameter", 400, "invalid_request_error"),
    errors.Unauthorized: ("unauthorized", 401, "authentication_error"),
    errors.Forbidden: ("forbidden", 403, "permission_error"),
    errors.NotFound: ("not_found", 404, "invalid_request_error"),
    errors.BodyTooLarge: ("body_too_large", 413, "invalid_request_error"),
    errors.EngineError: ("engine_error", 500, "server_error"),
    errors.ConfigError: ("config_error", 500, "server_error"),
}


def all_kinds(kind: type[ChatStreamError] = ChatStreamError) -> set[type[ChatStreamError]]:
    return {kind}.union(*(all_kinds(child) for child in kind.__subclasses__()))


def test_the_table_is_complete() -> None:
    abstract = {ChatStreamError, errors.AccessDenied, errors.Overloaded}
    assert set(TABLE) | abstract == {kind for kind in all_kinds() if kind.__module__ == errors.__name__}
    codes = [code for code, _, _ in TABLE.values()]
    assert len(codes) == len(set(codes))


@pytest.mark.parametrize(("kind", "row"), TABLE.items())
def test_an_error_has_the_same_content_in_both_shapes(kind: type[ChatStreamError], row: tuple[str, int, str]) -> None:
    code, status, openai_type = row
    error = kind("what to do now", param="field")
    assert error.http_status == status
    assert openai_body(error) == {
        "error": {"message": "what to do now", "type": openai_type, "param": "field", "code": code}
    }
    assert native_body(error) == {
        "error": "too_many_requests" if status == 429 else code,
        "code": code,
        "message": "what to do now",
        "param": "field",
    }


@pytest.mark.parametrize("kind", TABLE)
@pytest.mark.parametrize("hint_s", [None, 0.01, 1.0, 33.4, 119.9, 120.0])
def test_only_overload_errors_have_retry_after(kind: type[ChatStreamError], hint_s: float | None) -> None:
    is_overloaded = issubclass(kind, errors.Overloaded)
    for _ in range(100):  # the jitter is random
        headers = error_headers(kind("x", retry_after_s=hint_s if is_overloaded else None))
        assert ("Retry-After" in headers) == ("retry-after-ms" in headers) == is_overloaded
        if is_overloaded:
            exact_s = int(headers["retry-after-ms"]) / 1000
            assert 1.0 <= exact_s <= 120.0
            assert int(headers["Retry-After"]) == math.ceil(exact_s)
            if hint_s is not None:
                assert exact_s >= min(hint_s, 120.0 / 1.1)


@pytest.mark.parametrize(("hint_s", "earliest_s", "latest_s"), [(60.0, 60.0, 66.0), (500.0, 109.0, 120.0)])
def test_clients_rejected_together_do_not_all_retry_together(hint_s: float, earliest_s: float, latest_s: float) -> None:
    hints = {error_headers(errors.QueueFull("x", retry_after_s=hint_s))["retry-after-ms"] for _ in range(50)}
    assert len(hints) > 10
    assert all(earliest_s * 1000 <= int(hint) <= latest_s * 1000 for hint in hints)


# --- the same on every endpoint -------------------------------------------------------------------------------------


def is_native(body: Any) -> bool:
    return (
        set(body) == {"error", "code", "message", "param"}
        and all(isinstance(body[name], str) and body[name] for name in ("error", "code", "message"))
        and (body["param"] is None or isinstance(body["param"], str))
    )


def is_openai(body: Any) -> bool:
    error = body["error"]
    return (
        set(body) == {"error"}
        and set(error) == {"message", "type", "param", "code"}
        and all(isinstance(error[name], str) and error[name] for name in ("message", "type", "code"))
        and (error["param"] is None or isinstance(error["param"], str))
    )


CHAT = json.dumps({"user_input": "hello"}).encode()
COMPLETION = json.dumps({"model": "fake", "messages": [{"role": "user", "content": "hello"}]}).encode()
OTHER_MODEL = COMPLETION.replace(b"fake", b"gpt-9")
KEY, ADMIN, WRONG = ({"authorization": f"Bearer {key}"} for key in ("key", "root", "wrong"))

CASES = [
    ("POST", "/chat_stream", {}, CHAT, 401, is_native),
    ("POST", "/chat_stream", WRONG, CHAT, 401, is_native),
    ("POST", "/chat_stream", KEY, b"{", 400, is_native),
    ("POST", "/chat_stream", KEY, b"{}", 400, is_native),
    ("POST", "/chat_stream", KEY, b" " * 5000, 413, is_native),
    ("POST", "/chat_stream", KEY, CHAT, 429, is_native),
    ("POST", "/clear_context", {}, b"", 401, is_native),
    ("GET", "/queue", {}, b"", 401, is_native),
    ("GET", "/queue", KEY, b"", 403, is_native),
    ("DELETE", "/requests/unknown", {}, b"", 401, is_native),
    ("DELETE", "/requests/unknown", KEY, b"", 404, is_native),
    ("DELETE", "/requests/unknown", ADMIN, b"", 404, is_native),
    ("POST", "/v1/chat/completions", {}, COMPLETION, 401, is_openai),
    ("POST", "/v1/chat/completions", KEY, b"[]", 400, is_openai),
    ("POST", "/v1/chat/completions", KEY, OTHER_MODEL, 404, is_openai),
    ("POST", "/v1/chat/completions", KEY, b" " * 5000, 413, is_openai),
    ("POST", "/v1/chat/completions", KEY, COMPLETION, 429, is_openai),
    ("GET", "/v1/models", {}, b"", 401, is_openai),
    ("GET", "/v1/models/gpt-9", {}, b"", 401, is_openai),
    ("GET", "/v1/models/gpt-9", KEY, b"", 404, is_openai),
    ("GET", "/no/such/path", {}, b"", 404, is_openai),
    ("GET", "/chat_stream", {}, b"", 405, is_openai),
    ("POST", "/get_load", {}, b"", 405, is_openai),
    ("PUT", "/v1/chat/completions", {}, b"", 405, is_openai),
]


@pytest.mark.parametrize(("method", "path", "headers", "body", "status", "has_shape"), CASES)
@in_virtual_time
async def test_every_refusal_has_its_status_and_the_shape_of_its_api(
    method: str, path: str, headers: dict[str, str], body: bytes, status: int, has_shape: Any
) -> None:
    access = AccessSettings(api_keys=("key",), admin_key="root")
    async with open_service(n=1, q=0, max_body_bytes=1000, access=access) as service:
        await service.occupy()
        prepared = service.engine.num_prepared
        response = await service.browser().request(method, path, headers=headers, content=body)
        assert response.status_code == status
        assert response.headers["content-type"] == "application/json"
        assert has_shape(response.json()), response.text
        assert (service.engine.num_prepared, service.num_requests) == (prepared, 1)


@pytest.mark.anyio  # a thread serves files, which virtual time does not wait for
async def test_a_missing_file_of_the_page_is_an_error_of_the_same_shape() -> None:
    async with open_service() as service:
        response = await service.browser().get("/static/no-such-file.js")
        assert response.status_code == 404
        assert is_openai(response.json())


@in_virtual_time
async def test_a_wrong_method_is_a_405_with_the_allowed_ones() -> None:
    async with open_service() as service:
        for method, path, right in (
            ("GET", "/chat_stream", "POST"),
            ("POST", "/queue", "GET, HEAD, PATCH"),
            ("GET", "/requests/x", "DELETE"),
            ("POST", "/requests/x/stream", "GET, HEAD"),
            ("POST", "/", "GET, HEAD"),
            ("PUT", "/v1/models/some/name", "GET, HEAD"),
        ):
            response = await service.browser().request(method, path)
            assert (response.status_code, response.headers["allow"]) == (405, right), path


@pytest.mark.parametrize(
    ("path", "body", "has_shape"), [("/chat_stream", CHAT, is_native), ("/v1/chat/completions", COMPLETION, is_openai)]
)
@in_virtual_time
async def test_a_bug_is_a_500_of_the_same_shape_without_details_or_leaks(
    path: str, body: bytes, has_shape: Any, caplog: pytest.LogCaptureFixture
) -> None:
    class Buggy(FakeEngine):
        async def prepare(self, prompt, sampling, *, may_drop_history=False):  # type: ignore[no-untyped-def]
            raise ZeroDivisionError("secret")

    async with open_service(Buggy()) as service:
        response = await service.browser().post(path, content=body)
        assert response.status_code == 500
        assert has_shape(response.json())
        assert "secret" not in response.text
    assert "secret" in caplog.text


@pytest.mark.parametrize(
    ("path", "body", "has_shape"), [("/chat_stream", CHAT, is_native), ("/v1/chat/completions", COMPLETION, is_openai)]
)
@in_virtual_time
async def test_a_prompt_that_does_not_fit_is_refused_before_the_headers_and_frees_its_slot(
    path: str, body: bytes, has_shape: Any
) -> None:
    class Short(FakeEngine):
        async def prepare(self, prompt, sampling, *, may_drop_history=False):  # type: ignore[no-untyped-def]
            if prompt[-1].content != "fits":
                raise errors.PromptTooLong("the prompt has 9 tokens; 8 fit", param="messages")
            return await super().prepare(prompt, sampling)

    async with open_service(Short(), n=1, q=0) as service:
        for _ in range(3):
            response = await service.browser().post(path, content=body)
            assert response.status_code == 400
            assert has_shape(response.json())
            assert "prompt_too_long" in response.text
            await asyncio.sleep(0.01)  # until it has released its slot
        response = await service.browser().post(path, content=body.replace(b"hello", b"fits"))
        assert response.status_code == 200


class TooShort(FakeEngine):
    """Refuses every prompt. The refused field is `max_new_tokens` if it is above 10, else `messages`."""

    async def prepare(self, prompt, sampling, *, may_drop_history=False):  # type: ignore[no-untyped-def]
        is_answer = (sampling.max_new_tokens or 0) > 10
        raise errors.PromptTooLong("it does not fit", param="max_new_tokens" if is_answer else "messages")


@pytest.mark.parametrize(
    ("path", "body", "more", "param"),
    [
        ("/v1/chat/completions", COMPLETION, {"max_tokens": 11}, "max_tokens"),
        ("/v1/chat/completions", COMPLETION, {"max_completion_tokens": 11}, "max_completion_tokens"),
        ("/v1/chat/completions", COMPLETION, {}, "messages"),
        ("/chat_stream", CHAT, {"max_new_tokens": 11}, "max_new_tokens"),
        ("/chat_stream", CHAT, {}, "user_input"),
    ],
)
@in_virtual_time
async def test_a_field_that_does_not_fit_has_the_name_that_the_client_used(
    path: str, body: bytes, more: dict[str, int], param: str
) -> None:
    """The engine's names are `messages` and `max_new_tokens`; the client may have used others."""
    async with open_service(TooShort()) as service:
        response = await service.browser().post(path, json=json.loads(body) | more)
        error_body = response.json()
        assert (error_body["error"] if path.startswith("/v1/") else error_body)["param"] == param


@in_virtual_time
async def test_a_stream_admitted_during_the_load_reports_the_field_that_was_sent() -> None:
    async with open_service(TooShort(), is_started=False) as service:
        body = json.loads(COMPLETION) | {"max_tokens": 11, "stream": True}
        asking = asyncio.create_task(service.browser().post("/v1/chat/completions", json=body))
        await asyncio.sleep(1.0)
        await service.chat_stream.start_queue_worker()
        assert '"param":"max_tokens"' in (await asking).text


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        (ChatCompletionBody, {"model": "fake", "messages": [{}] * 2000}),
        (ChatCompletionBody, {"model": "fake", "messages": [{"role": "user", "content": [1] * 2000}]}),
        (ChatCompletionBody, {**json.loads(COMPLETION), "stop": [1] * 2000}),
        (ChatBody, {**json.loads(CHAT), "stop": [1] * 2000}),
    ],
    ids=["messages", "parts", "stop", "native stop"],
)
def test_validation_of_a_list_stops_at_the_first_error(kind: type[Body], body: dict[str, Any]) -> None:
    """A list with an error in every second byte of a megabyte blocked the event loop for 6 s."""
    with pytest.raises(ValidationError) as refusal:
        kind.model_validate_json(json.dumps(body))
    assert refusal.value.error_count() <= 3  # one for each type of the field


def test_of_a_thousand_validation_errors_none_is_picked() -> None:
    with pytest.raises(errors.InvalidRequest, match="the body has 1001 validation errors"):
        parse_body(ChatBody, json.dumps(json.loads(CHAT) | {str(n): n for n in range(1001)}))
