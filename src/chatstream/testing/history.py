"""Replays the event log of a scheduler and checks it against an independent model.

The method is Jepsen's: the scheduler's own state is not consulted; the log must be one that a correct scheduler can
produce. Works on the logs of tests, simulations and servers.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import TypeAlias

from chatstream.scheduler import events as ev
from chatstream.scheduler.slots import Grant

_OfRunningRequest: TypeAlias = (
    ev.Tokens | ev.Requeued | ev.PreemptRequested | ev.Preempted | ev.AbortRequested | ev.SlotReclaimed
)


class InvalidHistory(AssertionError):
    """The log breaks a promise of the scheduler."""


@dataclass(slots=True)
class _Request:
    seq: int
    client: str
    conversation: str | None
    grant: Grant | None = None
    total: int = 0
    is_aborting: bool = False
    is_preempting: bool = False
    is_preempted: bool = False
    attempts: int = 0


@dataclass(slots=True)
class History:
    """Checks an event log: pass every event to `feed`, in order, then call `check_complete`.

    `is_fcfs` adds the promises of first come, first served: start order and exact positions. A `PolicyChanged` event
    updates it, as `LimitsChanged` updates the limits.
    """

    max_concurrency: int
    max_queue_size: int
    is_fcfs: bool = True
    max_running_per_client: int | None = None
    has_slices: bool = False
    """There are time slices: a request may start at the end of a slice before earlier requests."""
    waiting: dict[str, _Request] = field(default_factory=dict)
    running: dict[str, _Request] = field(default_factory=dict)
    leaving: dict[str, _Request] = field(default_factory=dict)
    """Cancelled while preempted, and not released by the engine yet: without a slot, and not in the queue."""
    ended: dict[str, ev.End] = field(default_factory=dict)
    rejected: set[str] = field(default_factory=set)
    tokens: dict[str, int] = field(default_factory=dict)
    num_events: int = 0
    peak_running: int = 0
    peak_waiting: int = 0
    is_open: bool = False
    is_paused: bool = False
    is_draining: bool = False
    failure: InvalidHistory | None = None
    """The first failure; `check_complete` raises it again. An error raised in `ChatStream.observe` is only logged."""
    _now_s: float = float("-inf")
    _received: dict[str, ev.Received] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _epochs: dict[int, int] = field(default_factory=dict)
    _last_seq: int = -1

    def feed(self, events: Iterable[ev.Event]) -> None:
        """Apply the next events. Raises `InvalidHistory` at the first one that breaks a promise."""
        for event in events:
            self._require(event.number == self.num_events, event, "events are numbered without a gap")
            self._require(event.at_s >= self._now_s, event, "time does not run backwards")
            self.num_events += 1
            self._now_s = event.at_s
            self._apply(event)
            self.peak_running = max(self.peak_running, len(self.running))
            self.peak_waiting = max(self.peak_waiting, len(self.waiting))

    def check_complete(self) -> None:
        """Raise `InvalidHistory` if an event broke a promise, or if a request has not ended."""
        if self.failure is not None:
            raise self.failure
        if left := [*self._received, *self.waiting, *self.running, *self.leaving]:
            raise InvalidHistory(f"every request ends: broken by {left}")

    def _apply(self, event: ev.Event) -> None:
        match event:
            case ev.Received():
                self._require(event.request_id not in self._seen, event, "a request arrives once")
                self._seen.add(event.request_id)
                self._received[event.request_id] = event
            case ev.Rejected():
                self._require(event.request_id in self._received, event, "only a received request is rejected")
                del self._received[event.request_id]
                self.rejected.add(event.request_id)
            case ev.Admitted():
                self._on_admitted(event)
            case ev.Started():
                self._on_started(event)
            case ev.Tokens():
                # The engine may have generated them before it preempted or released the request.
                preempted = self.waiting.get(event.request_id, self.leaving.get(event.request_id))
                has_started = preempted is not None and (preempted.is_preempted or preempted.is_aborting)
                request = preempted if preempted is not None and has_started else self._running(event)
                request.total += event.num_tokens
                self.tokens[event.request_id] = request.total
                self._require(request.total == event.total, event, "total is the sum of num_tokens")
            case ev.Requeued():
                request = self._running(event)
                self._require(request.total == 0, event, "a request with tokens is not requeued")
                self._require(request.grant == event.grant, event, "the grant is the current one of the request")
                del self.running[event.request_id]
                request.grant = None
                self.waiting[event.request_id] = request
            case ev.PreemptRequested():
                request = self._running(event)
                is_free = not request.is_aborting and not request.is_preempting
                self._require(is_free, event, "a request that aborts or is being preempted is not preempted")
                self._require(request.grant == event.grant, event, "the grant is the current one of the request")
                request.is_preempting = True
            case ev.Preempted():
                request = self._running(event)
                self._require(request.is_preempting, event, "Preempted follows PreemptRequested")
                self._require(request.grant == event.grant, event, "the grant is the current one of the request")
                del self.running[event.request_id]
                request.is_preempting, request.is_preempted = False, True
                self.waiting[event.request_id] = request
            case ev.Resumed():
                self._on_resumed(event)
            case ev.AbortRequested():
                self._on_abort_requested(event)
            case ev.Finished() | ev.Cancelled() | ev.Failed() | ev.Expired():
                self._on_end(event)
            case ev.SlotReclaimed():
                is_current = self._running(event).grant == event.grant
                self._require(is_current, event, "the grant is the current one of the request")
            case ev.LimitsChanged():
                self.max_concurrency, self.max_queue_size = event.max_concurrency, event.max_queue_size
            case ev.PolicyChanged():
                self.is_fcfs = event.policy == "fcfs"
            case ev.Paused():
                self.is_paused = True
            case ev.Unpaused():
                self.is_paused = False
            case ev.Opened():
                self.is_open, self.is_draining = True, False
            case ev.DrainStarted():
                self.is_open, self.is_draining = False, True

    def _on_admitted(self, event: ev.Admitted) -> None:
        self._require(event.request_id in self._received, event, "only a received request is admitted")
        self._require(event.seq > self._last_seq, event, "seq grows with every admission")
        self._require(not self.is_draining, event, "a draining scheduler admits no request")
        self._require(not self.is_paused, event, "a paused scheduler admits no request")
        received = self._received.pop(event.request_id)
        request = _Request(event.seq, received.client, received.conversation)
        free = max(0, self.max_concurrency - len(self.running))
        starts_at_once = self.is_open and free > 0 and self._may_start(request)
        capacity = self.max_queue_size if self.is_open else self.max_queue_size + free
        self._require(starts_at_once or len(self.waiting) < capacity, event, "no request is admitted beyond the limits")
        if self.is_fcfs:
            self._require(event.position == len(self.waiting) + 1, event, "under fcfs a new request is the last one")
        is_rank = 1 <= event.position <= len(self.waiting) + 1
        self._require(is_rank, event, "a position is at least 1 and at most the number of waiting requests")
        self._last_seq = event.seq
        self.waiting[event.request_id] = request

    def _on_started(self, event: ev.Started) -> None:
        self._require(self.is_open, event, "no request starts before the opening or while draining")
        request = self._leave_queue(event)
        self._require(not request.is_preempted, event, "a preempted request is resumed, not started")
        request.attempts += 1
        self._take_slot(request, event)
        if self.is_fcfs and not self.has_slices:
            passed = [r for r in self.waiting.values() if r.seq < request.seq and self.could_have_started(r)]
            self._require(not passed, event, "under fcfs no request starts before an earlier eligible one")

    def _on_resumed(self, event: ev.Resumed) -> None:
        request = self._leave_queue(event)
        self._require(request.is_preempted, event, "only a preempted request is resumed")
        request.is_preempted = False
        self._take_slot(request, event)

    def _leave_queue(self, event: ev.Started | ev.Resumed) -> _Request:
        self._require(event.request_id in self.waiting, event, "only a waiting request starts")
        self._require(len(self.running) < self.max_concurrency, event, "at most max_concurrency requests run")
        request = self.waiting.pop(event.request_id)
        self._require(self._may_start(request), event, "a held request does not start")
        return request

    def _take_slot(self, request: _Request, event: ev.Started | ev.Resumed) -> None:
        grant = event.grant
        self._require(grant.epoch == self._epochs.get(grant.slot, 0) + 1, event, "each grant of a slot has a new epoch")
        in_use = [r.grant.slot for r in self.running.values() if r.grant is not None]
        self._require(grant.slot not in in_use, event, "a slot is used by one request at a time")
        self._epochs[grant.slot] = grant.epoch
        self._require(grant.attempt == request.attempts, event, "attempt is the number of starts")
        request.grant = grant
        self.running[event.request_id] = request

    def _on_abort_requested(self, event: ev.AbortRequested) -> None:
        request = self.waiting.get(event.request_id)
        if request is not None and request.is_preempted:
            self.leaving[event.request_id] = self.waiting.pop(event.request_id)
        else:
            request = self._running(event)
        self._require(not request.is_aborting, event, "a request is aborted once")
        request.is_aborting, request.is_preempting = True, False

    def could_have_started(self, request: _Request) -> bool:
        """Whether a waiting request was eligible.

        With `max_running_per_client`, the order among requests of one client is not replayed: only the sole request of
        a client counts as eligible.
        """
        live = [*self.waiting.values(), *self.running.values(), *self.leaving.values()]
        is_only_one = sum(r.client == request.client for r in live) == 1
        return self._may_start(request) and (self.max_running_per_client is None or is_only_one)

    def _may_start(self, request: _Request) -> bool:
        """No earlier request of its conversation is live, and its client runs fewer requests than its limit."""
        started = [*self.running.values(), *self.leaving.values()]
        started += [r for r in self.waiting.values() if r.is_preempted]
        if request.is_preempted:
            return True
        if request.conversation is not None and any(
            r.conversation == request.conversation and r.seq < request.seq for r in [*started, *self.waiting.values()]
        ):
            return False
        limit = self.max_running_per_client
        return limit is None or sum(r.client == request.client for r in started) < limit

    def _on_end(self, event: ev.End) -> None:
        was_waiting = self.waiting.pop(event.request_id, None)
        was_running = self.running.pop(event.request_id, None) or self.leaving.pop(event.request_id, None)
        self._require(was_waiting is not None or was_running is not None, event, "only a live request ends, and once")
        if isinstance(event, ev.Expired):
            self._require(
                was_waiting is not None and not was_waiting.is_preempted,
                event,
                "only a request that waits to start expires",
            )
        if isinstance(event, ev.Finished | ev.Failed):
            has_started = was_running is not None or (was_waiting is not None and was_waiting.is_preempted)
            self._require(has_started, event, "only a running or preempted request finishes or fails")
        if was_running is not None and was_running.is_aborting:
            self._require(isinstance(event, ev.Cancelled), event, "an aborted request ends as cancelled")
        self.ended[event.request_id] = event

    def _running(self, event: _OfRunningRequest) -> _Request:
        self._require(event.request_id in self.running, event, "only a running request has this event")
        return self.running[event.request_id]

    def _require(self, holds: bool, event: ev.Event, promise: str) -> None:
        if not holds:
            failure = InvalidHistory(f"{promise}: broken by {event}")
            self.failure = self.failure or failure
            raise failure
