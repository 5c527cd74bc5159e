"""The OpenAI-compatible endpoints, tested with OpenAI's own client and types."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator
from contextlib import aclosing, asynccontextmanager
from dataclasses import replace
from typing import Any

import httpx2
import openai
import pytest
from openai import AsyncOpenAI, OpenAI
from openai.types import Model
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from chatstream import AccessSettings, ChatStream, MockEngine
from chatstream.errors import EngineUnavailable
from chatstream.testing import FakeEngine
from chatstream.types import GenerationRequest, TokenDelta, TokenLogprob
from tests.api.in_process import ANSWER, Raw, open_service, parse_events, script
from tests.e2e.server import Server, serve
from tests.runtime.harness import in_virtual_time

PATH = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hello"}]}
HANG: dict[str, Any] = {"model": "fake", "messages": [{"role": "user", "content": "hang"}]}


def chat_stream_with(**options: Any) -> ChatStream:
    return ChatStream(engine=FakeEngine(script, step_s=0.001), **{"max_concurrency": 1, **options})


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A server shared by tests that leave no state."""
    with serve(chat_stream_with(max_concurrency=4)) as server:
        yield server


@asynccontextmanager
async def async_client(server: Server, **options: Any) -> AsyncIterator[AsyncOpenAI]:
    http = httpx2.AsyncClient(verify=False)
    options = {"api_key": "unused", "max_retries": 0, **options}
    async with AsyncOpenAI(base_url=f"{server.url}/v1", http_client=http, **options) as client:
        yield client


def strictly(kind: type[Any], body: Any) -> Any:
    """Parse with OpenAI's types, strictly, unlike the client."""
    return kind.model_validate(body, strict=False, extra="forbid")


# --- the official client --------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_an_answer_without_streaming_is_complete(server: Server) -> None:
    async with async_client(server) as client:
        completion = await client.chat.completions.create(**HELLO)
    (choice,) = completion.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", ANSWER, "stop")
    assert completion.usage is not None
    assert (completion.usage.prompt_tokens, completion.usage.completion_tokens, completion.usage.total_tokens) == (
        1,
        3,
        4,
    )
    assert (completion.model, completion.object) == ("fake", "chat.completion")
    assert completion.id.startswith("chatcmpl-")


def test_the_synchronous_client_works(server: Server) -> None:
    with OpenAI(base_url=f"{server.url}/v1", api_key="x", http_client=httpx2.Client(verify=False)) as client:
        assert client.chat.completions.create(**HELLO).choices[0].message.content == ANSWER
        chunks = list(client.chat.completions.create(**HELLO, stream=True))
        assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == ANSWER


@pytest.mark.anyio
async def test_a_streamed_answer_is_complete(server: Server) -> None:
    async with async_client(server) as client:
        chunks = [chunk async for chunk in await client.chat.completions.create(**HELLO, stream=True)]
    assert [chunk.choices[0].delta.content for chunk in chunks] == ["", "re hello", " and", " more", None]
    assert [chunk.choices[0].delta.role for chunk in chunks] == ["assistant", None, None, None, None]
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None, None, None, None, "stop"]
    assert {chunk.usage for chunk in chunks} == {None}
    assert len({(chunk.id, chunk.created, chunk.model) for chunk in chunks}) == 1


@pytest.mark.anyio
async def test_usage_is_sent_in_a_separate_last_chunk_if_requested(server: Server) -> None:
    async with async_client(server) as client:
        stream = await client.chat.completions.create(**HELLO, stream=True, stream_options={"include_usage": True})
        chunks = [chunk async for chunk in stream]
    assert [chunk.usage for chunk in chunks[:-1]] == [None] * 5
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.total_tokens == 4


@pytest.mark.anyio
async def test_the_clients_stream_helper_reads_a_stream_to_the_end(server: Server) -> None:
    async with async_client(server) as client:
        async with client.chat.completions.stream(**HELLO) as stream:
            completion = await stream.get_final_completion()
    assert completion.choices[0].message.content == ANSWER


@pytest.mark.anyio
async def test_an_answer_can_be_sent_back_unchanged() -> None:
    chat_stream = chat_stream_with()
    with serve(chat_stream) as server:
        async with async_client(server) as client:
            messages: list[Any] = [{"role": "user", "content": "one"}]
            completion = await client.chat.completions.create(model="fake", messages=messages)
            messages += [completion.choices[0].message, {"role": "user", "content": "two"}]
            completion = await client.chat.completions.create(model="fake", messages=messages)
        engine = chat_stream.engine
        assert isinstance(engine, FakeEngine)
        prompt = engine.prompts[completion.id.removeprefix("chatcmpl-")].messages
    assert [(m.role, m.content) for m in prompt] == [
        ("user", "one"), ("assistant", "re one and more"), ("user", "two")
    ]  # fmt: skip


@pytest.mark.anyio
async def test_models_are_listed_and_found_by_name() -> None:
    chat_stream = ChatStream(engine=FakeEngine(model_name="some/model-1"))
    with serve(chat_stream) as server:
        async with async_client(server) as client:
            (listed,) = [model async for model in client.models.list()]
            assert (listed.id, listed.object) == ("some/model-1", "model")
            assert await client.models.retrieve("some/model-1") == listed
            with pytest.raises(openai.NotFoundError):
                await client.models.retrieve("other")


@pytest.mark.anyio
async def test_a_full_queue_is_a_rate_limit_error_with_retry_after() -> None:
    with serve(chat_stream_with(max_queue_size=0)) as server:
        async with async_client(server) as client:
            async with await client.chat.completions.create(**HANG, stream=True):
                with pytest.raises(openai.RateLimitError) as refusal:
                    await client.chat.completions.create(**HELLO)
        await server.until_idle()
    error = refusal.value
    assert (error.status_code, error.code, error.type) == (429, "queue_full", "rate_limit_error")
    assert 1 <= int(error.response.headers["retry-after"]) <= 120
    assert int(error.response.headers["retry-after-ms"]) >= 1000


@pytest.mark.anyio
async def test_a_client_that_retries_is_served_once_the_queue_has_room() -> None:
    with serve(chat_stream_with(max_queue_size=0)) as server:
        async with async_client(server) as client, async_client(server, max_retries=2) as patient:
            async with await client.chat.completions.create(**HANG, stream=True):
                asking = asyncio.create_task(patient.chat.completions.create(**HELLO))
                await server.until(lambda: server.chat_stream.stats().rejected == 1)
            assert (await asking).choices[0].message.content == ANSWER
        await server.until_idle()


@pytest.mark.anyio
async def test_bad_parameters_unknown_models_and_wrong_keys_raise_the_clients_own_errors() -> None:
    with serve(chat_stream_with(access=AccessSettings(api_keys=("secret",)))) as server:
        async with async_client(server, api_key="secret") as client:
            with pytest.raises(openai.BadRequestError) as refusal:
                await client.chat.completions.create(**HELLO, temperature=3)
            assert (refusal.value.param, refusal.value.code) == ("temperature", "invalid_request")
            with pytest.raises(openai.BadRequestError) as refusal:
                await client.chat.completions.create(**HELLO, n=2)
            assert (refusal.value.param, refusal.value.code) == ("n", "unsupported_parameter")
            with pytest.raises(openai.NotFoundError) as not_found:
                await client.chat.completions.create(**{**HELLO, "model": "gpt-9"})
            assert (not_found.value.param, not_found.value.code) == ("model", "not_found")
            assert (await client.chat.completions.create(**HELLO)).choices[0].message.content == ANSWER
        async with async_client(server, api_key="wrong") as client:
            with pytest.raises(openai.AuthenticationError):
                await client.chat.completions.create(**HELLO)
            with pytest.raises(openai.AuthenticationError):
                await client.models.list()
        assert server.chat_stream.stats().received == 1


@pytest.mark.anyio
async def test_a_failure_in_mid_stream_is_raised_as_an_api_error(server: Server) -> None:
    body = {**HELLO, "messages": [{"role": "user", "content": "fail"}]}
    async with async_client(server) as client:
        stream = await client.chat.completions.create(**body, stream=True)
        seen = [(await anext(stream)).choices[0].delta.content for _ in range(2)]
        with pytest.raises(openai.APIError) as failure:
            await anext(stream)
        assert (seen, failure.value.code) == (["", "half "], "engine_error")
        with pytest.raises(openai.InternalServerError) as whole:
            await client.chat.completions.create(**body)
        assert (whole.value.status_code, whole.value.code) == (500, "engine_error")


@pytest.mark.anyio
async def test_stop_and_max_tokens_are_honoured() -> None:
    with serve(ChatStream(engine=MockEngine("echo", time_per_token_s=0.0))) as server:
        async with async_client(server) as client:

            async def finish(**more: Any) -> tuple[str | None, str]:
                messages: Any = [{"role": "user", "content": "one two three four"}]
                answer = await client.chat.completions.create(model="mock-echo", messages=messages, **more)
                return answer.choices[0].message.content, answer.choices[0].finish_reason

            assert await finish() == ("one two three four", "stop")
            assert await finish(max_tokens=2) == ("one two", "length")
            assert await finish(max_completion_tokens=3) == ("one two three", "length")
            assert await finish(stop=" three") == ("one two", "stop")
            assert await finish(stop=["zzz", "wo"]) == ("one t", "stop")


@pytest.mark.anyio
@pytest.mark.parametrize("is_running", [True, False])
async def test_a_client_that_disconnects_before_its_whole_answer_frees_its_slot(is_running: bool) -> None:
    with serve(chat_stream_with(max_queue_size=1)) as server:
        async with async_client(server) as client:
            others = [] if is_running else [await client.chat.completions.create(**HANG, stream=True)]
            asking = asyncio.create_task(client.chat.completions.create(**HANG))
            await server.until(lambda: (server.running, server.waiting) == ((1, 0) if is_running else (1, 1)))
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            await server.until(lambda: (server.running, server.waiting) == ((0, 0) if is_running else (1, 0)))
            for other in others:
                await other.close()
        await server.until_idle()


# --- on the wire ----------------------------------------------------------------------------------------------------


@in_virtual_time
async def test_every_response_matches_openais_types_exactly() -> None:
    async with open_service() as service:
        browser = service.browser()
        whole = await browser.post(PATH, json=HELLO)
        assert whole.headers["content-type"] == "application/json"
        strictly(ChatCompletion, whole.json())
        body = {**HELLO, "stream": True, "stream_options": {"include_usage": True}}
        stream = await browser.post(PATH, json=body)
        assert stream.headers["content-type"] == "text/event-stream; charset=utf-8"
        assert (stream.headers["cache-control"], stream.headers["x-accel-buffering"]) == ("no-store", "no")
        *blocks, done, rest = stream.text.split("\n\n")
        assert (done, rest) == ("data: [DONE]", "")
        for block in blocks:
            strictly(ChatCompletionChunk, json.loads(block.removeprefix("data: ")))
        for response in (whole, stream):
            assert len(bytes.fromhex(response.headers["x-chatstream-request-id"])) == 16
        models = (await browser.get("/v1/models")).json()
        assert (models["object"], len(models["data"])) == ("list", 1)
        for model in (*models["data"], (await browser.get("/v1/models/fake")).json()):
            assert model.pop("max_model_len") is None  # vLLM's field
            strictly(Model, model)


@in_virtual_time
async def test_while_a_stream_waits_only_comments_are_sent_and_the_first_chunk_comes_with_the_start() -> None:
    async with open_service() as service:
        first, second = await service.occupy(2)
        async with Raw(service.app, PATH, {**HELLO, "stream": True}) as call:
            await call.until(lambda: call.body)
            assert call.body == b": queued position=2\n\n"
            assert call.status == 200
            await asyncio.sleep(2.0)
            second.close("client")
            await asyncio.sleep(2.0)
            assert call.body == b": queued position=2\n\n: queued position=1\n\n"
            first.close("client")
            await call.until(lambda: call.is_complete)
        first_chunk = parse_events(call.body.removesuffix(b"data: [DONE]\n\n"))[0]
        assert first_chunk.data["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        assert b"event:" not in call.body


@in_virtual_time
async def test_named_events_are_sent_with_the_request_header() -> None:
    async with open_service() as service:
        (ahead,) = await service.occupy()
        headers = {"X-ChatStream-Queue-Events": "1"}
        async with Raw(service.app, PATH, {**HELLO, "stream": True}, headers=headers) as call:
            await call.until(lambda: call.body)
            ahead.close("client")
            await call.until(lambda: call.is_complete)
        events = parse_events(call.body.removesuffix(b"data: [DONE]\n\n"))
        assert [event.kind for event in events] == ["queued", "started", "", "", "", "", ""]
        assert events[0].data["position"] == 1
        assert set(events[1].data) == {"request_id", "waited_seconds"}


@in_virtual_time
async def test_roles_and_content_parts_reach_the_engine_as_messages() -> None:
    messages = [
        {"role": "developer", "content": "be brief"},
        {"role": "system", "content": [{"type": "text", "text": "be "}, {"type": "text", "text": "kind"}]},
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "re one", "refusal": None, "annotations": [], "tool_calls": None},
        {"role": "user", "content": [{"type": "text", "text": "two"}]},
    ]
    async with open_service() as service:
        response = await service.browser().post(PATH, json={"model": "fake", "messages": messages})
        assert service.prompt_of(response.headers["x-chatstream-request-id"]) == [
            ("system", "be brief"), ("system", "be kind"), ("user", "one"), ("assistant", "re one"), ("user", "two")
        ]  # fmt: skip


@in_virtual_time
async def test_the_servers_system_prompt_comes_first() -> None:
    async with open_service(system_prompt="you are a post office") as service:
        response = await service.browser().post(PATH, json=HELLO)
        prompt = service.prompt_of(response.headers["x-chatstream-request-id"])
    assert prompt == [("system", "you are a post office"), ("user", "hello")]


@in_virtual_time
async def test_parameters_reach_the_engine_under_their_own_names() -> None:
    seen = []
    engine = FakeEngine(lambda request: seen.append(request.sampling) or ["x"])  # type: ignore[func-returns-value]
    given = {
        "temperature": 0, "top_p": 0.9, "top_k": 3, "min_p": 0.1, "seed": 7, "repetition_penalty": 1.2,
        "frequency_penalty": 0.5, "presence_penalty": -2,
    }  # fmt: skip
    async with open_service(engine) as service:
        for limit in ({"max_tokens": 5}, {"max_completion_tokens": 5}, {"max_tokens": 5, "max_completion_tokens": 5}):
            assert (
                await service.browser().post(PATH, json={**HELLO, **given, **limit, "stop": "a"})
            ).status_code == 200
    for sampling in seen:
        assert {name: getattr(sampling, name) for name in given} == given
        assert (sampling.max_new_tokens, sampling.stop) == (5, ("a",))


@in_virtual_time
async def test_two_fields_set_the_number_of_alternatives() -> None:
    seen = []
    engine = FakeEngine(lambda request: seen.append(request.sampling.logprobs) or ["x"])  # type: ignore[func-returns-value]
    async with open_service(engine) as service:
        for more in ({}, {"logprobs": False}, {"logprobs": True}, {"logprobs": True, "top_logprobs": 20}):
            assert (await service.browser().post(PATH, json={**HELLO, **more})).status_code == 200
    assert seen == [None, None, 0, 20]


class Unsure(FakeEngine):
    """The second of three tokens is a partial character, whose text is sent with the third."""

    LOGPROBS = (
        TokenLogprob("Hé", -0.25, (("Hé", -0.25), ("Ho", -1.5))),
        TokenLogprob("\ufffd", -3.5, ((" ", -0.5), ("\ufffd", -3.5))),
        TokenLogprob("\ufffd", 0.0, (("\ufffd", 0.0),)),
    )

    def __init__(self) -> None:
        super().__init__(["Hé", "", "日"])

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        entries = iter(self.LOGPROBS if request.sampling.logprobs is not None else [()] * 3)
        async with aclosing(super().stream(request)) as deltas:
            async for delta in deltas:
                one = next(entries)
                yield replace(delta, logprobs=(one,) if isinstance(one, TokenLogprob) else ())


def token(text: str, logprob: float, *top: dict[str, Any]) -> dict[str, Any]:
    text_bytes = None if text == "\ufffd" else list(text.encode())
    return {"token": text, "logprob": logprob, "bytes": text_bytes, "top_logprobs": list(top)}


def one_of_the_best(text: str, logprob: float) -> dict[str, Any]:
    return {name: value for name, value in token(text, logprob).items() if name != "top_logprobs"}


ENTRIES = [
    token("Hé", -0.25, one_of_the_best("Hé", -0.25), one_of_the_best("Ho", -1.5)),
    token("\ufffd", -3.5, one_of_the_best(" ", -0.5), one_of_the_best("\ufffd", -3.5)),
    token("\ufffd", 0.0, one_of_the_best("\ufffd", 0.0)),
]
ASKING = {**HELLO, "logprobs": True, "top_logprobs": 2}


@in_virtual_time
async def test_a_whole_answer_has_log_probabilities_for_each_token() -> None:
    async with open_service(Unsure()) as service:
        body = (await service.browser().post(PATH, json=ASKING)).json()
    (choice,) = strictly(ChatCompletion, body).choices
    assert choice.message.content == "Hé日"
    assert choice.logprobs.model_dump() == {"content": ENTRIES, "refusal": None}


@in_virtual_time
async def test_log_probabilities_are_streamed_with_their_step_even_if_the_text_is_withheld() -> None:
    async with open_service(Unsure()) as service:
        stream = await service.browser().post(PATH, json={**ASKING, "stream": True})
    events = parse_events(stream.text.removesuffix("data: [DONE]\n\n"))
    choices = [strictly(ChatCompletionChunk, event.data).choices[0] for event in events]
    assert [choice.delta.content for choice in choices] == ["", "Hé", "", "日", None]
    streamed = [choice.logprobs and choice.logprobs.model_dump() for choice in choices]
    assert streamed == [None, *({"content": [one], "refusal": None} for one in ENTRIES), None]


@in_virtual_time
async def test_log_probabilities_are_sent_only_on_request() -> None:
    async with open_service(Unsure()) as service:
        whole = (await service.browser().post(PATH, json=HELLO)).json()
        stream = await service.browser().post(PATH, json={**HELLO, "stream": True})
    assert whole["choices"][0]["logprobs"] is None
    choices = [event.data["choices"][0] for event in parse_events(stream.text.removesuffix("data: [DONE]\n\n"))]
    assert [(choice["delta"].get("content"), choice["logprobs"]) for choice in choices] == [
        ("", None), ("Hé", None), ("日", None), (None, None)
    ]  # fmt: skip


@pytest.mark.anyio
async def test_an_engine_without_log_probabilities_refuses_them_by_name() -> None:
    with serve(ChatStream(engine=MockEngine("echo", time_per_token_s=0.0))) as server:
        async with async_client(server) as client:
            with pytest.raises(openai.BadRequestError) as refusal:
                await client.chat.completions.create(**{**HELLO, "model": "mock-echo"}, logprobs=True)
    assert (refusal.value.param, refusal.value.code) == ("logprobs", "unsupported_parameter")


NEUTRAL: dict[str, Any] = {
    "n": 1, "frequency_penalty": 0, "presence_penalty": 0.0, "logprobs": False, "top_logprobs": 0, "logit_bias": {},
    "response_format": {"type": "text"}, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True,
    "resumable": False, "store": False, "service_tier": "auto", "metadata": {"a": "b"}, "user": "a user",
    "safety_identifier": "x", "prompt_cache_key": "y",
}  # fmt: skip


@in_virtual_time
async def test_a_neutral_value_and_null_are_accepted() -> None:
    async with open_service() as service:
        for more in (NEUTRAL, dict.fromkeys([*NEUTRAL, "stream", "stream_options", "stop", "max_tokens", "priority"])):
            response = await service.browser().post(PATH, json={**HELLO, **more})
            assert response.status_code == 200, response.text


@pytest.mark.parametrize(
    ("more", "code", "param"),
    [
        ({"n": 2}, "unsupported_parameter", "n"),
        ({"logit_bias": {"1": 5}}, "unsupported_parameter", "logit_bias"),
        ({"response_format": {"type": "json_object"}}, "unsupported_parameter", "response_format"),
        ({"tools": [{"type": "function"}]}, "unsupported_parameter", "tools"),
        ({"tool_choice": "required"}, "unsupported_parameter", "tool_choice"),
        ({"resumable": True}, "unsupported_parameter", "resumable"),
        ({"store": True}, "unsupported_parameter", "store"),
        ({"service_tier": "priority"}, "unsupported_parameter", "service_tier"),
        ({"functions": []}, "unsupported_parameter", "functions"),
        ({"reasoning_effort": "high"}, "unsupported_parameter", "reasoning_effort"),
        ({"temprature": 1}, "unsupported_parameter", "temprature"),
        ({"messages": [{"role": "user", "content": "x", "name": "bob"}]}, "unsupported_parameter", "messages[0].name"),
        ({"messages": [{"role": "user", "content": "x", "a b": "c"}]}, "unsupported_parameter", "messages[0].a b"),
        ({"stream_options": {"include_usage": True}}, "invalid_request", "stream_options"),
        ({"stream": "yes"}, "invalid_request", "stream"),
        ({"max_tokens": 0}, "invalid_request", "max_tokens"),
        ({"max_tokens": 2**40}, "invalid_request", "max_tokens"),
        ({"max_completion_tokens": "5"}, "invalid_request", "max_completion_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "invalid_request", "max_tokens"),
        ({"temperature": 2.01}, "invalid_request", "temperature"),
        ({"temperature": -1}, "invalid_request", "temperature"),
        ({"top_p": 2}, "invalid_request", "top_p"),
        ({"top_k": 0}, "invalid_request", "top_k"),
        ({"min_p": 1.1}, "invalid_request", "min_p"),
        ({"repetition_penalty": 0}, "invalid_request", "repetition_penalty"),
        ({"frequency_penalty": 2.1}, "invalid_request", "frequency_penalty"),
        ({"presence_penalty": -2.1}, "invalid_request", "presence_penalty"),
        ({"logprobs": 1}, "invalid_request", "logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "invalid_request", "top_logprobs"),
        ({"logprobs": True, "top_logprobs": -1}, "invalid_request", "top_logprobs"),
        ({"top_logprobs": 3}, "invalid_request", "top_logprobs"),
        ({"logprobs": False, "top_logprobs": 3}, "invalid_request", "top_logprobs"),
        ({"seed": "x"}, "invalid_request", "seed"),
        ({"stop": [""]}, "invalid_request", "stop"),
        ({"user": "x" * 300}, "invalid_request", "user"),
        ({"max_wait_seconds": 0}, "invalid_request", "max_wait_seconds"),
        ({"messages": []}, "invalid_request", "messages"),
        ({"messages": None}, "invalid_request", "messages"),
        ({"messages": ["hello"]}, "invalid_request", "messages[0]"),
        ({"messages": [{"role": "user"}]}, "invalid_request", "messages[0].content"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "invalid_request", "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
            "invalid_request",
            "messages[0].content[0].type",
        ),
        ({"model": None}, "invalid_request", "model"),
    ],
)
@in_virtual_time
async def test_an_unsupported_parameter_is_refused_by_name_without_work(
    more: dict[str, Any], code: str, param: str
) -> None:
    async with open_service() as service:
        response = await service.browser().post(PATH, json={**HELLO, **more})
        assert response.status_code == 400
        error = response.json()["error"]
        assert (error["code"], error["param"], error["type"]) == (code, param, "invalid_request_error")
        assert param in error["message"]
        assert (service.engine.num_prepared, service.chat_stream.stats().received) == (0, 0)


@in_virtual_time
async def test_model_and_messages_are_required() -> None:
    async with open_service() as service:
        for missing in ("model", "messages"):
            response = await service.browser().post(PATH, json={k: v for k, v in HELLO.items() if k != missing})
            assert (response.status_code, response.json()["error"]["param"]) == (400, missing)


@in_virtual_time
async def test_an_unavailable_engine_is_a_503_with_retry_after() -> None:
    async with open_service(FakeEngine([EngineUnavailable("the engine was lost")])) as service:
        response = await service.browser().post(PATH, json=HELLO)
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "engine_unavailable"
        assert 1 <= int(response.headers["retry-after"]) <= 120


@in_virtual_time
async def test_queue_timeout_is_a_429_for_a_whole_answer_and_an_error_chunk_in_a_stream() -> None:
    async with open_service() as service:
        await service.occupy()
        whole = await service.browser().post(PATH, json={**HELLO, "max_wait_seconds": 3})
        assert (whole.status_code, whole.json()["error"]["code"]) == (429, "queue_timeout")
        assert 1 <= int(whole.headers["retry-after"]) <= 120
        stream = await service.browser().post(PATH, json={**HELLO, "max_wait_seconds": 3, "stream": True})
        assert stream.status_code == 200
        assert parse_events(stream.text)[-1].data["error"]["code"] == "queue_timeout"
        assert asyncio.get_running_loop().time() == pytest.approx(6.0, abs=0.1)


@in_virtual_time
async def test_a_cancelled_whole_answer_is_a_409() -> None:
    async with open_service() as service:
        async with Raw(service.app, PATH, HANG) as call:
            await call.until(lambda: service.chat_stream.requests())
            (view,) = service.chat_stream.requests()
            assert (await service.browser().delete(f"/requests/{view.request_id}")).status_code == 204
            await call.until(lambda: call.is_complete)
        assert call.status == 409
        assert json.loads(call.body)["error"]["code"] == "cancelled"


@in_virtual_time
async def test_the_client_in_the_queue_is_the_key_else_the_named_user_else_the_address() -> None:
    for access, headers, user, client in (
        (AccessSettings(api_keys=("k",)), {"authorization": "Bearer k"}, "u", "key:"),
        (AccessSettings(), {"authorization": "Bearer k"}, "u", "user:u"),
        (AccessSettings(), {}, None, "address:127.0.0.1"),
    ):
        async with open_service(access=access) as service:
            async with Raw(service.app, PATH, {**HANG, "stream": True, "user": user}, headers=headers) as call:
                await call.until(lambda call=call: call.body)  # type: ignore[misc]
                (view,) = service.chat_stream.requests()
                assert view.client.startswith(client)
                assert "Bearer" not in view.client
