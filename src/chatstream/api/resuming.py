"""`GET /requests/{request_id}/stream`: continues a stream in a later response, in the wire format of the first one."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from chatstream.api.framing import Framing
from chatstream.api.streaming import RequestStreamResponse
from chatstream.chat_stream import ChatStream
from chatstream.errors import InvalidRequest, UnsupportedParameter
from chatstream.runtime import RequestStream
from chatstream.runtime.resumable import not_resumable

LAST_EVENT_ID = "Last-Event-ID"


@dataclass(frozen=True, slots=True)
class _FirstResponse:
    """Properties of the first response that a later one repeats or checks."""

    framing: Framing
    headers: Mapping[str, str]
    owner: str
    """Id of the API key that sent the request; empty without keys: knowing the request id is enough."""


def check_resumable(chat_stream: ChatStream, framing: Framing | None = None) -> None:
    """Raises `UnsupportedParameter` if a stream cannot be resumed. Call it before the request is submitted."""
    if chat_stream.runtime_settings.resume_grace_s == 0:
        raise UnsupportedParameter("resumable is switched off on this server", param="resumable")
    if framing is not None and not framing.max_parts:
        raise UnsupportedParameter("resumable needs Accept: text/event-stream", param="resumable")


def make_resumable(
    chat_stream: ChatStream, stream: RequestStream, framing: Framing, headers: Mapping[str, str], owner: str
) -> None:
    """Let the request outlive its connection from now on. Call it just before the headers with its id are sent."""
    chat_stream.resumables.keep(stream, _FirstResponse(framing, headers, owner))


def resume_response(chat_stream: ChatStream, request: Request) -> Response:
    """Respond with all events after `Last-Event-ID`, or from the first one.

    Raises `Unauthorized`, `NotFound`, or `InvalidRequest` for a `Last-Event-ID` that cannot be continued.
    """
    caller = chat_stream.access.identify(request)
    request_id = request.path_params["request_id"]
    first = chat_stream.resumables.find(request_id)
    if not isinstance(first, _FirstResponse) or first.owner != caller.key_id:
        raise not_resumable()
    event_id, skip_parts = _last_event_id(request, first.framing.max_parts)
    if request.method == "HEAD":  # does not replace the current reader
        return Response(headers=dict(first.headers), media_type=first.framing.media_type)
    chat_stream.resend_position(request_id)
    try:
        stream = chat_stream.resumables.attach(request_id, event_id, has_whole_event=not skip_parts)
    except InvalidRequest as error:
        raise InvalidRequest(f"{LAST_EVENT_ID}: {error.message}", param=LAST_EVENT_ID) from error
    if stream.is_exhausted:
        stream.close()
        return Response(status_code=204)  # an EventSource does not reconnect after it
    return RequestStreamResponse(
        stream, first.framing, chat_stream.runtime_settings, first.headers, skip_parts=skip_parts
    )


def _last_event_id(request: Request, max_parts: int) -> tuple[int, int]:
    """Return the newest event that the client has received, and the number of its parts; 0: the whole event."""
    given = request.headers.get(LAST_EVENT_ID, "")
    found = re.fullmatch(r"(0|[1-9][0-9]{0,14})(?:\.([1-9]))?", given or "0", re.ASCII)
    if found is None or int(found[2] or 0) >= max_parts:
        raise InvalidRequest(f"{LAST_EVENT_ID}: {given[:40]!r} is not an id of this stream", param=LAST_EVENT_ID)
    return int(found[1]), int(found[2] or 0)
