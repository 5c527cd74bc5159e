"""Sends waiting requests their position and expected start.

Positions are sent in rounds. The work is bounded by the number of rounds in a second, not by the number of changes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf

from chatstream.runtime.settings import RuntimeSettings
from chatstream.runtime.stream import EventLog
from chatstream.scheduler import Scheduler, rounded
from chatstream.types import PositionKind, Queued

MIN_BATCH_SIZE = 8
"""Positions sent in one tick of the event loop; more only in a queue of thousands."""
BATCH_PAUSE_S = 0.002
"""Pause between two batches: long enough to deliver the tokens of running requests."""
MAX_ROUND_SHARE = 0.7
"""Longest duration of a round, as a share of the interval. The batch size grows with the queue to keep it."""
ROUNDS_PER_INTERVAL = 4
"""Rounds in one interval. A request skipped because its last position is too recent is sent by the next round, not a
whole interval later."""
ETAS_PER_S = 2000
"""ETAs checked per second while no position changes; each is checked at most once an interval."""
MIN_ETA_CHANGE_S, MIN_ETA_CHANGE_SHARE = 1.0, 0.25
"""An ETA is sent again when it is off by more than this many seconds and by more than this share of itself."""
TIMER_RESOLUTION_S = 0.001
"""A timer may fire this much too early."""


@dataclass(slots=True, eq=False)
class _WaitingRequest:
    """The log of a waiting request, and the position sent last."""

    log: EventLog
    sent: Queued | None = None
    sent_s: float = -inf


class PositionUpdates:
    """The waiting requests, least recently updated first. Each is updated at most once an interval.

    Between the batches of a round it uses a timer of its own. Rounds are timed by the caller: call `on_timer` at
    `next_round_s()`, and read that again after each call of `on_changed`.
    """

    def __init__(self, scheduler: Scheduler, settings: RuntimeSettings, *, on_changed: Callable[[], object]) -> None:
        self._scheduler = scheduler
        self._interval_s = settings.position_interval_s
        self._on_changed = on_changed
        self._waiting: dict[str, _WaitingRequest] = {}
        self._has_changed = False
        self._positions_sent_s = -inf
        self._etas_sent_s = -inf
        self._etas_changed_s = -inf
        self._next_batch: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[str]:
        """The ids of the waiting requests."""
        return iter(self._waiting)

    # --- facts ------------------------------------------------------------------------------------------------

    def add(self, log: EventLog) -> None:
        """The request waits. Its position is sent by `send`, or in the next round."""
        self._waiting[log.request_id] = _WaitingRequest(log)

    def remove(self, request_id: str) -> None:
        """The request waits no more. Does nothing for a request that never waited."""
        request = self._waiting.pop(request_id, None)
        if request is not None and request.sent is not None:  # a request that starts at once was ahead of no other
            self._has_changed = True

    def positions_changed(self) -> None:
        """Some positions have changed."""
        self._has_changed = True

    def etas_changed(self) -> None:
        """ETAs have changed, even where the position has not."""
        self._has_changed = True
        self._etas_changed_s = asyncio.get_running_loop().time()

    def send(self, request_id: str) -> bool:
        """Send the position now, outside the rounds. False when the request does not wait."""
        request = self._waiting.get(request_id)
        if request is not None:
            self._send(request)
        return request is not None

    def resend(self, request_id: str) -> None:
        """For a reconnected client, which has no local countdown. Does nothing for a request that does not wait."""
        request = self._waiting.get(request_id)
        if request is not None and request.sent is not None and request.sent.eta_seconds is not None:
            request.sent = None
            self._send(request)

    # --- rounds -----------------------------------------------------------------------------------------------

    def next_round_s(self) -> float | None:
        """When the next round is due. None: no request waits, or a round is in progress."""
        if not self._waiting or self._next_batch is not None:
            return None
        if self._has_changed:
            return max(self._positions_sent_s + self._interval_s / ROUNDS_PER_INTERVAL, 0.0)
        return max(self._next_etas_s(), 0.0)

    def on_timer(self, now_s: float) -> None:
        """Start a round if one is due."""
        round_s = self.next_round_s()
        if round_s is not None and now_s >= round_s - TIMER_RESOLUTION_S:
            self._start_round(now_s)

    def close(self) -> None:
        """Abandon a round in progress: its timer belongs to this event loop, and a later start may have another."""
        if self._next_batch is not None:
            self._next_batch.cancel()
            self._next_batch = None

    def _start_round(self, now_s: float) -> None:
        """Send changed positions. Check ETAs only when due: an ETA costs ten times as much as a position."""
        has_changed, self._has_changed = self._has_changed, False
        is_due = now_s >= self._next_etas_s() - TIMER_RESOLUTION_S
        with_etas = is_due or self._etas_sent_s <= self._etas_changed_s
        self._positions_sent_s = now_s
        if with_etas:
            self._etas_sent_s = now_s
        size = max(MIN_BATCH_SIZE, int(len(self._waiting) * BATCH_PAUSE_S / (self._interval_s * MAX_ROUND_SHARE)))
        self._send_batch(iter(list(self._waiting.values())), size, has_changed, with_etas)

    def _next_etas_s(self) -> float:
        return self._etas_sent_s + max(self._interval_s, len(self._waiting) / ETAS_PER_S)

    def _send_batch(self, requests: Iterator[_WaitingRequest], size: int, has_changed: bool, with_etas: bool) -> None:
        """Send a long queue in batches, so that the streams of running requests are not delayed."""
        self._next_batch = None
        loop = asyncio.get_running_loop()
        max_checked = size if with_etas else 8 * size
        num_sent = 0
        for num_checked, request in enumerate(requests, start=1):
            if request.sent_s >= self._positions_sent_s:
                continue  # `send` was called after the round had started
            # 10 ms less, because timers may fire early by their resolution.
            if loop.time() - request.sent_s < self._interval_s - 0.01:
                # All requests after this one were updated even later.
                self._has_changed |= has_changed
                break
            num_sent += self._send(request, with_etas=with_etas)
            if num_sent == size or num_checked >= max_checked:
                self._next_batch = loop.call_later(
                    BATCH_PAUSE_S, self._send_batch, requests, size, has_changed, with_etas
                )
                break
        self._on_changed()

    def _send(self, request: _WaitingRequest, *, with_etas: bool = False) -> bool:
        """Send the position if it has changed; `with_etas`: also if its ETA has. False when nothing was sent."""
        request_id, sent = request.log.request_id, request.sent
        position = self._scheduler.position(request_id) if request_id in self._waiting else None
        with_etas |= request.sent_s < self._etas_changed_s
        if position is None or (sent is not None and sent.position == position and not with_etas):
            return False
        now_s = asyncio.get_running_loop().time()
        queued = self._queued(request_id, position, now_s)
        if sent is not None and not _differs(queued, sent, now_s - request.sent_s):
            return False
        request.sent, request.sent_s = queued, now_s
        self._waiting[request_id] = self._waiting.pop(request_id)  # to the end: most recently updated
        request.log.show_position(queued)
        return True

    def _queued(self, request_id: str, position: int, now_s: float) -> Queued:
        eta = self._scheduler.eta(request_id, now_s)
        kind: PositionKind = "exact" if self._scheduler.is_exact else "estimate"
        waits_for = self._scheduler.waits_for(request_id) or "slot"
        if eta is None:
            return Queued(request_id, position, None, None, kind, waits_for)
        return Queued(request_id, position, rounded(eta.p50_s), rounded(eta.p90_s), kind, waits_for)


def _differs(queued: Queued, sent: Queued, since_s: float) -> bool:
    """Whether `queued` differs from what the client shows: `sent`, counted down for `since_s`."""
    if queued.position != sent.position or queued.waits_for != sent.waits_for:
        return True
    if (queued.eta_seconds is None) != (sent.eta_seconds is None):
        return True
    times_s = ((queued.eta_seconds, sent.eta_seconds), (queued.eta_p90_seconds, sent.eta_p90_seconds))
    return any(
        abs(now_s - max(then_s - since_s, 0.0)) > max(MIN_ETA_CHANGE_S, MIN_ETA_CHANGE_SHARE * now_s)
        for now_s, then_s in times_s
        if now_s is not None and then_s is not None
    )
