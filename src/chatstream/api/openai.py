"""The OpenAI-compatible door: `/v1/chat/completions` and `/v1/models`. Schema mapping, nothing else.

A parameter that cannot be honoured is refused by name, never ignored; one that only says what happens anyway
(`n=1`, `tools=[]`) is accepted. While a stream waits, comments say where it stands: clients ignore them.
"""

from __future__ import annotations

import time
from typing import Annotated, Any, Literal

import anyio
from fastapi import APIRouter
from fastapi.sse import format_sse_event
from pydantic import Field
from pydantic_core import to_json
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chatstream.api.bodies import Body, parse_body, read_body
from chatstream.api.errors import answering_errors, openai_body
from chatstream.api.native import as_stop
from chatstream.api.streaming import FollowingResponse, leave_with_client
from chatstream.chat_stream import ChatRequest, ChatStream
from chatstream.errors import Cancelled, InvalidRequest, NotFound, UnsupportedParameter
from chatstream.runtime import RequestStream
from chatstream.types import Done, Failed, Message, Queued, Started, StreamEvent, Token, Usage


class TextPart(Body):
    type: Literal["text"]
    text: str


class ChatMessage(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = None

    def to_message(self) -> Message:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, text)


class StreamOptions(Body):
    include_usage: bool = False
    include_obfuscation: bool = False


class ChatCompletionBody(Body):
    """`POST /v1/chat/completions`."""

    model: str
    messages: list[ChatMessage] = Field(min_length=1)
    stream: bool = False
    stream_options: StreamOptions | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    user: str | None = None
    priority: int = Field(0, ge=-(2**31), le=2**31)
    max_wait_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    # Accepted where they ask for what happens anyway.
    n: int | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    logit_bias: dict[str, float] | None = None
    response_format: dict[str, Any] | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    parallel_tool_calls: bool | None = None
    resumable: bool | None = None
    store: bool | None = None
    metadata: dict[str, str] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

    def sampling(self) -> dict[str, Any]:
        names = ("temperature", "top_p", "top_k", "repetition_penalty", "seed")
        given: dict[str, Any] = {name: getattr(self, name) for name in names if getattr(self, name) is not None}
        limits = {limit for limit in (self.max_tokens, self.max_completion_tokens) if limit is not None}
        if len(limits) > 1:
            raise InvalidRequest("max_tokens and max_completion_tokens differ: give one", param="max_tokens")
        if limits:
            given["max_new_tokens"] = limits.pop()
        return given | as_stop(self.stop)

    def refuse_unsupported(self) -> None:
        for name, neutral in _NEUTRAL.items():
            value = getattr(self, name)
            if value is not None and value not in neutral:
                raise UnsupportedParameter(f"{name} is not supported", param=name)
        if self.stream_options is not None and not self.stream:
            raise InvalidRequest("stream_options needs stream", param="stream_options")


_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "logprobs": (False,),
    "top_logprobs": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "parallel_tool_calls": (True, False),
    "resumable": (False,),
    "store": (False,),
    "service_tier": ("auto", "default"),
}
"""What each of these may say without changing anything."""


class ChunkFraming:
    """Chat completion chunks; comments (and on request named events) while the request waits."""

    media_type = "text/event-stream"
    keepalive = b": keep-alive\n\n"

    def __init__(self, stream: RequestStream, model: str, *, with_usage: bool, with_queue_events: bool) -> None:
        self._head = _head(stream, model, "chat.completion.chunk")
        self._with_usage = with_usage
        self._with_queue_events = with_queue_events

    def encode(self, event: StreamEvent) -> bytes:
        match event:
            case Queued():
                return self._queued(event)
            case Started():
                named = self._named("started", {"request_id": event.request_id, "waited_seconds": event.waited_seconds})
                return named + self._chunk({"role": "assistant", "content": ""}, None)
            case Token():
                return self._chunk({"content": event.text}, None)
            case Done():
                last = self._chunk({}, event.finish_reason)
                if self._with_usage:
                    last += _data({**self._head, "choices": [], "usage": _usage(event.usage)})
                return last + format_sse_event(data_str="[DONE]")
            case Failed():
                return _data(openai_body(event.error))

    def _queued(self, event: Queued) -> bytes:
        eta = "" if event.eta_seconds is None else f" eta={event.eta_seconds}"
        comment = format_sse_event(comment=f"queued position={event.position}{eta}")
        data = {
            "request_id": event.request_id,
            "position": event.position,
            "eta_seconds": event.eta_seconds,
            "eta_p90_seconds": event.eta_p90_seconds,
        }
        return comment + self._named("queued", data)

    def _named(self, name: str, data: dict[str, Any]) -> bytes:
        return format_sse_event(event=name, data_str=to_json(data).decode()) if self._with_queue_events else b""

    def _chunk(self, delta: dict[str, Any], finish_reason: str | None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        usage = {"usage": None} if self._with_usage else {}
        return _data({**self._head, "choices": [choice], **usage})


def create_openai_router(chat_stream: ChatStream) -> APIRouter:
    router = APIRouter()

    @answering_errors(openai_body)
    async def chat_completions(request: Request) -> Response:
        chat_stream.access.identify(request)
        asked = parse_body(ChatCompletionBody, await read_body(request, chat_stream.max_body_bytes))
        asked.refuse_unsupported()
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
                priority=asked.priority,
                max_wait_s=asked.max_wait_seconds,
            )
        )
        headers = {"X-ChatStream-Request-Id": stream.request_id}
        if not asked.stream:
            return await _whole(request, stream, asked.model, headers)
        framing = ChunkFraming(
            stream,
            asked.model,
            with_usage=asked.stream_options is not None and asked.stream_options.include_usage,
            with_queue_events=request.headers.get("x-chatstream-queue-events") == "1",
        )
        return FollowingResponse(stream, framing, chat_stream.runtime_settings, headers)

    @answering_errors(openai_body)
    async def models(request: Request) -> Response:
        chat_stream.access.identify(request)
        return JSONResponse({"object": "list", "data": [_model(chat_stream)]})

    @answering_errors(openai_body)
    async def model(request: Request) -> Response:
        chat_stream.access.identify(request)
        if request.path_params["model"] != chat_stream.engine.model_name:
            raise NotFound("no such model", param="model")
        return JSONResponse(_model(chat_stream))

    router.add_route("/v1/chat/completions", chat_completions, methods=["POST"])
    router.add_route("/v1/models", models, methods=["GET"])
    router.add_route("/v1/models/{model:path}", model, methods=["GET"])
    return router


async def _whole(request: Request, stream: RequestStream, model: str, headers: dict[str, str]) -> Response:
    """Wait for the whole answer; give the place back when the client leaves before."""
    answer = ""
    try:
        async with anyio.create_task_group() as group:
            group.start_soon(leave_with_client, stream, request.receive, group.cancel_scope)
            async for event in stream:
                if isinstance(event, Token):
                    answer += event.text
            group.cancel_scope.cancel()
    finally:
        stream.close("client_disconnected")
    end = stream.end
    if isinstance(end, Failed):
        raise end.error
    if end is None:
        raise Cancelled("the client left")
    message = {"role": "assistant", "content": answer, "refusal": None}
    choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": end.finish_reason}
    body = {**_head(stream, model, "chat.completion"), "choices": [choice], "usage": _usage(end.usage)}
    return Response(to_json(body), media_type="application/json", headers=headers)


def _head(stream: RequestStream, model: str, kind: str) -> dict[str, Any]:
    return {"id": f"chatcmpl-{stream.request_id}", "object": kind, "created": int(time.time()), "model": model}


def _usage(usage: Usage) -> dict[str, int]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
    }


def _model(chat_stream: ChatStream) -> dict[str, Any]:
    return {
        "id": chat_stream.engine.model_name,
        "object": "model",
        "created": 0,
        "owned_by": "chatstream",
        "max_model_len": chat_stream.engine.capacity.context_len,
    }


def _data(body: dict[str, Any]) -> bytes:
    return format_sse_event(data_str=to_json(body).decode())
