"""What happens to a request, as bytes: one class a wire format. Pure."""

from __future__ import annotations

from typing import Any, Protocol

from pydantic_core import to_json

from chatstream.types import Done, Failed, Queued, Started, StreamEvent, Token


class Framing(Protocol):
    """One stream's way of writing."""

    media_type: str
    keepalive: bytes
    """Sent when nothing happened for a while; empty where the format has no room for it."""
    closing_bytes: bytes | None
    """The last bytes for a reader whose stream goes on without it. None: the format cannot say this; break the
    connection."""
    max_parts: int
    """Server-sent events that one of ours makes at most. 0: they have no ids, and the stream cannot be resumed."""

    def encode(self, event: StreamEvent, event_id: int, parts_taken: int = 0) -> bytes | None:
        """The event's bytes, possibly none. None itself: the format cannot say this; break the connection.

        Of an event that makes several server-sent ones the last has its number as id, those before it the number and a
        part: "7.1", "7.2", "7". So a client says exactly where its connection broke; `parts_taken` are left out.
        """


class NativeFraming:
    """Server-sent events `queued`, `started`, `token`, `done`, `error`, each with an id."""

    media_type = "text/event-stream"
    keepalive = b": keep-alive\n\n"
    max_parts = 1
    closing_bytes: bytes | None = b""  # whoever has seen neither `done` nor `error` knows that this is not the end

    def encode(self, event: StreamEvent, event_id: int, parts_taken: int = 0) -> bytes:
        # No line break can be in JSON, so this is all of the format that is needed.
        return b"event: %b\ndata: %b\nid: %d\n\n" % (event.type.encode(), to_json(event_data(event)), event_id)


def event_data(event: StreamEvent) -> dict[str, Any]:
    """What an event says on the wire, whatever its frame."""
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
