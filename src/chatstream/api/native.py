"""`/chat_stream`: one conversation per browser session. Requests are cancelled and resumed by id."""

from __future__ import annotations

import inspect
import uuid
from collections.abc import Callable
from typing import Any

from fastapi import APIRouter
from pydantic import Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from chatstream.api.bodies import Body, StopStrings, parse_body, read_body
from chatstream.api.errors import answering_errors, native_body, raise_early_end
from chatstream.api.framing import Framing, NativeFraming
from chatstream.api.legacy import LegacyFraming, callback_message
from chatstream.api.openapi import add_endpoint
from chatstream.api.resuming import check_resumable, make_resumable, resume_response
from chatstream.api.streaming import RequestStreamResponse
from chatstream.chat_stream import ChatRequest, ChatStream
from chatstream.errors import InvalidRequest, NotFound
from chatstream.runtime import End
from chatstream.types import Message, SamplingParams


class ChatBody(Body):
    """Body of `POST /chat_stream`."""

    user_input: str | None = None
    regenerate: bool | None = None
    max_new_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    seed: int | None = None
    stop: StopStrings | None = None
    priority: int | None = None
    max_wait_seconds: float | None = Field(None, gt=0, allow_inf_nan=False)
    resumable: bool | None = None

    def sampling(self) -> dict[str, Any]:
        return self.model_dump(include={*SamplingParams.__dataclass_fields__}, exclude_none=True)


async def chat_stream_response(
    chat_stream: ChatStream,
    request: Request,
    request_body: bytes | str | None,
    callback: Callable[[Request, str], object] | None,
) -> Response:
    """See `ChatStream.handle_chat_stream_request`. Errors become responses here: a host's endpoint calls this."""

    @answering_errors(native_body)
    async def answer(request: Request) -> Response:
        caller = chat_stream.access.identify(request)
        body = await read_body(request, chat_stream.max_body_bytes) if request_body is None else request_body
        params = parse_body(ChatBody, body)
        if not params.regenerate and not (params.user_input or "").strip():
            raise InvalidRequest("user_input must not be empty", param="user_input")
        framing: Framing = NativeFraming() if _accepts_events(request) else LegacyFraming()
        if params.resumable:
            check_resumable(chat_stream, framing)
        session_id = chat_stream.access.session_id(request)
        message_id = str(uuid.uuid4())
        stream = await chat_stream.submit(
            ChatRequest(
                messages=() if params.regenerate else (Message("user", params.user_input or ""),),
                conversation=chat_stream.access.conversation_key(request, session_id),
                regenerate=bool(params.regenerate),
                sampling=params.sampling(),
                client=caller.client,
                owner=caller.key_id,
                priority=params.priority or 0,
                max_wait_s=params.max_wait_seconds,
                sent_as={"messages": "user_input"},
            ),
            message_id=message_id,
            on_end=_on_end(callback, request),
        )
        raise_early_end(stream)
        headers = {
            "X-ChatStream-Request-Id": stream.request_id,
            "X-ChatStream-Last-Generated-Message-Id": message_id,
        }
        if params.resumable:
            make_resumable(chat_stream, stream, framing, headers, caller.key_id)
        response = RequestStreamResponse(stream, framing, chat_stream.runtime_settings, headers)
        chat_stream.access.set_session(response, request, session_id)
        return response

    return await answer(request)


def _accepts_events(request: Request) -> bool:
    return "text/event-stream" in request.headers.get("accept", "").lower()


def _on_end(callback: Callable[[Request, str], object] | None, request: Request) -> Callable[[End], object] | None:
    if callback is None:
        return None

    def on_end(end: End) -> object:
        result = callback(request, callback_message(end))
        return result if inspect.iscoroutine(result) else None

    return on_end


def create_native_router(chat_stream: ChatStream) -> APIRouter:
    router = APIRouter()
    access = chat_stream.access

    async def post_chat_stream(request: Request) -> Response:
        """Send a message in the session's conversation and stream the answer as it is generated."""
        return await chat_stream_response(chat_stream, request, None, None)

    @answering_errors(native_body)
    async def clear_context(request: Request) -> Response:
        """Delete the session's conversation. An answer that is being generated is not added to it."""
        access.identify(request)
        key = access.conversation_key(request, access.session_id(request))
        await chat_stream.forget(key)
        return JSONResponse({"success": True, "message": "Context successfully cleared"})

    @answering_errors(native_body)
    async def delete_request(request: Request) -> Response:
        """Cancel a waiting or running request. Idempotent."""
        request_id = request.path_params["request_id"]
        if not _cancel(chat_stream, request, request_id):
            raise NotFound("no such request", param="request_id")
        return Response(status_code=204)

    @answering_errors(native_body)
    async def stream_request(request: Request) -> Response:
        """Continue a resumable stream after the event in the header `Last-Event-ID`; without it, from the start."""
        return resume_response(chat_stream, request)

    add_endpoint(router, "POST", "/chat_stream", post_chat_stream, ChatBody)
    add_endpoint(router, "POST", "/clear_context", clear_context)
    add_endpoint(router, "DELETE", "/requests/{request_id}", delete_request)
    add_endpoint(router, "GET", "/requests/{request_id}/stream", stream_request)
    return router


def _cancel(chat_stream: ChatStream, request: Request, request_id: str) -> bool:
    """Cancel for an administrator or the owner: a caller that knows the id, with the same API key where keys exist."""
    if chat_stream.access.is_admin(request):
        return chat_stream.cancel(request_id, by="admin")
    caller = chat_stream.access.identify(request)
    return chat_stream.cancel(request_id, owner=caller.key_id)
