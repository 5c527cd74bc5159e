"""The backends of `chatstream chat`: a model in this process, or a server. Knows no terminal."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import httpx2

from chatstream.chat_stream import ChatRequest, ChatStream
from chatstream.errors import ChatStreamError
from chatstream.types import (
    Done,
    Failed,
    FinishReason,
    Message,
    PositionKind,
    Queued,
    Started,
    StreamEvent,
    Token,
    Usage,
)

_CONNECT_TIMEOUT_S = 10.0
_SILENCE_TIMEOUT_S = 60.0
"""A ChatStream server sends at least a comment every 15 seconds."""


class ChatBackend(Protocol):
    """Answers the messages of one conversation and keeps its history."""

    name: str

    async def open(self) -> None:
        """Load the model or reach the server. Raises `ChatStreamError`."""

    def ask(self, message: str | None) -> AsyncGenerator[StreamEvent, None]:
        """Answer a message; None: answer the last one again. Raises `ChatStreamError` if the request is refused.

        The last event is `Done` or `Failed`. `aclose` cancels the request.
        """

    async def reset(self) -> None:
        """Start a new conversation."""

    async def close(self) -> None: ...


class LocalBackend:
    """A `ChatStream` in this process."""

    _CONVERSATION = "terminal"

    def __init__(self, chat_stream: ChatStream) -> None:
        self.name = chat_stream.engine.model_name
        self._chat_stream = chat_stream

    async def open(self) -> None:
        await self._chat_stream.start_queue_worker()

    async def ask(self, message: str | None) -> AsyncGenerator[StreamEvent, None]:
        stream = await self._chat_stream.submit(
            ChatRequest(
                messages=() if message is None else (Message("user", message),),
                conversation=self._CONVERSATION,
                regenerate=message is None,
                client="terminal",
            )
        )
        try:
            async for event in stream:
                yield event
        finally:
            stream.close()

    async def reset(self) -> None:
        await self._chat_stream.forget(self._CONVERSATION)

    async def close(self) -> None:
        await self._chat_stream.stop_queue_worker(0.0)


class ServerBackend:
    """A ChatStream server, over its native API. The server keeps the conversation, under its session cookie."""

    def __init__(self, url: str, *, api_key: str | None = None, sampling: dict[str, Any] | None = None) -> None:
        """`sampling`: fields of `POST /chat_stream` sent with every message. Raises `ChatStreamError` for a bad URL."""
        self.name = url
        self._sampling = sampling or {}
        with self._as_our_errors():
            self._http = httpx2.AsyncClient(
                base_url=url.rstrip("/") + "/",
                headers={"Authorization": f"Bearer {api_key}"} if api_key else {},
                timeout=httpx2.Timeout(_SILENCE_TIMEOUT_S, connect=_CONNECT_TIMEOUT_S),
            )

    async def open(self) -> None:
        with self._as_our_errors():
            response = await self._http.get("health/live")
        if not response.is_success:
            raise self._is_no_server()

    async def ask(self, message: str | None) -> AsyncGenerator[StreamEvent, None]:
        body = {"user_input": message, "regenerate": message is None, **self._sampling}
        headers = {"Accept": "text/event-stream"}
        with self._as_our_errors():
            async with self._http.stream("POST", "chat_stream", json=body, headers=headers) as response:
                if response.status_code != 200:
                    raise _refusal(response.status_code, await response.aread(), response.headers.get("retry-after"))
                async for event in httpx2.EventSource(response):
                    yield _event(event.event, json.loads(event.data))
                    if event.event in ("done", "error"):
                        return
        raise ChatStreamError(f"{self.name} ended the connection before the answer was complete")

    async def reset(self) -> None:
        with self._as_our_errors():
            response = await self._http.post("clear_context")
        if not response.is_success:
            raise _refusal(response.status_code, response.content, response.headers.get("retry-after"))

    async def close(self) -> None:
        await self._http.aclose()

    @contextmanager
    def _as_our_errors(self) -> Iterator[None]:
        try:
            yield
        except httpx2.SSEError as error:
            raise self._is_no_server() from error
        except (httpx2.HTTPError, httpx2.InvalidURL) as error:
            raise ChatStreamError(f"cannot reach {self.name}: {error or type(error).__name__}") from error

    def _is_no_server(self) -> ChatStreamError:
        return ChatStreamError(f"there is no ChatStream server at {self.name}")


def _event(kind: str, data: dict[str, Any]) -> StreamEvent:
    match kind:
        case "queued":
            position_kind: PositionKind = "estimate" if data.get("position_kind") == "estimate" else "exact"
            return Queued(
                data["request_id"],
                data["position"],
                data["eta_seconds"],
                data["eta_p90_seconds"],
                position_kind,
                data.get("waits_for", "slot"),
            )
        case "started":
            return Started(data["request_id"], data["waited_seconds"])
        case "token":
            return Token(data["text"])
        case "done":
            reason, usage = FinishReason(data["finish_reason"]), Usage(**data["usage"])
            return Done(data["request_id"], data["message_id"], reason, usage)
        case _:
            return Failed("", ChatStreamError(data["message"]))


def _refusal(status: int, body: bytes, retry_after: str | None) -> ChatStreamError:
    """The server's error message, from a native or an OpenAI body; the status if there is none."""
    try:
        fields = json.loads(body)
        error = fields.get("error")
        message = fields.get("message") or error["message"]
    except (ValueError, AttributeError, TypeError, KeyError):
        message = f"the server answered with status {status}"
    has_seconds = retry_after is not None and retry_after.isdigit()
    return ChatStreamError(message, retry_after_s=float(retry_after or 0) if has_seconds else None)
