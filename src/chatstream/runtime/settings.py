"""How streams are told, kept and cut."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.checks import check_int, check_seconds


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeSettings:
    """Checked when built; a wrong value raises `ConfigError` that names it."""

    max_buffered_tokens: int = 256
    """Deltas a reader may lag behind before its generation pauses."""
    reader_stall_timeout_s: float | None = 15.0
    """Cut a reader that takes nothing for so long, while it streams and while it waits. None: never."""
    position_interval_s: float = 1.0
    """A place in line is told at most once in so long; changes in between are merged."""
    keepalive_s: float = 15.0
    """A silent connection carries a comment this often, so that proxies keep it."""
    resume_grace_s: float = 30.0
    """How long a resumable request outlives its connection, and its answer its end: longer than a phone needs to
    change networks, short enough that a slot is not lost to nobody. 0: nothing is resumable."""
    max_resume_bytes_per_request: int = 4_000_000
    """Of one answer, so much is kept for a reader who comes back, about 35,000 tokens; then the oldest goes."""
    max_resume_bytes: int = 64_000_000
    """Of all resumable requests together; then the answers that ended first go."""

    def __post_init__(self) -> None:
        for name in ("max_buffered_tokens", "max_resume_bytes_per_request", "max_resume_bytes"):
            check_int(name, getattr(self, name), at_least=1)
        check_seconds("reader_stall_timeout_s", self.reader_stall_timeout_s, or_none=True)
        for name in ("position_interval_s", "keepalive_s"):
            check_seconds(name, getattr(self, name))
        check_seconds("resume_grace_s", self.resume_grace_s, at_least=0)
