"""The one place that starts, ends and refuses requests.

Facts in, decisions out, nothing else:

    submit, cancel, on_tokens, on_ended, requeue, handle_timer, set_limits, open, drain     (each carries now_s)
    take_events()      the decisions since the last call, in order: the shell acts on them
    next_deadline_s()  when `handle_timer` must be called at the latest

Every method decides synchronously and completely. Whatever can change the picture ends in `_settle`, so after each
call no slot is free while somebody who may start waits.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass, field
from math import inf, nextafter

from chatstream.errors import ConfigError, Overloaded, QueueFull, ShuttingDown
from chatstream.scheduler import events as ev
from chatstream.scheduler.deadlines import Deadlines
from chatstream.scheduler.limits import ConcurrencyLimit, FixedLimit, check_count, check_seconds
from chatstream.scheduler.queues import QUEUES, WaitingQueue
from chatstream.scheduler.request import Arrival, LiveRequest
from chatstream.scheduler.retry_after import ServiceTime, retry_after_s
from chatstream.scheduler.slots import Grant, Slots
from chatstream.scheduler.states import Outcome, State, Trigger

LATE_TIMER_S = 1.0
"""A timer that comes so late says more about the one who called than about the engine."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerSettings:
    """Checked when built; a wrong value raises `ConfigError` that names it."""

    max_concurrency: int = 2
    """Generations at the same time. 2 is the original's default."""
    max_queue_size: int = 5
    """Requests that may wait beside the running ones; 0 refuses whoever cannot start at once."""
    policy: str = "fcfs"
    max_wait_s: float | None = None
    """Give up whoever has waited so long; a request may ask for less, not for more. None: for ever."""
    stall_timeout_s: float | None = 300.0
    """Take the slot from a generation that made no progress for so long. Longer than any honest prefill."""
    abort_timeout_s: float | None = 30.0
    """Take the slot from an engine that does not let go of a cancelled request."""
    max_attempts: int = 2
    """Starts of one request, when the engine fails before its first token."""

    def __post_init__(self) -> None:
        check_count("max_concurrency", self.max_concurrency, at_least=1)
        check_count("max_queue_size", self.max_queue_size, at_least=0)
        check_count("max_attempts", self.max_attempts, at_least=1)
        if self.policy not in QUEUES:
            raise ConfigError(f"policy must be one of {', '.join(QUEUES)}, not {self.policy!r}", param="policy")
        for name in ("max_wait_s", "stall_timeout_s", "abort_timeout_s"):
            check_seconds(name, getattr(self, name))


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerStats:
    """The only source for status pages, metrics and logs. Counts are since the scheduler was made."""

    max_concurrency: int
    max_queue_size: int
    policy: str
    is_open: bool
    is_draining: bool
    running: int
    """Slots in use."""
    waiting: int
    received: int
    rejected: int
    finished: int
    cancelled: int
    failed: int
    expired: int
    requeued: int
    slots_reclaimed: int
    """The watchdog had to free a slot: must stay 0."""
    stale_reports: int
    """Reports that came after the slot had changed hands, and were ignored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestView:
    """One live request, for people who look at the queue. Seconds are ages at the time of the call."""

    request_id: str
    client: str
    priority: int
    position: int | None
    """None while it runs."""
    slot: int | None
    """None while it waits."""
    generated_tokens: int
    waited_s: float
    running_s: float
    last_progress_s_ago: float


@dataclass(slots=True)
class _Counts:
    received: int = 0
    rejected: int = 0
    requeued: int = 0
    slots_reclaimed: int = 0
    stale_reports: int = 0
    ended: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))


class Scheduler:
    """Admits at most `max_concurrency` + `max_queue_size` requests and runs at most `max_concurrency` of them.

    Both numbers are exact, also for any number of calls within one instant. Closed at first: requests are held, and
    start once `open` is called.
    """

    def __init__(
        self,
        settings: SchedulerSettings | None = None,
        *,
        queue: WaitingQueue | None = None,
        limit: ConcurrencyLimit | None = None,
    ) -> None:
        settings = settings or SchedulerSettings()
        self._settings = settings
        self._queue = queue if queue is not None else QUEUES[settings.policy]()
        self._limit = limit or FixedLimit(settings.max_concurrency)
        self._max_queue_size = settings.max_queue_size
        self._is_open = False
        self._is_draining = False
        self._live: dict[str, LiveRequest] = {}
        self._slots = Slots()
        # Live requests of each conversation in order of admission; only the first of each may run.
        self._conversations: dict[str, OrderedDict[int, LiveRequest]] = {}
        self._deadlines = Deadlines()
        self._service_time = ServiceTime()
        self._next_seq = 0
        self._counts = _Counts()
        self._events: deque[ev.Event] = deque()
        self._num_events = 0

    def __repr__(self) -> str:
        return (
            f"<Scheduler running={len(self._slots)}/{self._limit.value} "
            f"waiting={len(self._queue)}/{self._max_queue_size} {self._settings.policy}"
            f"{'' if self._is_open else ' closed'}{' draining' if self._is_draining else ''}>"
        )

    # --- facts in ---------------------------------------------------------------------------------------------

    def submit(self, arrival: Arrival, now_s: float) -> None:
        """A request is at the door. When this returns it holds a place or a slot.

        Raises `QueueFull` or `ShuttingDown`, both with `retry_after_s`; the request is then forgotten.
        `request_id` must not be live.
        """
        assert arrival.request_id not in self._live, f"{arrival.request_id} is live already"
        self._fire_deadlines(now_s)
        self._counts.received += 1
        self._emit(ev.Received, now_s, arrival.request_id, arrival.client, arrival.conversation)
        refusal = self._refusal(arrival, now_s)
        if refusal is not None:
            self._counts.rejected += 1
            self._emit(ev.Rejected, now_s, arrival.request_id, refusal.code, refusal.retry_after_s)
            raise refusal
        self._admit(arrival, now_s)
        self._settle(now_s)

    def on_tokens(self, grant: Grant, count: int, now_s: float) -> None:
        """The engine generated `count` tokens. Ignored when the grant is stale."""
        request = self._holder(grant)
        if request is None:
            return
        request.generated_tokens += count
        request.last_progress_s = now_s
        self._emit(ev.Tokens, now_s, grant.request_id, count, request.generated_tokens)

    def on_ended(self, grant: Grant, outcome: Outcome, detail: str, now_s: float) -> None:
        """The engine has let go of the request. `detail`: finish reason, error code, or who cancelled it.

        Ignored when the grant is stale. A request that was being aborted ends as cancelled whatever the engine says.
        """
        request = self._holder(grant)
        if request is not None:
            if request.state is State.ABORTING:
                outcome, detail = Outcome.CANCELLED, request.abort_by
            self._end(request, outcome, detail, now_s)
        self._settle(now_s)

    def requeue(self, grant: Grant, now_s: float) -> bool:
        """The engine failed through no fault of the request. True: it is back in its old place and starts again.

        False when it must be ended instead: tokens were delivered, its attempts are used up, it is being aborted,
        the scheduler drains, or the grant is stale.
        """
        request = self._holder(grant)
        if (
            request is None
            or request.state is not State.RUNNING
            or request.generated_tokens > 0
            or request.attempt >= self._settings.max_attempts
            or self._is_draining
        ):
            return False
        self._vacate(request)
        request.move(Trigger.REQUEUE)
        self._counts.requeued += 1
        self._emit(ev.Requeued, now_s, request.request_id, grant)
        self._queue.push(request, held=False)
        self._watch_expiry(request)
        self._settle(now_s)
        return True

    def cancel(self, request_id: str, by: str, now_s: float) -> bool:
        """Somebody wants it to end. A waiting request ends at once; a running one ends when the engine lets go.

        Idempotent. False when no such request is live.
        """
        request = self._live.get(request_id)
        if request is None:
            return False
        if request.state is State.WAITING:
            self._end(request, Outcome.CANCELLED, by, now_s)
        elif request.state is State.RUNNING:
            self._abort(request, by, now_s)
        self._settle(now_s)
        return True

    def handle_timer(self, now_s: float) -> None:
        """Call at `next_deadline_s()` or soon after. Calling it at other times is harmless."""
        self._settle(now_s)

    def set_limits(
        self, now_s: float, *, max_concurrency: int | None = None, max_queue_size: int | None = None, by: str = ""
    ) -> None:
        """Change either limit at once; nobody is lost. Lowering lets those who run or wait stay.

        Raises `ConfigError` and changes nothing when either number is impossible.
        """
        if max_queue_size is not None:
            check_count("max_queue_size", max_queue_size, at_least=0)
        if max_concurrency is not None:
            self._limit.set(max_concurrency)
        if max_queue_size is not None:
            self._max_queue_size = max_queue_size
        self._emit(ev.LimitsChanged, now_s, self._limit.value, self._max_queue_size, by)
        self._settle(now_s)

    def open(self, now_s: float) -> None:
        """Requests start from now on; also ends a drain."""
        self._is_open, self._is_draining = True, False
        self._emit(ev.Opened, now_s)
        self._settle(now_s)

    def drain(self, now_s: float) -> None:
        """Admit nothing, start nothing, end everybody who waits. Running ones go on; they are the caller's to abort."""
        self._is_open, self._is_draining = False, True
        self._emit(ev.DrainStarted, now_s)
        for request in list(self._queue):
            self._end(request, Outcome.CANCELLED, "shutdown", now_s)
        self._settle(now_s)

    # --- decisions out ----------------------------------------------------------------------------------------

    def take_events(self) -> list[ev.Event]:
        """Everything decided since the last call, in order. The caller must take them after every call."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def next_deadline_s(self) -> float | None:
        """When `handle_timer` is due; None: nothing happens by itself."""
        return self._deadlines.next_s()

    def position(self, request_id: str) -> int | None:
        """1 for the next to start; None when it does not wait. O(log n)."""
        request = self._live.get(request_id)
        if request is None or request.state is not State.WAITING:
            return None
        return self._queue.position(request)

    def retry_after_s(self, now_s: float) -> float:
        """The expected wait of a request that joined the full queue now, within 1 to 120 s. O(slots)."""
        # A refusal must stay cheap: those that run are looked at only until the first one has ended.
        has_basis = self._service_time.has_basis
        ages_s = [] if has_basis else [now_s - self._live[grant.request_id].started_s for grant in self._slots]
        return retry_after_s(
            num_waiting=len(self._queue),
            max_concurrency=self._limit.value,
            mean_service_s=self._service_time.mean_s(ages_s),
        )

    def is_live(self, request_id: str) -> bool:
        return request_id in self._live

    def is_held(self, request_id: str) -> bool:
        """It waits for an earlier request of its own conversation."""
        request = self._live.get(request_id)
        if request is None or request.arrival.conversation is None:
            return False
        return next(iter(self._conversations[request.arrival.conversation])) != request.seq

    def stats(self) -> SchedulerStats:
        counts = self._counts
        return SchedulerStats(
            max_concurrency=self._limit.value,
            max_queue_size=self._max_queue_size,
            policy=self._settings.policy,
            is_open=self._is_open,
            is_draining=self._is_draining,
            running=len(self._slots),
            waiting=len(self._queue),
            received=counts.received,
            rejected=counts.rejected,
            finished=counts.ended[Outcome.FINISHED],
            cancelled=counts.ended[Outcome.CANCELLED],
            failed=counts.ended[Outcome.FAILED],
            expired=counts.ended[Outcome.EXPIRED],
            requeued=counts.requeued,
            slots_reclaimed=counts.slots_reclaimed,
            stale_reports=counts.stale_reports,
        )

    def requests(self, now_s: float) -> list[RequestView]:
        """Every live request: the running ones by slot, then the waiting ones by position. O(n), for people."""
        running = sorted((r for r in self._live.values() if r.grant), key=lambda r: r.grant.slot if r.grant else 0)
        views = [_view(request, None, now_s) for request in running]
        views += [_view(request, place, now_s) for place, request in enumerate(self._queue, start=1)]
        return views

    # --- the decisions ----------------------------------------------------------------------------------------

    def _settle(self, now_s: float) -> None:
        """Whatever is due, then starts until a limit is reached or nobody may start."""
        self._fire_deadlines(now_s)
        while self._is_open and len(self._slots) < self._limit.value:
            request = self._queue.take()
            if request is None:
                return
            self._start(request, now_s)

    def _refusal(self, arrival: Arrival, now_s: float) -> Overloaded | None:
        if self._is_draining:
            return ShuttingDown("the server is shutting down", retry_after_s=self.retry_after_s(now_s))
        free = max(0, self._limit.value - len(self._slots))
        if self._is_open:
            # Nobody who may start is waiting for these slots, but an earlier request of the same conversation may
            # keep this one from taking one.
            places = self._max_queue_size if arrival.conversation in self._conversations or not free else None
        else:
            places = self._max_queue_size + free
        if places is None or len(self._queue) < places:
            return None
        return QueueFull(
            f"all {self._limit.value} slots and all {self._max_queue_size} waiting places are taken",
            retry_after_s=self.retry_after_s(now_s),
        )

    def _admit(self, arrival: Arrival, now_s: float) -> None:
        request = LiveRequest(arrival, self._next_seq, now_s)
        self._next_seq += 1
        waits_s = [w for w in (arrival.max_wait_s, self._settings.max_wait_s) if w is not None]
        # However short the wait, a free slot is taken first: it ends after this instant.
        request.expires_s = max(now_s + min(waits_s), nextafter(now_s, inf)) if waits_s else None
        self._live[request.request_id] = request
        is_held = False
        if arrival.conversation is not None:
            turns = self._conversations.setdefault(arrival.conversation, OrderedDict())
            is_held = bool(turns)
            turns[request.seq] = request
        self._queue.push(request, held=is_held)
        self._watch_expiry(request)
        self._emit(ev.Admitted, now_s, request.request_id, request.seq, self._queue.position(request))

    def _start(self, request: LiveRequest, now_s: float) -> None:
        request.move(Trigger.START)
        request.attempt += 1
        request.started_s = request.last_progress_s = now_s
        request.grant = self._slots.acquire(request.request_id, request.attempt)
        if self._settings.stall_timeout_s is not None:
            self._watch_stall(request, request.grant, now_s + self._settings.stall_timeout_s)
        self._emit(ev.Started, now_s, request.request_id, request.grant, now_s - request.admitted_s)

    def _abort(self, request: LiveRequest, by: str, now_s: float) -> None:
        assert request.grant is not None
        request.move(Trigger.ABORT)
        request.abort_by = by
        self._emit(ev.AbortRequested, now_s, request.request_id, request.grant, by)
        if self._settings.abort_timeout_s is not None:
            self._watch_abort(request, request.grant, now_s + self._settings.abort_timeout_s)

    def _end(self, request: LiveRequest, outcome: Outcome, detail: str, now_s: float) -> None:
        """The one way out: slot or place, conversation and record are given back together."""
        if request.grant is not None:
            self._service_time.add(now_s - request.started_s)
            self._vacate(request)
        else:
            self._queue.discard(request)
        request.move(Trigger.END)
        del self._live[request.request_id]
        self._leave_conversation(request)
        self._counts.ended[outcome] += 1
        self._emit_end(request, outcome, detail, now_s)

    def _vacate(self, request: LiveRequest) -> None:
        """The only place where a slot becomes free."""
        assert request.grant is not None
        self._slots.release(request.grant)
        request.grant = None

    def _leave_conversation(self, request: LiveRequest) -> None:
        conversation = request.arrival.conversation
        if conversation is None:
            return
        turns = self._conversations[conversation]
        was_first = next(iter(turns)) == request.seq
        del turns[request.seq]
        if not turns:
            del self._conversations[conversation]
        elif was_first:
            self._queue.unhold(next(iter(turns.values())))

    def _holder(self, grant: Grant) -> LiveRequest | None:
        """The request behind a report; None (and counted) when the slot has changed hands since."""
        if not self._slots.is_current(grant):
            self._counts.stale_reports += 1
            return None
        return self._live[grant.request_id]

    # --- deadlines --------------------------------------------------------------------------------------------

    def _fire_deadlines(self, now_s: float) -> None:
        while (deadline := self._deadlines.pop_due(now_s)) is not None:
            deadline.fire(now_s)

    def _watch_expiry(self, request: LiveRequest) -> None:
        if request.expires_s is not None:
            attempt = request.attempt
            self._watch(
                request.expires_s,
                is_pointless=lambda: request.state is not State.WAITING or request.attempt != attempt,
                fire=lambda now_s: self._end(request, Outcome.EXPIRED, "", now_s),
            )

    def _watch_stall(self, request: LiveRequest, grant: Grant, at_s: float) -> None:
        """Tokens do not move this deadline, they only make it look again when it fires: nothing to pay per token."""

        def fire(now_s: float) -> None:
            timeout_s = self._settings.stall_timeout_s or 0.0
            due_s = request.last_progress_s + timeout_s
            if now_s < due_s:
                self._watch_stall(request, grant, due_s)
            elif now_s - at_s > LATE_TIMER_S:
                # The shell was held up, so its reports of progress may be held up too: look again.
                self._watch_stall(request, grant, now_s + timeout_s)
            else:
                self._reclaim(request, grant, "no progress", now_s)

        self._watch(at_s, is_pointless=lambda: not self._slots.is_current(grant), fire=fire)

    def _watch_abort(self, request: LiveRequest, grant: Grant, at_s: float) -> None:
        self._watch(
            at_s,
            is_pointless=lambda: not self._slots.is_current(grant),
            fire=lambda now_s: self._reclaim(request, grant, "did not let go", now_s),
        )

    def _reclaim(self, request: LiveRequest, grant: Grant, why: str, now_s: float) -> None:
        self._counts.slots_reclaimed += 1
        self._emit(ev.SlotReclaimed, now_s, request.request_id, grant, why)
        if request.state is State.ABORTING:
            self._end(request, Outcome.CANCELLED, request.abort_by, now_s)
        else:
            self._end(request, Outcome.FAILED, "engine_error", now_s)

    def _watch(self, at_s: float, *, is_pointless: Callable[[], bool], fire: Callable[[float], None]) -> None:
        self._deadlines.add(at_s, is_pointless=is_pointless, fire=fire, num_live=len(self._live))

    # --- events -----------------------------------------------------------------------------------------------

    def _emit(self, kind: Callable[..., ev.Event], now_s: float, *details: object) -> None:
        self._events.append(kind(self._num_events, now_s, *details))
        self._num_events += 1

    def _emit_end(self, request: LiveRequest, outcome: Outcome, detail: str, now_s: float) -> None:
        if outcome is Outcome.EXPIRED:
            self._emit(ev.Expired, now_s, request.request_id, now_s - request.admitted_s)
        else:
            self._emit(_END_EVENTS[outcome], now_s, request.request_id, detail, request.generated_tokens)


_END_EVENTS: dict[Outcome, Callable[..., ev.Event]] = {
    Outcome.FINISHED: ev.Finished,
    Outcome.CANCELLED: ev.Cancelled,
    Outcome.FAILED: ev.Failed,
}


def _view(request: LiveRequest, position: int | None, now_s: float) -> RequestView:
    is_running = request.grant is not None
    return RequestView(
        request_id=request.request_id,
        client=request.client,
        priority=request.priority,
        position=position,
        slot=request.grant.slot if request.grant else None,
        generated_tokens=request.generated_tokens,
        waited_s=(request.started_s if is_running else now_s) - request.admitted_s,
        running_s=now_s - request.started_s if is_running else 0.0,
        last_progress_s_ago=now_s - request.last_progress_s if is_running else 0.0,
    )
