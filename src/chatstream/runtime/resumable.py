"""Streams that outlive their connection: for how long they can be resumed, and in how much memory they are kept.

             close, stall                    grace_s without a reader
    READ ──────────────▶ DISCONNECTED ─────────────────────────────────▶ cancelled and removed
     │  ◀──────────────────────┘ │
     │          attach           │
     │ end                   end │
     ▼                           ▼           grace_s after the end
    ENDED: can be read repeatedly ─────────────────────────────────────▶ removed

A generation never pauses for a disconnected reader. Memory has two bounds. A log that reaches its own bound drops its
oldest events. When all logs together reach theirs, ended logs without a reader are removed, the earliest ended first;
then the growing log drops its oldest events. An event that an attached reader has yet to take is not dropped: the
generation pauses, as for any stream.
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
"""Size of an event and its entry in the log, without its text."""
LOGPROB_BYTES = 200
"""Approximate size of a token's text and its log probability."""
LOG_BYTES = 2_000
"""Size of a log without events, and of its context."""


@dataclass(frozen=True, slots=True)
class ResumableStats:
    """Number and size of the logs kept now."""

    live: int
    ended: int
    disconnected: int
    """Live logs without a reader: their grace time runs."""
    unread: int
    """Ended logs without a reader: the first to be removed."""
    bytes: int
    """Size of all logs."""


@dataclass(slots=True, eq=False)
class _Kept:
    log: EventLog
    context: object
    bytes: int
    """Size of the log's events."""
    timer: asyncio.TimerHandle | None = None

    def disarm(self) -> None:
        if self.timer is not None:
            self.timer.cancel()
            self.timer = None


class ResumableStreams:
    """The logs of all resumable requests of one worker; implements `Retention` for each of them."""

    def __init__(
        self, *, grace_s: float, max_bytes_per_request: int, max_bytes: int, on_abandoned: Callable[[str], object]
    ) -> None:
        """`on_abandoned(request_id)` must cancel the request: its client did not reconnect."""
        self._grace_s = grace_s
        self._max_bytes_per_request = max_bytes_per_request
        self._max_bytes = max_bytes
        self._on_abandoned = on_abandoned
        self._kept: dict[str, _Kept] = {}
        self._unread: dict[str, _Kept] = {}
        """Ended logs without a reader, the earliest ended first: the first to be removed."""
        self._bytes = 0

    def __repr__(self) -> str:
        return f"<ResumableStreams {len(self._kept)} bytes={self._bytes}/{self._max_bytes} grace_s={self._grace_s}>"

    @property
    def num_kept(self) -> int:
        """Number of logs, live and ended."""
        return len(self._kept)

    def keep(self, stream: RequestStream, context: object = None) -> None:
        """Make a request resumable. Call it before the first event is taken.

        `context` is any data that a later reader needs; `find` returns it.
        """
        log = stream.log
        kept = _Kept(log, context, sum(map(_bytes, log.buffered())))
        self._kept[log.request_id] = kept
        self._bytes += LOG_BYTES + kept.bytes
        log.retention = self
        if log.end is not None:
            self._on_end(kept)

    def find(self, request_id: str) -> object:
        """The `context` given to `keep`. Raises `NotFound`: the request is unknown, not resumable or removed."""
        return self._find(request_id).context

    def attach(self, request_id: str, event_id: int = 0, *, has_whole_event: bool = True) -> RequestStream:
        """Attach a reader for the events after `event_id`. It replaces the current reader.

        `has_whole_event` False: the reader has only a part of that event and gets it again. Raises `NotFound`, and
        `InvalidRequest` when there is no such event yet or events after it were dropped.
        """
        kept = self._find(request_id)
        log = kept.log
        last_id = event_id if has_whole_event else event_id - 1
        if not 0 <= last_id <= event_id <= log.last_id:
            raise InvalidRequest(f"there is no event {event_id} yet", param="event_id")
        if last_id < log.dropped_id:
            message = f"events up to {log.dropped_id} are no longer kept; resume at event {log.dropped_id} or later"
            raise InvalidRequest(message, param="event_id")
        if log.end is None:
            kept.disarm()
        self._unread.pop(request_id, None)
        return log.attach(last_id)

    def remove_ended(self) -> None:
        """Remove the logs of ended requests. Attached readers may read on; no client can resume."""
        for kept in list(self._kept.values()):
            if kept.log.end is not None:
                self._remove(kept)

    def stats(self) -> ResumableStats:
        logs = [kept.log for kept in self._kept.values()]
        live = [log for log in logs if log.end is None]
        disconnected = sum(log.reader is None for log in live)
        return ResumableStats(
            live=len(live),
            ended=len(logs) - len(live),
            disconnected=disconnected,
            unread=len(self._unread),
            bytes=self._bytes,
        )

    # --- the retention of a log ----------------------------------------------------------------------------------

    def make_room(self, log: EventLog, token: Token) -> bool:
        kept, size = self._kept[log.request_id], _bytes(token)
        while kept.bytes and kept.bytes + size > self._max_bytes_per_request:
            if not self._drop_oldest_event(kept):
                return False
        while self._bytes + size > self._max_bytes:
            if self._unread:
                self._remove(next(iter(self._unread.values())))
            elif not kept.bytes:
                break  # the other logs have events to deliver; this one exceeds the bound by one event
            elif not self._drop_oldest_event(kept):
                return False
        return True

    def on_event(self, log: EventLog, event: LoggedEvent) -> None:
        kept = self._kept[log.request_id]
        self._add_bytes(kept, _bytes(event))
        if log.end is not None:
            self._on_end(kept)

    def on_detached(self, log: EventLog) -> None:
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
        self._remove(kept)

    def _remove(self, kept: _Kept) -> None:
        kept.disarm()
        self._unread.pop(kept.log.request_id, None)
        if self._kept.pop(kept.log.request_id, None) is not None:
            self._bytes -= LOG_BYTES + kept.bytes

    def _drop_oldest_event(self, kept: _Kept) -> bool:
        event = kept.log.drop_oldest()
        if event is not None:
            self._add_bytes(kept, -_bytes(event))
        return event is not None

    def _add_bytes(self, kept: _Kept, size: int) -> None:
        kept.bytes += size
        self._bytes += size


def not_resumable() -> NotFound:
    """The error for another owner's request too: its id must not be distinguishable from an unknown one."""
    return NotFound("no such request, or it cannot be resumed", param="request_id")


def _bytes(event: LoggedEvent) -> int:
    if not isinstance(event, Token):
        return EVENT_BYTES
    return EVENT_BYTES + getsizeof(event.text) + sum(LOGPROB_BYTES * (1 + len(one.top)) for one in event.logprobs)
