"""Replays a scheduler's event log and trusts nothing but the log.

The method is Jepsen's: whatever the code believes of itself, the history must be one that a correct scheduler could
have produced. Works on logs of tests, simulations and real servers alike.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from chatstream.scheduler import events as ev
from chatstream.scheduler.slots import Grant


class InvalidHistory(AssertionError):
    """The log contradicts the promises of the scheduler."""


@dataclass(slots=True)
class _Request:
    seq: int
    conversation: str | None
    grant: Grant | None = None
    total: int = 0
    is_aborting: bool = False
    attempts: int = 0


@dataclass(slots=True)
class History:
    """Feed it every event in order; it raises `InvalidHistory` at the first impossible one.

    `is_fcfs` adds what only holds for first come, first served: start order and exact positions.
    """

    max_concurrency: int
    max_queue_size: int
    is_fcfs: bool = True
    waiting: dict[str, _Request] = field(default_factory=dict)
    running: dict[str, _Request] = field(default_factory=dict)
    ended: dict[str, ev.End] = field(default_factory=dict)
    rejected: set[str] = field(default_factory=set)
    tokens: dict[str, int] = field(default_factory=dict)
    num_events: int = 0
    peak_running: int = 0
    peak_waiting: int = 0
    is_open: bool = False
    is_draining: bool = False
    _now_s: float = float("-inf")
    _received: dict[str, str | None] = field(default_factory=dict)
    _seen: set[str] = field(default_factory=set)
    _epochs: dict[int, int] = field(default_factory=dict)
    _last_seq: int = -1

    def feed(self, events: Iterable[ev.Event]) -> None:
        for event in events:
            self._require(event.number == self.num_events, event, "events are numbered without a gap")
            self._require(event.at_s >= self._now_s, event, "time does not run backwards")
            self.num_events += 1
            self._now_s = event.at_s
            self._apply(event)
            self.peak_running = max(self.peak_running, len(self.running))
            self.peak_waiting = max(self.peak_waiting, len(self.waiting))

    def check_complete(self) -> None:
        """Everybody who was admitted has ended, and holds nothing."""
        if self.waiting or self.running or self._received:
            raise InvalidHistory(f"left over: {[*self._received, *self.waiting, *self.running]}")

    def _apply(self, event: ev.Event) -> None:
        match event:
            case ev.Received():
                self._require(event.request_id not in self._seen, event, "a request arrives once")
                self._seen.add(event.request_id)
                self._received[event.request_id] = event.conversation
            case ev.Rejected():
                self._require(event.request_id in self._received, event, "only who is at the door is rejected")
                del self._received[event.request_id]
                self.rejected.add(event.request_id)
            case ev.Admitted():
                self._on_admitted(event)
            case ev.Started():
                self._on_started(event)
            case ev.Tokens():
                request = self._running(event)
                request.total += event.num_tokens
                self.tokens[event.request_id] = request.total
                self._require(request.total == event.total, event, "totals add up")
            case ev.Requeued():
                request = self._running(event)
                self._require(request.total == 0, event, "only who delivered nothing goes back")
                self._require(request.grant == event.grant, event, "it loses the slot it had")
                del self.running[event.request_id]
                request.grant = None
                self.waiting[event.request_id] = request
            case ev.AbortRequested():
                request = self._running(event)
                self._require(not request.is_aborting, event, "aborted once")
                request.is_aborting = True
            case ev.Finished() | ev.Cancelled() | ev.Failed() | ev.Expired():
                self._on_end(event)
            case ev.SlotReclaimed():
                self._require(self._running(event).grant == event.grant, event, "it held the slot")
            case ev.LimitsChanged():
                self.max_concurrency, self.max_queue_size = event.max_concurrency, event.max_queue_size
            case ev.Opened():
                self.is_open, self.is_draining = True, False
            case ev.DrainStarted():
                self.is_open, self.is_draining = False, True

    def _on_admitted(self, event: ev.Admitted) -> None:
        self._require(event.request_id in self._received, event, "only who is at the door is admitted")
        self._require(event.seq > self._last_seq, event, "admission order is a strict order")
        self._require(not self.is_draining, event, "a draining scheduler admits nobody")
        conversation = self._received.pop(event.request_id)
        is_held = conversation is not None and any(
            r.conversation == conversation for r in [*self.waiting.values(), *self.running.values()]
        )
        free = max(0, self.max_concurrency - len(self.running))
        starts_at_once = self.is_open and free > 0 and not is_held
        places = self.max_queue_size if self.is_open else self.max_queue_size + free
        self._require(starts_at_once or len(self.waiting) < places, event, "nobody is admitted beyond the limits")
        if self.is_fcfs:
            self._require(event.position == len(self.waiting) + 1, event, "the newcomer is the last in line")
        self._last_seq = event.seq
        self.waiting[event.request_id] = _Request(event.seq, conversation)

    def _on_started(self, event: ev.Started) -> None:
        self._require(self.is_open, event, "nobody starts before the opening or while draining")
        self._require(event.request_id in self.waiting, event, "only who waits starts")
        self._require(len(self.running) < self.max_concurrency, event, "the limit is exact")
        request = self.waiting.pop(event.request_id)
        others = [*self.waiting.values(), *self.running.values()]
        if request.conversation is not None:
            earlier = [r for r in others if r.conversation == request.conversation and r.seq < request.seq]
            self._require(not earlier, event, "requests of one conversation run one after the other")
        if self.is_fcfs:
            passed = [r for r in self.waiting.values() if r.seq < request.seq and self._may_start(r)]
            self._require(not passed, event, "first come, first served")
        grant = event.grant
        self._require(grant.epoch == self._epochs.get(grant.slot, 0) + 1, event, "every occupant has its own epoch")
        self._require(
            all(r.grant is None or r.grant.slot != grant.slot for r in others), event, "a slot has one holder"
        )
        self._epochs[grant.slot] = grant.epoch
        request.attempts += 1
        self._require(grant.attempt == request.attempts, event, "attempts are counted")
        request.grant = grant
        self.running[event.request_id] = request

    def _may_start(self, request: _Request) -> bool:
        if request.conversation is None:
            return True
        live = [*self.waiting.values(), *self.running.values()]
        return not any(r.conversation == request.conversation and r.seq < request.seq for r in live)

    def _on_end(self, event: ev.End) -> None:
        was_waiting = self.waiting.pop(event.request_id, None)
        was_running = self.running.pop(event.request_id, None)
        self._require(was_waiting is not None or was_running is not None, event, "only a live request ends, and once")
        if isinstance(event, ev.Expired):
            self._require(was_waiting is not None, event, "only who waits expires")
        if isinstance(event, ev.Finished | ev.Failed):
            self._require(was_running is not None, event, "only who runs finishes or fails")
        if was_running is not None and was_running.is_aborting:
            self._require(isinstance(event, ev.Cancelled), event, "who is aborted ends as cancelled")
        self.ended[event.request_id] = event

    def _running(self, event: ev.Tokens | ev.Requeued | ev.AbortRequested | ev.SlotReclaimed) -> _Request:
        self._require(event.request_id in self.running, event, "only who runs does this")
        return self.running[event.request_id]

    def _require(self, holds: bool, event: ev.Event, promise: str) -> None:
        if not holds:
            raise InvalidHistory(f"{promise}: broken by {event}")
