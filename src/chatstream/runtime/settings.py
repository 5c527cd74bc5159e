"""Buffers, intervals and timeouts of the streams."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.checks import check_int, check_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """Checked at construction; a wrong value raises `ConfigError` that names the setting."""

    max_buffered_tokens: int = 256
    """Deltas that a reader may lag behind before its generation pauses."""
    reader_stall_timeout_s: float | None = 15.0
    """Disconnect a client that reads nothing for this long, waiting or streaming. None: never."""
    position_interval_s: float = 1.0
    """Shortest time between two positions sent for one request; changes in between are merged."""
    keepalive_s: float = 15.0
    """Send a comment this often on a silent connection, so that proxies keep it open."""
    resume_grace_s: float = 30.0
    """How long a resumable request continues without a connection, and how long its answer is kept after its end.

    Longer than a phone needs to change networks, shorter than an abandoned request may keep a slot. 0: no request is
    resumable."""
    max_resume_bytes_per_request: int = 4_000_000
    """Memory for the events of one answer, about 35,000 tokens; beyond it the oldest events are dropped."""
    max_resume_bytes: int = 64_000_000
    """Memory for the events of all resumable requests; beyond it the answers that ended first are dropped."""

    def __post_init__(self) -> None:
        for name in ("max_buffered_tokens", "max_resume_bytes_per_request", "max_resume_bytes"):
            check_int(name, getattr(self, name), at_least=1)
        check_seconds("reader_stall_timeout_s", self.reader_stall_timeout_s, or_none=True)
        for name in ("position_interval_s", "keepalive_s"):
            check_seconds(name, getattr(self, name))
        check_seconds("resume_grace_s", self.resume_grace_s, at_least=0)
