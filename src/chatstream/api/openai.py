"""The OpenAI-compatible endpoints `/v1/chat/completions` and `/v1/models`: schema mapping only.

A parameter that cannot be honoured is refused by name, never ignored; a value without an effect (`n=1`, `tools=[]`) is
accepted. While a stream waits, SSE comments report its position; clients ignore comments.
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
from chatstream.api.resuming import check_resumable, make_resumable
from chatstream.api.streaming import RequestStreamResponse, cancel_on_disconnect
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
    # Fields of this server's own answers: clients send an assistant message back as they received it.
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
    """Body of `POST /v1/chat/completions`."""

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
    # Accepted with the values in `_NEUTRAL` only, or without effect.
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
        # The fields have the names of `SamplingParams`, except `logprobs`, which is two fields here.
        common = {*SamplingParams.__dataclass_fields__} - {"logprobs"}
        given = self.model_dump(include=common, exclude_none=True)
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
            # The headers carry the request id and are sent with the whole answer: there would be nothing to resume.
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
"""Values that are accepted because they change nothing."""


class ChunkFraming:
    """Chat completion chunks; comments (and, on request, named events) while the request waits."""

    media_type = "text/event-stream"
    keepalive = b": keep-alive\n\n"
    closing_bytes: bytes | None = None  # many clients take any regular end of the body for the end of the answer
    max_parts = 3

    def __init__(
        self, request_id: str, model: str, *, with_usage: bool, with_queue_events: bool, with_ids: bool = False
    ) -> None:
        self._head = _head(request_id, model, "chat.completion.chunk")
        self._with_usage = with_usage
        self._with_queue_events = with_queue_events
        self._with_ids = with_ids

    def encode(self, event: StreamEvent, event_id: int, skip_parts: int = 0) -> bytes:
        parts = list(self._parts(event))
        frames = []
        for n, (name, data) in enumerate(parts, start=1):
            part_id = str(event_id) if n == len(parts) else f"{event_id}.{n}"
            frames.append(format_sse_event(event=name, data_str=data, id=part_id if self._with_ids else None))
        return _comment(event) + b"".join(frames[skip_parts:])

    def _parts(self, event: StreamEvent) -> Iterator[tuple[str | None, str]]:
        """Yield (name, data) of each server-sent event."""
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
    """The position and ETA as an SSE comment, which clients ignore; empty for other events."""
    if not isinstance(event, Queued):
        return b""
    eta = "" if event.eta_seconds is None else f" eta={event.eta_seconds}"
    kind = "" if event.position_kind == "exact" else f" kind={event.position_kind}"
    return format_sse_event(comment=f"queued position={event.position}{eta}{kind}")


def create_openai_router(chat_stream: ChatStream) -> APIRouter:
    router = APIRouter()

    @answering_errors(openai_body)
    async def chat_completions(request: Request) -> Response:
        """Complete a conversation, as in the OpenAI API: in one response, or with `stream` as it is generated."""
        chat_stream.access.identify(request)
        params = parse_body(ChatCompletionBody, await read_body(request, chat_stream.max_body_bytes))
        params.refuse_unsupported()
        if params.resumable:
            check_resumable(chat_stream)
        if params.model != chat_stream.engine.model_name:
            raise NotFound(
                f"no model {params.model!r} here; this server has {chat_stream.engine.model_name!r}", param="model"
            )
        caller = chat_stream.access.identify(request, user=params.user)
        stream = await chat_stream.submit(
            ChatRequest(
                messages=tuple(message.to_message() for message in params.messages),
                sampling=params.sampling(),
                client=caller.client,
                owner=caller.key_id,
                priority=params.priority or 0,
                max_wait_s=params.max_wait_seconds,
                sent_as={"max_new_tokens": "max_completion_tokens" if params.max_tokens is None else "max_tokens"},
            )
        )
        headers = {"X-ChatStream-Request-Id": stream.request_id}
        if not params.stream:
            return await _whole(request, stream, params.model, headers)
        raise_early_end(stream)
        framing = ChunkFraming(
            stream.request_id,
            params.model,
            with_usage=params.stream_options is not None and bool(params.stream_options.include_usage),
            with_queue_events=request.headers.get("x-chatstream-queue-events") == "1",
            with_ids=bool(params.resumable),
        )
        if params.resumable:
            make_resumable(chat_stream, stream, framing, headers, caller.key_id)
        return RequestStreamResponse(stream, framing, chat_stream.runtime_settings, headers)

    @answering_errors(openai_body)
    async def models(request: Request) -> Response:
        """List the one model of this server."""
        chat_stream.access.identify(request)
        return JSONResponse({"object": "list", "data": [_model(chat_stream)]})

    @answering_errors(openai_body)
    async def model(request: Request) -> Response:
        """Return the model with this name."""
        chat_stream.access.identify(request)
        if request.path_params["model"] != chat_stream.engine.model_name:
            raise NotFound("no such model", param="model")
        return JSONResponse(_model(chat_stream))

    add_endpoint(router, "POST", "/v1/chat/completions", chat_completions, ChatCompletionBody)
    add_endpoint(router, "GET", "/v1/models", models)
    add_endpoint(router, "GET", "/v1/models/{model:path}", model)
    return router


async def _whole(request: Request, stream: RequestStream, model: str, headers: dict[str, str]) -> Response:
    """Wait for the whole answer; release the position or slot if the client disconnects first."""
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
    """None if none were requested or no token was generated."""
    if not logprobs:
        return None
    content = [
        {**_token(one.token, one.logprob), "top_logprobs": [_token(token, logprob) for token, logprob in one.top]}
        for one in logprobs
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    # The bytes of a partial character are unknown; those of the replacement character would be wrong.
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
