"""Tells those who wait where they stand and when they will start.

In rounds, which end after a while however much happens: the work is bounded by time, not by the number of changes.
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

SLICE = 8
"""Places sent before the event loop gets its turn again; more only in a line of thousands."""
SLICE_PAUSE_S = 0.002
"""Between two slices: enough for the tokens of those who run."""
MAX_ROUND = 0.7
"""Of the interval: a round through a line of any length takes no longer, as far as the machine can."""
ROUNDS_PER_INTERVAL = 4
"""Rounds in which places are sent, in the time in which one client is sent at most once: who was sent shortly before a
round is sent by the next one, not a whole interval later."""
ETAS_PER_S = 2000
"""While no place changes, times may: they are looked at once an interval, in a long line so many a second."""
ETA_NEWS_S, ETA_NEWS_SHARE = 1.0, 0.25
"""An expected time is sent again when it is off by more than so many seconds, and by more than this share of itself."""
TIMER_RESOLUTION_S = 0.001
"""A timer may come so early."""


@dataclass(slots=True, eq=False)
class _Waiter:
    log: EventLog
    sent: Queued | None = None
    sent_s: float = -inf


class PositionUpdates:
    """The requests that wait, in the order in which they were sent last. Each is sent at most once an interval.

    It has no timer of its own but for slices: `on_timer` must be called at `next_round_s()`, which `on_changed` says
    may have changed after a slice.
    """

    def __init__(self, scheduler: Scheduler, settings: RuntimeSettings, *, on_changed: Callable[[], object]) -> None:
        self._scheduler = scheduler
        self._interval_s = settings.position_interval_s
        self._on_changed = on_changed
        self._waiters: dict[str, _Waiter] = {}
        self._has_changed = False
        self._positions_sent_s = -inf
        self._etas_sent_s = -inf
        self._etas_changed_s = -inf
        self._next_slice: asyncio.TimerHandle | None = None

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[str]:
        """Their ids."""
        return iter(self._waiters)

    # --- what happens -----------------------------------------------------------------------------------------

    def add(self, log: EventLog) -> None:
        """It waits. It is sent by `tell`, or in the next round if the line has changed."""
        self._waiters[log.request_id] = _Waiter(log)

    def remove(self, request_id: str) -> None:
        """It waits no more. Harmless for those who never did."""
        waiter = self._waiters.pop(request_id, None)
        if waiter is not None and waiter.sent is not None:  # who starts at once was in nobody's way
            self._has_changed = True

    def positions_changed(self) -> None:
        """Some places are others now."""
        self._has_changed = True

    def etas_changed(self) -> None:
        """Also of those whose place is the same."""
        self._has_changed = True
        self._etas_changed_s = asyncio.get_running_loop().time()

    def send(self, request_id: str) -> bool:
        """Now, out of turn. False when it does not wait."""
        waiter = self._waiters.get(request_id)
        if waiter is not None:
            self._send(waiter)
        return waiter is not None

    def resend(self, request_id: str) -> None:
        """To somebody who has not counted down the time that was sent. Harmless for those who do not wait."""
        waiter = self._waiters.get(request_id)
        if waiter is not None and waiter.sent is not None and waiter.sent.eta_seconds is not None:
            waiter.sent = None
            self._send(waiter)

    # --- rounds -----------------------------------------------------------------------------------------------

    def next_round_s(self) -> float | None:
        """None: nobody waits, or a round is on its way."""
        if not self._waiters or self._next_slice is not None:
            return None
        if self._has_changed:
            return max(self._positions_sent_s + self._interval_s / ROUNDS_PER_INTERVAL, 0.0)
        return max(self._next_etas_s(), 0.0)

    def on_timer(self, now_s: float) -> None:
        """Harmless at other times than `next_round_s()`."""
        round_s = self.next_round_s()
        if round_s is not None and now_s >= round_s - TIMER_RESOLUTION_S:
            self._begin_round(now_s)

    def close(self) -> None:
        """A slice would never come in the event loop of a later start."""
        if self._next_slice is not None:
            self._next_slice.cancel()
            self._next_slice = None

    def _begin_round(self, now_s: float) -> None:
        """Whose place has changed is sent. Now and then whose time has changed too: that costs ten times as much."""
        has_changed, self._has_changed = self._has_changed, False
        is_due = now_s >= self._next_etas_s() - TIMER_RESOLUTION_S
        with_etas = is_due or self._etas_sent_s <= self._etas_changed_s
        self._positions_sent_s = now_s
        if with_etas:
            self._etas_sent_s = now_s
        size = max(SLICE, int(len(self._waiters) * SLICE_PAUSE_S / (self._interval_s * MAX_ROUND)))
        self._send_slice(iter(list(self._waiters.values())), size, has_changed, with_etas)

    def _next_etas_s(self) -> float:
        return self._etas_sent_s + max(self._interval_s, len(self._waiters) / ETAS_PER_S)

    def _send_slice(self, waiters: Iterator[_Waiter], size: int, has_changed: bool, with_etas: bool) -> None:
        """A long line is sent in slices, so that the streams of the running ones hardly notice."""
        self._next_slice = None
        loop = asyncio.get_running_loop()
        most_seen = size if with_etas else 8 * size
        num_sent = 0
        for num_seen, waiter in enumerate(waiters, start=1):
            if waiter.sent_s >= self._positions_sent_s:
                continue  # since the round began, out of turn
            # A hundredth less, because timers may come early by their resolution.
            if loop.time() - waiter.sent_s < self._interval_s - 0.01:
                # Nor is it anybody's turn behind: they stand in the order in which they were sent.
                self._has_changed |= has_changed
                break
            num_sent += self._send(waiter, with_etas=with_etas)
            if num_sent == size or num_seen >= most_seen:
                self._next_slice = loop.call_later(
                    SLICE_PAUSE_S, self._send_slice, waiters, size, has_changed, with_etas
                )
                break
        self._on_changed()

    def _send(self, waiter: _Waiter, *, with_etas: bool = False) -> bool:
        """False when there is nothing new; `with_etas`: to somebody who has counted down what was sent."""
        request_id, sent = waiter.log.request_id, waiter.sent
        position = self._scheduler.position(request_id) if request_id in self._waiters else None
        with_etas |= waiter.sent_s < self._etas_changed_s
        if position is None or (sent is not None and sent.position == position and not with_etas):
            return False
        now_s = asyncio.get_running_loop().time()
        queued = self._queued(request_id, position, now_s)
        if sent is not None and not _is_news(queued, sent, now_s - waiter.sent_s):
            return False
        waiter.sent, waiter.sent_s = queued, now_s
        self._waiters[request_id] = self._waiters.pop(request_id)  # to the end
        waiter.log.show_position(queued)
        return True

    def _queued(self, request_id: str, position: int, now_s: float) -> Queued:
        eta = self._scheduler.eta(request_id, now_s)
        kind: PositionKind = "exact" if self._scheduler.is_exact else "estimate"
        waits_for = self._scheduler.waits_for(request_id) or "slot"
        if eta is None:
            return Queued(request_id, position, None, None, kind, waits_for)
        return Queued(request_id, position, rounded(eta.p50_s), rounded(eta.p90_s), kind, waits_for)


def _is_news(queued: Queued, sent: Queued, since_s: float) -> bool:
    """Not what its client knows already: what was sent `since_s` ago, counted down."""
    if queued.position != sent.position or queued.waits_for != sent.waits_for:
        return True
    if (queued.eta_seconds is None) != (sent.eta_seconds is None):
        return True
    times_s = ((queued.eta_seconds, sent.eta_seconds), (queued.eta_p90_seconds, sent.eta_p90_seconds))
    return any(
        abs(now_s - max(then_s - since_s, 0.0)) > max(ETA_NEWS_S, ETA_NEWS_SHARE * now_s)
        for now_s, then_s in times_s
        if now_s is not None and then_s is not None
    )
