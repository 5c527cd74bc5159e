"""A stream that goes on in a later response: `GET /requests/{request_id}/stream`, in the dialect it was asked for."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from starlette.requests import Request
from starlette.responses import Response

from chatstream.api.framing import Framing
from chatstream.api.streaming import FollowingResponse
from chatstream.chat_stream import ChatStream
from chatstream.errors import InvalidRequest, UnsupportedParameter
from chatstream.runtime import RequestStream
from chatstream.runtime.resumable import not_resumable

LAST_EVENT_ID = "Last-Event-ID"


@dataclass(frozen=True, slots=True)
class _Asked:
    """What a later response needs of the first one."""

    framing: Framing
    headers: Mapping[str, str]
    owner: str
    """Which API key; empty without keys: whoever knows the id."""


def check_resumable(chat_stream: ChatStream, framing: Framing | None = None) -> None:
    """Raises `UnsupportedParameter` where a stream cannot be resumed. Cheap: before anything is held."""
    if chat_stream.runtime_settings.resume_grace_s == 0:
        raise UnsupportedParameter("resumable is switched off on this server", param="resumable")
    if framing is not None and not framing.max_parts:
        raise UnsupportedParameter("resumable needs Accept: text/event-stream", param="resumable")


def keep(
    chat_stream: ChatStream, stream: RequestStream, framing: Framing, headers: Mapping[str, str], owner: str
) -> None:
    """From now on the request outlives its connection. Call it when the client is about to be told its id."""
    chat_stream.resumables.keep(stream, _Asked(framing, headers, owner))


def resume_response(chat_stream: ChatStream, request: Request) -> Response:
    """Everything after the event that the client names, or from the first one.

    Raises `Unauthorized`, `NotFound`, and `InvalidRequest` for a `Last-Event-ID` that cannot be continued.
    """
    caller = chat_stream.access.identify(request)
    request_id = request.path_params["request_id"]
    asked = chat_stream.resumables.find(request_id)
    if not isinstance(asked, _Asked) or asked.owner != caller.key_id:
        raise not_resumable()
    event_id, parts_taken = _last_event_id(request, asked.framing.max_parts)
    if request.method == "HEAD":  # takes nothing over
        return Response(headers=dict(asked.headers), media_type=asked.framing.media_type)
    chat_stream.resend_position(request_id)
    try:
        stream = chat_stream.resumables.attach(request_id, event_id, has_whole_event=not parts_taken)
    except InvalidRequest as error:
        raise InvalidRequest(f"{LAST_EVENT_ID}: {error.message}", param=LAST_EVENT_ID) from error
    if stream.is_exhausted:
        stream.close()
        return Response(status_code=204)  # tells an EventSource not to come back
    return FollowingResponse(
        stream, asked.framing, chat_stream.runtime_settings, asked.headers, parts_taken=parts_taken
    )


def _last_event_id(request: Request, max_parts: int) -> tuple[int, int]:
    """The newest event that the client has, and how many parts of it; 0 parts: all of it."""
    given = request.headers.get(LAST_EVENT_ID, "")
    found = re.fullmatch(r"(0|[1-9][0-9]{0,14})(?:\.([1-9]))?", given or "0", re.ASCII)
    if found is None or int(found[2] or 0) >= max_parts:
        raise InvalidRequest(f"{LAST_EVENT_ID}: {given[:40]!r} is not an id of this stream", param=LAST_EVENT_ID)
    return int(found[1]), int(found[2] or 0)
