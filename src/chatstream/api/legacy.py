"""The HTTP interface of ChatStream 0.3: its wire format, the words of its callback, and its numbers of the queue."""

from __future__ import annotations

from typing import Any

from chatstream.errors import QueueTimeout
from chatstream.legacy import FINISH_TOKEN
from chatstream.runtime import End
from chatstream.scheduler import SchedulerStats
from chatstream.types import Done, Failed, StreamEvent, Token


class LegacyFraming:
    """The wire format of ChatStream 0.3: again and again the whole answer so far, trimmed, and a finish token.

    It has no frame for errors: an answer that fails has no end at all, so that no client takes it for complete.
    Has state: make a new one for each response.
    """

    media_type = "text/plain; charset=utf-8"
    keepalive = b""
    closing_bytes: bytes | None = None
    max_parts = 0

    def __init__(self) -> None:
        self._answer = ""
        self._has_written = False

    def encode(self, event: StreamEvent, event_id: int, parts_taken: int = 0) -> bytes | None:
        match event:
            case Token():
                self._answer += event.text
                return self._piece()
            case Done() if not self._has_written:
                return self._piece()  # a body without a byte leaves 0.3's browser client waiting for ever
            case Failed():
                return None
        return b""

    def _piece(self) -> bytes:
        self._has_written = True
        return (self._answer.strip() + FINISH_TOKEN).encode()


def callback_message(end: End) -> str:
    """The original's words for how a request ended."""
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
    """`GET /get_load`: how many requests run and wait, and how many may."""
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
