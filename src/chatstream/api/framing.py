"""Events of a request to bytes, one class per wire format. Pure."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic_core import to_json

from chatstream.types import Done, Failed, Queued, Started, StreamEvent, Token


class Framing(Protocol):
    """Encodes one stream in one wire format."""

    media_type: str
    keepalive: bytes
    """Sent while no event happens; empty if the format has no comments."""
    closing_bytes: bytes | None
    """Sent to a reader that another reader has replaced. None: the format cannot express it; break the connection."""
    max_parts: int
    """Server-sent events per stream event, at most. 0: the format has no ids, so the stream cannot be resumed."""

    def encode(self, event: StreamEvent, event_id: int, skip_parts: int = 0) -> bytes | None:
        """Return the event's bytes, possibly empty. None: the format cannot express it; break the connection.

        When an event makes several server-sent events, the last one has the event's number as id, the others the number
        and a part: "7.1", "7.2", "7". So `Last-Event-ID` names the exact point; `skip_parts` parts are omitted.
        """


class NativeFraming:
    """Server-sent events `queued`, `started`, `token`, `done`, `error`, each with an id."""

    media_type = "text/event-stream"
    keepalive = b": keep-alive\n\n"
    max_parts = 1
    closing_bytes: bytes | None = b""  # without `done` or `error` a client can see that the stream is incomplete

    def encode(self, event: StreamEvent, event_id: int, skip_parts: int = 0) -> bytes:
        # JSON contains no raw line breaks, so one `data:` line is enough.
        return b"event: %b\ndata: %b\nid: %d\n\n" % (event.type.encode(), to_json(event_data(event)), event_id)


def event_data(event: StreamEvent) -> dict[str, Any]:
    """The event's fields on the wire, the same in every format."""
    match event:
        case Queued():
            return {
                "request_id": event.request_id,
                "position": event.position,
                "position_kind": event.position_kind,
                "eta_seconds": event.eta_seconds,
                "eta_p90_seconds": event.eta_p90_seconds,
                "waits_for": event.waits_for,
            }
        case Started():
            return {"request_id": event.request_id, "waited_seconds": round(event.waited_seconds, 3)}
        case Token():
            return {"text": event.text}
        case Done():
            return {
                "request_id": event.request_id,
                "message_id": event.message_id,
                "finish_reason": event.finish_reason,
                "usage": {
                    "prompt_tokens": event.usage.prompt_tokens,
                    "completion_tokens": event.usage.completion_tokens,
                },
            }
        case Failed():
            return {"code": event.error.code, "message": event.error.message}
