"""The HTTP interface of ChatStream 0.3: its wire format, its callback messages, and its queue figures."""

from __future__ import annotations

from typing import Any

from chatstream.errors import QueueTimeout
from chatstream.legacy import FINISH_TOKEN
from chatstream.runtime import End
from chatstream.scheduler import SchedulerStats
from chatstream.types import Done, Failed, StreamEvent, Token


class LegacyFraming:
    """The wire format of ChatStream 0.3: for each token the whole answer so far, trimmed, and a finish token.

    It has no frame for errors: after an error the connection is broken, so that no client takes the answer for
    complete. Keeps state; create one per response.
    """

    media_type = "text/plain; charset=utf-8"
    keepalive = b""
    closing_bytes: bytes | None = None
    max_parts = 0

    def __init__(self) -> None:
        self._answer = ""
        self._has_written = False

    def encode(self, event: StreamEvent, event_id: int, skip_parts: int = 0) -> bytes | None:
        match event:
            case Token():
                self._answer += event.text
                return self._piece()
            case Done() if not self._has_written:
                return self._piece()  # with an empty body the browser client of 0.3 would wait forever
            case Failed():
                return None
        return b""

    def _piece(self) -> bytes:
        self._has_written = True
        return (self._answer.strip() + FINISH_TOKEN).encode()


def callback_message(end: End) -> str:
    """The message that 0.3 passes to its callback for this end of a request."""
    if isinstance(end.event, Done):
        return "success"
    if end.by in ("client_disconnected", "slow_reader"):
        return f"client_disconnected_{'while' if end.has_started else 'before'}_streaming"
    if isinstance(end.event.error, QueueTimeout):
        return "queue_timeout"
    if end.by and end.by != "refused":
        return "cancelled"
    return f"unknown_error_occurred,{end.event.error.message}"


def load_body(name: str, stats: SchedulerStats) -> dict[str, Any]:
    """The body of `GET /get_load`: running and waiting requests, and their limits."""
    num_next = min(stats.waiting, 1)
    worker = {
        "name": name,
        "processing": stats.running,
        "waiting": stats.waiting,
        "_num_of_next_queue": num_next,
        "_num_of_request_queue": stats.waiting - num_next,
        "max_processing": stats.max_concurrency,
        "max_waiting": stats.max_queue_size,
    }
    return {"success": True, "message": "success", "chatstream_workers": [worker]}
