"""The OpenAI-compatible door: `/v1/chat/completions` and `/v1/models`. Schema mapping, nothing else.

A parameter that cannot be honoured is refused by name, never ignored; one that only says what happens anyway
(`n=1`, `tools=[]`) is accepted. While a stream waits, comments say where it stands: clients ignore them.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter
from fastapi.sse import format_sse_event
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chatstream.api.bodies import Body, StopStrings, parse_body, read_body
from chatstream.api.errors import answering_errors, openai_body, raise_early_end
from chatstream.api.framing import event_data
from chatstream.api.openapi import add_endpoint
from chatstream.api.resuming import check_resumable, keep
from chatstream.api.streaming import FollowingResponse, cancel_on_disconnect
from chatstream.chat_stream import ChatRequest, ChatStream
from chatstream.errors import InvalidRequest, NotFound, UnsupportedParameter
from chatstream.runtime import RequestStream
from chatstream.types import (
    Done,
    Failed,
    Message,
    Queued,
    SamplingParams,
    Started,
    StreamEvent,
    Token,
    TokenLogprob,
    Usage,
)


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    # What an answer of ours holds beside its text: clients send it back as they got it.
    refusal: None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Body):
    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class ChatCompletionBody(Body):
    """`POST /v1/chat/completions`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1, fail_fast=True)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=SamplingParams.MAX_LOGPROBS)] | None = None
    seed: int | None = None
    stop: StopStrings | None = None
    user: str | None = Field(None, max_length=256)
    priority: int | None = None
    max_wait_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    resumable: bool | None = None
    # Accepted where they ask for what happens anyway.
    n: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self) -> dict[str, Any]:
        # Of the same name and meaning but for `logprobs`, which is two fields here.
        same = {*SamplingParams.__dataclass_fields__} - {"logprobs"}
        given = self.model_dump(include=same, exclude_none=True)
        if self.logprobs:
            given["logprobs"] = self.top_logprobs or 0
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InvalidRequest("max_tokens and max_completion_tokens differ: give one", param="max_tokens")
        if limits:
            given["max_new_tokens"] = limits.pop()
        return given

    def refuse_unsupported(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise UnsupportedParameter(f"{name} is not supported", param=name)
        if self.top_logprobs and not self.logprobs:
            raise InvalidRequest("top_logprobs needs logprobs", param="top_logprobs")
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream", param="stream_options")
        if self.resumable and not self.stream:
            # Its id comes with the headers, and those come with the whole answer: there is nothing to come back to.
            raise UnsupportedParameter("resumable needs stream", param="resumable")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""What each of these may say without changing anything."""


class ChunkFraming:
    """Chat completion chunks; comments (and on request named events) while the request waits."""

    media_type = "text/event-stream"
    keepalive = b": keep-alive\n\n"
    closing_bytes: bytes | None = None  # many clients take any proper end for the end of the answer
    max_parts = 3

    def __init__(
        self, request_id: str, model: str, *, with_usage: bool, with_queue_events: bool, with_ids: bool = False
    ) -> None:
        self._head = _head(request_id, model, "chat.completion.chunk")
        self._with_usage = with_usage
        self._with_queue_events = with_queue_events
        self._with_ids = with_ids

    def encode(self, event: StreamEvent, event_id: int, parts_taken: int = 0) -> bytes:
        parts = list(self._parts(event))
        frames = []
        for n, (name, data) in enumerate(parts, start=1):
            part_id = str(event_id) if n == len(parts) else f"{event_id}.{n}"
            frames.append(format_sse_event(event=name, data_str=data, id=part_id if self._with_ids else None))
        return _comment(event) + b"".join(frames[parts_taken:])

    def _parts(self, event: StreamEvent) -> Iterator[tuple[str | None, str]]:
        """(name, data) of each server-sent event."""
        if self._with_queue_events and isinstance(event, Queued | Started):
            yield event.type, _json(event_data(event))
        match event:
            case Started():
                yield None, self._chunk({"role": "assistant", "content": ""}, None)
            case Token():
                yield None, self._chunk({"content": event.text}, None, event.logprobs)
            case Done():
                yield None, self._chunk({}, event.finish_reason)
                if self._with_usage:
                    yield None, _json({**self._head, "choices": [], "usage": _usage(event.usage)})
                yield None, "[DONE]"
            case Failed():
                yield None, _json(openai_body(event.error))

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None, logprobs: Sequence[TokenLogprob] = ()) -> str:
        choice = {"index": 0, "delta": delta, "logprobs": _logprobs(logprobs), "finish_reason": finish_reason}
        usage = {"usage": None} if self._with_usage else {}
        return _json({**self._head, "choices": [choice], **usage})


def _comment(event: StreamEvent) -> bytes:
    """Where it stands, for people: clients ignore it."""
    if not isinstance(event, Queued):
        return b""
    eta = "" if event.eta_seconds is None else f" eta={event.eta_seconds}"
    kind = "" if event.position_kind == "exact" else f" kind={event.position_kind}"
    return format_sse_event(comment=f"queued position={event.position}{eta}{kind}")


def create_openai_router(chat_stream: ChatStream) -> APIRouter:
    router = APIRouter()

    @answering_errors(openai_body)
    async def chat_completions(request: Request) -> Response:
        """Answer a conversation, as in the OpenAI API; whole, or as it is generated."""
        chat_stream.access.identify(request)
        asked = parse_body(ChatCompletionBody, await read_body(request, chat_stream.max_body_bytes))
        asked.refuse_unsupported()
        if asked.resumable:
            check_resumable(chat_stream)
        if asked.model != chat_stream.engine.model_name:
            raise NotFound(
                f"no model {asked.model!r} here; this server has {chat_stream.engine.model_name!r}", param="model"
            )
        caller = chat_stream.access.identify(request, user=asked.user)
        stream = await chat_stream.submit(
            ChatRequest(
                messages=tuple(message.to_message() for message in asked.messages),
                sampling=asked.sampling(),
                client=caller.client,
                owner=caller.key_id,
                priority=asked.priority or 0,
                max_wait_s=asked.max_wait_seconds,
                sent_as={"max_new_tokens": "max_completion_tokens" if asked.max_tokens is None else "max_tokens"},
            )
        )
        headers = {"X-ChatStream-Request-Id": stream.request_id}
        if not asked.stream:
            return await _whole(request, stream, asked.model, headers)
        raise_early_end(stream)
        framing = ChunkFraming(
            stream.request_id,
            asked.model,
            with_usage=asked.stream_options is not None and bool(asked.stream_options.include_usage),
            with_queue_events=request.headers.get("x-chatstream-queue-events") == "1",
            with_ids=bool(asked.resumable),
        )
        if asked.resumable:
            keep(chat_stream, stream, framing, headers, caller.key_id)
        return FollowingResponse(stream, framing, chat_stream.runtime_settings, headers)

    @answering_errors(openai_body)
    async def models(request: Request) -> Response:
        """The one model of this server."""
        chat_stream.access.identify(request)
        return JSONResponse({"object": "list", "data": [_model(chat_stream)]})

    @answering_errors(openai_body)
    async def model(request: Request) -> Response:
        """One model by its name."""
        chat_stream.access.identify(request)
        if request.path_params["model"] != chat_stream.engine.model_name:
            raise NotFound("no such model", param="model")
        return JSONResponse(_model(chat_stream))

    add_endpoint(router, "POST", "/v1/chat/completions", chat_completions, ChatCompletionBody)
    add_endpoint(router, "GET", "/v1/models", models)
    add_endpoint(router, "GET", "/v1/models/{model:path}", model)
    return router


async def _whole(request: Request, stream: RequestStream, model: str, headers: dict[str, str]) -> Response:
    """Wait for the whole answer; give the place back when the client leaves before."""
    answer = ""
    logprobs: list[TokenLogprob] = []
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(cancel_on_disconnect, stream, request.receive, group.cancel_scope.cancel)
            async for event in stream:
                if isinstance(event, Token):
                    answer += event.text
                    logprobs += event.logprobs
            group.cancel_scope.cancel()
    finally:
        stream.close("client_disconnected")
    raise_early_end(stream)
    end = stream.end
    assert isinstance(end, Done)
    message = {"role": "assistant", "content": answer, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": _logprobs(logprobs), "finish_reason": end.finish_reason}
    body = {**_head(stream.request_id, model, "chat.completion"), "choices": [choice], "usage": _usage(end.usage)}
    return Response(to_json(body), media_type="application/json", headers=headers)


def _head(request_id: str, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{request_id}", "object": kind, "created": int(time.time()), "model": model}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _logprobs(logprobs: Sequence[TokenLogprob]) -> dict[str, Any] | None:
    """None where none were asked for, and where no token was generated."""
    if not logprobs:
        return None
    told = [
        {**_token(one.token, one.logprob), "top_logprobs": [_token(token, logprob) for token, logprob in one.top]}
        for one in logprobs
    ]
    return {"content": told, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # Of a part of a character the bytes are not known, and those of the sign in its place would be wrong.
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _model(chat_stream: ChatStream) -> dict[str, Any]:
    return {
        "id": chat_stream.engine.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "chatstream",
        "max_model_len": chat_stream.engine.capacity.context_len,
    }


def _json(body: dict[str, Any]) -> str:
    return to_json(body).decode()
