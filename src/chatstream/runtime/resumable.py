"""Streams that outlive their connection: whose reader may come back, for how long, and in how much memory.

             close, stall                    grace_s without a reader
    READ ───────────────────▶ LEFT ────────────────────────────────────▶ cancelled and forgotten
     │  ◀──────────────────────┘ │
     │          attach           │
     │ end                   end │
     ▼                           ▼           grace_s after the end
    KEPT: readable again and again ────────────────────────────────────▶ forgotten

A generation never pauses for a reader who is not there. Two bounds hold: of one log, the oldest events go when it is
full; of all logs together, first those that have ended and that nobody reads, the oldest first, and when there is none
of them, the oldest events of the log that grows. Only a reader who is there and has yet to take what would go is waited
for, like the reader of any stream.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from sys import getsizeof

from chatstream.errors import InvalidRequest, NotFound
from chatstream.runtime.stream import EventLog, LoggedEvent, RequestStream
from chatstream.types import Token

EVENT_BYTES = getsizeof(Token("")) + 8
"""An event and its place in the log, without its text."""
LOGPROB_BYTES = 200
"""A text of a token and its log probability, about."""
LOG_BYTES = 2_000
"""A log without events, and what is known about its request."""


@dataclass(frozen=True, slots=True)
class ResumableStats:
    """What is kept now."""

    live: int
    ended: int
    left: int
    """Live, without a reader: their grace time runs."""
    unread: int
    """Ended, without a reader: the first to go."""
    bytes: int
    """Of all of them."""


@dataclass(slots=True, eq=False)
class _Kept:
    log: EventLog
    about: object
    bytes: int
    """Of its events."""
    timer: asyncio.TimerHandle | None = None

    def disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class ResumableStreams:
    """The logs of all resumable requests of one worker. It is their `Retention`."""

    def __init__(
        self, *, grace_s: float, max_bytes_per_request: int, max_bytes: int, on_abandoned: Callable[[str], object]
    ) -> None:
        """`on_abandoned(request_id)` must end a request whose reader did not come back."""
        self._grace_s = grace_s
        self._max_bytes_per_request = max_bytes_per_request
        self._max_bytes = max_bytes
        self._on_abandoned = on_abandoned
        self._kept: dict[str, _Kept] = {}
        self._unread: dict[str, _Kept] = {}
        """Ended and without a reader, the oldest first: the first to go."""
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<ResumableStreams {len(self._kept)} bytes={self._bytes}/{self._max_bytes} grace_s={self._grace_s}>"

    @property
    def num_kept(self) -> int:
        """Live and ended ones."""
        return len(self._kept)

    def keep(self, stream: RequestStream, about: object = None) -> None:
        """From now on the request outlives its readers for the grace time. Call it before the first event is taken.

        `about` is whatever a later reader needs to know; `find` gives it back.
        """
        log = stream.log
        kept = _Kept(log, about, sum(map(_bytes, log.held())))
        self._kept[log.request_id] = kept
        self._bytes += LOG_BYTES + kept.bytes
        log.retention = self
        if log.end is not None:
            self._on_end(kept)

    def find(self, request_id: str) -> object:
        """What `keep` was told about it. Raises `NotFound`: unknown, not resumable, or too long ago."""
        return self._find(request_id).about

    def attach(self, request_id: str, event_id: int = 0, *, has_all_of_it: bool = True) -> RequestStream:
        """A reader for what follows an event, or for that event and what follows it. Dismisses the reader before it.

        Raises `NotFound`, and `InvalidRequest` when there was no such event or what follows it is not kept any more.
        """
        kept = self._find(request_id)
        log = kept.log
        last_id = event_id if has_all_of_it else event_id - 1
        if not 0 <= last_id <= event_id <= log.last_id:
            raise InvalidRequest(f"there was no event {event_id} yet", param="event_id")
        if last_id < log.forgotten_id:
            gone = f"events up to {log.forgotten_id} are not kept any more; it must be {log.forgotten_id} or later"
            raise InvalidRequest(gone, param="event_id")
        if log.end is None:
            kept.disarm()
        self._unread.pop(request_id, None)
        return log.attach(last_id)

    def forget_ended(self) -> None:
        """At a stop: who reads may read on, nobody can come back."""
        for kept in list(self._kept.values()):
            if kept.log.end is not None:
                self._forget(kept)

    def stats(self) -> ResumableStats:
        logs = [kept.log for kept in self._kept.values()]
        live = [log for log in logs if log.end is None]
        left = sum(log.reader is None for log in live)
        return ResumableStats(
            live=len(live), ended=len(logs) - len(live), left=left, unread=len(self._unread), bytes=self._bytes
        )

    # --- the retention of a log ----------------------------------------------------------------------------------

    def make_room(self, log: EventLog, token: Token) -> bool:
        kept, size = self._kept[log.request_id], _bytes(token)
        while kept.bytes and kept.bytes + size > self._max_bytes_per_request:
            if not self._forget_oldest_event(kept):
                return False
        while self._bytes + size > self._max_bytes:
            if self._unread:
                self._forget(next(iter(self._unread.values())))
            elif not kept.bytes:
                break  # the others are full of what their readers must have: by one event it may be more
            elif not self._forget_oldest_event(kept):
                return False
        return True

    def on_event(self, log: EventLog, event: LoggedEvent) -> None:
        kept = self._kept[log.request_id]
        self._add_bytes(kept, _bytes(event))
        if log.end is not None:
            self._on_end(kept)

    def on_left(self, log: EventLog) -> None:
        kept = self._kept.get(log.request_id)
        if kept is None:
            return
        if log.end is None:
            self._arm(kept)
        else:
            self._unread[log.request_id] = kept

    # ----------------------------------------------------------------------------------------------------------

    def _find(self, request_id: str) -> _Kept:
        kept = self._kept.get(request_id)
        if kept is None:
            raise not_resumable()
        return kept

    def _on_end(self, kept: _Kept) -> None:
        self._arm(kept)
        if kept.log.reader is None:
            self._unread[kept.log.request_id] = kept

    def _arm(self, kept: _Kept) -> None:
        kept.disarm()
        kept.timer = asyncio.get_running_loop().call_later(self._grace_s, self._on_timer, kept)

    def _on_timer(self, kept: _Kept) -> None:
        kept.timer = None
        if kept.log.end is None:
            self._on_abandoned(kept.log.request_id)
        self._forget(kept)

    def _forget(self, kept: _Kept) -> None:
        kept.disarm()
        self._unread.pop(kept.log.request_id, None)
        if self._kept.pop(kept.log.request_id, None) is not None:
            self._bytes -= LOG_BYTES + kept.bytes

    def _forget_oldest_event(self, kept: _Kept) -> bool:
        event = kept.log.forget_oldest()
        if event is not None:
            self._add_bytes(kept, -_bytes(event))
        return event is not None

    def _add_bytes(self, kept: _Kept, size: int) -> None:
        kept.bytes += size
        self._bytes += size


def not_resumable() -> NotFound:
    """Also for a request of somebody else: its id must look like one that never was."""
    return NotFound("no such request, or it cannot be resumed", param="request_id")


def _bytes(event: LoggedEvent) -> int:
    if not isinstance(event, Token):
        return EVENT_BYTES
    return EVENT_BYTES + getsizeof(event.text) + sum(LOGPROB_BYTES * (1 + len(one.top)) for one in event.logprobs)
