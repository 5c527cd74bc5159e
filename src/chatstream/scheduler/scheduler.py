"""The state machine that starts, preempts, ends and rejects requests.

Facts go in as method calls, decisions come out as events:

    submit, cancel, on_tokens, on_preempted, on_ended, requeue, handle_timer       requests and engine, each with now_s
    set_limits, set_policy, pause, unpause, open, drain                            operator
    take_events()      the decisions since the last call, in order: the shell acts on them
    next_deadline_s()  the latest time for the next call of `handle_timer`

Every method decides synchronously and completely. Every method that changes the state ends in `_settle`, so after each
call no slot is free while an eligible request waits.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import islice

from chatstream.errors import ConfigError, Infeasible, Overloaded, Paused, ShuttingDown
from chatstream.scheduler import events as ev
from chatstream.scheduler.admission import Admission
from chatstream.scheduler.deadlines import Deadlines
from chatstream.scheduler.eta import EtaEstimator, smoothed
from chatstream.scheduler.limits.adaptive import AdaptiveLimit
from chatstream.scheduler.limits.fixed import ConcurrencyLimit, FixedLimit
from chatstream.scheduler.policies import WaitingQueue
from chatstream.scheduler.recent_mean import RecentMean
from chatstream.scheduler.request import Arrival, Eta, LiveRequest, SentEta
from chatstream.scheduler.retry_after import CLOSED_RETRY_AFTER_S, clamped, expected_wait_s
from chatstream.scheduler.settings import Auto, SchedulerSettings, check_policy, check_queue_size
from chatstream.scheduler.slots import Grant, Slots
from chatstream.scheduler.states import Outcome, Phase, State, Trigger
from chatstream.scheduler.views import RequestView, SchedulerStats, running_view, waiting_view
from chatstream.scheduler.waiting import WaitingRequests
from chatstream.types import WaitsFor

# In Python 3.11 a lookup in an enum class costs more than the comparison that it is for.
_CLOSED, _OPEN, _DRAINING = Phase.CLOSED, Phase.OPEN, Phase.DRAINING
_PREEMPTED, _LEAVING = State.PREEMPTED, State.LEAVING

LATE_TIMER_S = 1.0
"""Past this lateness the event loop was blocked; do not blame the engine for a stall."""

SLICE_WAIT_S = 1.0
"""A time slice ends only for a request that has waited this long. The engine may have to compute a preempted
generation again; a shorter wait does not justify that."""


@dataclass(slots=True)
class _Counts:
    received: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    generated_tokens: int = 0
    requeued: int = 0
    slots_reclaimed: int = 0
    stale_reports: int = 0
    ended: dict[Outcome, int] = field(default_factory=lambda: dict.fromkeys(Outcome, 0))


class Scheduler:
    """Admits at most `max_concurrency` + `max_queue_size` requests and runs at most `max_concurrency` of them.

    Both limits are exact, also for any number of calls within one instant. Closed at first: requests wait, and start
    once `open` is called.
    """

    def __init__(
        self,
        settings: SchedulerSettings | None = None,
        *,
        queue: WaitingQueue | None = None,
    ) -> None:
        """`queue` replaces the queue of `settings.policy`."""
        settings = settings or SchedulerSettings()
        self._settings = settings
        self._waiting = WaitingRequests(settings, queue)
        self._etas = EtaEstimator()
        self._admission = Admission(settings, self._etas)
        self._adaptive = _adaptive_limit(settings)
        self._limit: ConcurrencyLimit = self._adaptive or FixedLimit(settings.first_concurrency)
        self._engine_limit: int | None = None
        self._phase = _CLOSED
        self._is_paused = False
        self._can_preempt = False
        self._live: dict[str, LiveRequest] = {}
        self._slots = Slots()
        self._num_in: Counter[State] = Counter(dict.fromkeys(State, 0))
        self._deadlines = Deadlines()
        self._service_s = RecentMean()
        self._next_seq = 0
        self._counts = _Counts()
        self._events: deque[ev.Event] = deque()
        self._num_events = 0

    def __repr__(self) -> str:
        words = [
            f"running={len(self._slots)}/{self._max_concurrency}",
            f"waiting={len(self._waiting)}/{self._admission.bound.value}",
            self._waiting.policy,
        ]
        words += ["" if self._phase is _OPEN else self._phase, "paused" if self._is_paused else ""]
        return f"<Scheduler {' '.join(filter(None, words))}>"

    # --- requests and engine ----------------------------------------------------------------------------------

    def submit(self, arrival: Arrival, now_s: float) -> None:
        """Admit a request. On return it waits or runs.

        Raises a subclass of `Overloaded`, with `retry_after_s`, when the request is rejected; nothing is kept of it.
        No live request may have the same `request_id`.
        """
        assert arrival.request_id not in self._live, f"{arrival.request_id} is already live"
        self._fire_deadlines(now_s)
        self._counts.received += 1
        self._emit(ev.Received, now_s, arrival.request_id, arrival.client, arrival.conversation)
        try:
            self._admit(arrival, now_s)
        except Overloaded as refusal:
            refusal.retry_after_s = self.retry_after_s(now_s)
            self._counts.rejected += 1
            self._emit(ev.Rejected, now_s, arrival.request_id, refusal.code, refusal.retry_after_s)
            self._settle(now_s)  # an expired deadline may have freed a slot
            raise
        self._settle(now_s)

    def on_tokens(self, grant: Grant, count: int, now_s: float, *, prompt_tokens: int = 0) -> None:
        """The engine computed `prompt_tokens` of the prompt and generated `count` tokens.

        Ignored when the grant is stale.
        """
        request = self._request_of(grant)
        if request is None:
            return
        self._counts.prompt_tokens += prompt_tokens
        self._counts.generated_tokens += count
        has_new_limit = False
        if count:
            has_new_limit = self._measure_gap(request, count, now_s)
            request.generated_tokens += count
            request.slice_tokens += count
        request.last_progress_s = now_s
        self._waiting.charge(request, prompt_tokens=prompt_tokens, tokens=count)
        if count:
            self._emit(ev.Tokens, now_s, grant.request_id, count, request.generated_tokens)
        if self._can_preempt:
            self._end_slice(request, now_s)
        if has_new_limit:
            self._settle(now_s)  # last, because a deadline of this request may be due

    def on_preempted(self, grant: Grant, now_s: float) -> None:
        """The engine has preempted the request as `PreemptRequested` asked. Ignored when the grant is stale."""
        self._fire_deadlines(now_s)  # an expired successor must not start
        request = self._request_of(grant)
        if request is not None and request.state is State.PREEMPTING:
            self._preempted(request, now_s)
        self._settle(now_s)

    def on_ended(self, grant: Grant, outcome: Outcome, detail: str, now_s: float) -> None:
        """The engine has released the request. `detail`: finish reason, error code, or origin of the cancellation.

        Ignored when the grant is stale. A cancelled request ends as cancelled, whatever `outcome` the engine reports.
        """
        request = self._request_of(grant)
        if request is not None:
            if request.is_aborted:
                outcome, detail = Outcome.CANCELLED, request.abort_by
            self._end(request, outcome, detail, now_s)
        self._settle(now_s)

    def requeue(self, grant: Grant, now_s: float) -> bool:
        """The engine failed through no fault of the request. True: the request waits again, with its original rank.

        False when the caller must end the request instead: tokens were delivered, its attempts are used up, it was
        cancelled, the scheduler drains, or the grant is stale.
        """
        request = self._request_of(grant)
        if (
            request is None
            or request.state is not State.RUNNING
            or request.generated_tokens > 0
            or request.attempt >= self._settings.max_attempts
            or self._phase is _DRAINING
        ):
            return False
        self._release_slot(request, now_s)
        self._move(request, Trigger.REQUEUE)
        self._waiting.end_run(request)
        self._counts.requeued += 1
        self._emit(ev.Requeued, now_s, request.request_id, grant)
        self._waiting.rejoin(request)
        self._watch_expiry(request)
        self._settle(now_s)
        return True

    def cancel(self, request_id: str, by: str, now_s: float) -> bool:
        """Cancel a request. A waiting request ends at once; a started one ends when the engine releases it.

        `by` names the origin of the cancellation. Idempotent. False when no such request is live.
        """
        request = self._live.get(request_id)
        if request is None:
            return False
        if request.state is State.WAITING:
            self._end(request, Outcome.CANCELLED, by, now_s)
        elif not request.is_aborted:
            self._abort(request, by, now_s)
        self._settle(now_s)
        return True

    def handle_timer(self, now_s: float) -> None:
        """Fire the deadlines that are due. Call at `next_deadline_s()` or soon after; other calls are harmless."""
        self._settle(now_s)

    # --- operator ---------------------------------------------------------------------------------------------

    def set_limits(
        self,
        now_s: float,
        *,
        max_concurrency: int | None = None,
        max_queue_size: int | Auto | None = None,
        by: str = "",
        why: str = "",
    ) -> None:
        """Change one or both limits at once. No request ends: a lower limit is reached as requests end or start.

        Raises `ConfigError` and changes nothing when either number is invalid.
        """
        if max_queue_size is not None:
            check_queue_size(max_queue_size)
        if max_concurrency is not None:
            most = self._settings.max_resident
            if most is not None and isinstance(max_concurrency, int) and max_concurrency > most:
                raise ConfigError(f"max_concurrency must be at most max_resident ({most})", param="max_concurrency")
            self._limit.set(max_concurrency)
            self._etas.invalidate()
        if max_queue_size is not None:
            self._admission.bound.set(max_queue_size)
        self._adapt_bound()
        self._emit_limits(now_s, by, why)
        self._settle(now_s)

    def set_policy(self, name: str, now_s: float, *, by: str = "", why: str = "") -> None:
        """Order the queue by another policy from now on; no request is lost. Idempotent.

        Raises `ConfigError` for an unknown policy. O(n log n) in the number of waiting requests.
        """
        check_policy(name)
        if name == self._waiting.policy:
            return  # a new queue would lose the service counts of the clients
        self._waiting.set_policy(name)
        self._etas.invalidate()
        self._emit(ev.PolicyChanged, now_s, name, by, why)
        self._settle(now_s)

    def pause(self, now_s: float, *, by: str = "", why: str = "") -> None:
        """Reject new requests; waiting and running requests continue. Idempotent."""
        if not self._is_paused:
            self._is_paused = True
            self._emit(ev.Paused, now_s, by, why)
        self._settle(now_s)

    def unpause(self, now_s: float, *, by: str = "", why: str = "") -> None:
        """Admit new requests again. Idempotent."""
        if self._is_paused:
            self._is_paused = False
            self._emit(ev.Unpaused, now_s, by, why)
        self._settle(now_s)

    def open(
        self,
        now_s: float,
        *,
        can_preempt: bool = False,
        engine_limit: int | None = None,
        by: str = "",
        why: str = "",
    ) -> None:
        """Start requests from now on; also ends a drain. Idempotent.

        `can_preempt`: the engine can preempt a generation. `engine_limit`: maximum number of sequences in the engine;
        the concurrency limit in force is never higher.
        """
        was_open, self._phase = self._phase is _OPEN, _OPEN
        self._can_preempt, self._engine_limit = can_preempt, engine_limit
        if not was_open:
            self._emit(ev.Opened, now_s, by, why)
        self._settle(now_s)

    def drain(self, now_s: float, *, at_most: int | None = None, by: str = "", why: str = "") -> bool:
        """Admit no request, start no request, and cancel those that have not started. Idempotent.

        Started requests continue; the caller may cancel them. `at_most`: cancel at most this number of requests; the
        caller must call again while the result is True: more may remain.
        """
        was_draining, self._phase = self._phase is _DRAINING, _DRAINING
        if not was_draining:
            self._emit(ev.DrainStarted, now_s, by, why)
        not_started = list(islice((r for r in self._waiting if not r.is_preempted), at_most))
        for request in not_started:
            self._end(request, Outcome.CANCELLED, "shutdown", now_s)
        self._settle(now_s)
        return len(not_started) == at_most

    # --- events and queries -----------------------------------------------------------------------------------

    def take_events(self) -> list[ev.Event]:
        """Remove and return the events since the last call, in order. Call after every call of another method."""
        taken = list(self._events)
        self._events.clear()
        return taken

    def next_deadline_s(self) -> float | None:
        """When `handle_timer` is due; None: there is no deadline."""
        return self._deadlines.next_s()

    def position(self, request_id: str) -> int | None:
        """Position in the queue, from 1; None when the request does not wait. O(log n).

        Exact when `is_exact`, else an estimate.
        """
        request = self._waiting_request(request_id)
        return None if request is None else self._waiting.position(request)

    @property
    def is_exact(self) -> bool:
        """True when positions never grow.

        Not where a falling limit preempts requests: they wait again, ahead of requests that have not started.
        """
        return self._waiting.is_exact and not (self._can_preempt and self._adaptive is not None)

    def eta(self, request_id: str, now_s: float) -> Eta | None:
        """The ETA to send to the client of a waiting request, in seconds from now.

        None when the request does not wait or is held, and before the estimates have a basis. The first ETA is compared
        with the actual start (`stats().eta`). O(log n), plus a simulation of the queue at most twice a second for all
        requests together.
        """
        request = self._waiting_request(request_id)
        if request is None or not self._waiting.is_eligible(request):
            return None  # the duration of the hold is unknown
        self._refresh_etas(now_s)
        position = self._waiting.position(request)
        fresh = self._etas.at(position, now_s)
        if fresh is None:
            return None
        last = request.last_sent_eta
        if last is not None:
            may_jump = position > last.position or self._etas.epoch != last.epoch
            fresh = smoothed(last.eta, last.sent_s, fresh, now_s, may_jump=may_jump)
        request.last_sent_eta = SentEta(fresh, now_s, position, self._etas.epoch)
        if request.first_sent_eta is None and not request.is_preempted:
            request.first_sent_eta = request.last_sent_eta
        return fresh

    def retry_after_s(self, now_s: float) -> float:
        """The expected wait of a request that arrived now, within 1 to 120 s.

        O(1), plus a simulation of the queue at most twice a second; O(slots) until the first answer is complete.
        """
        self._refresh_etas(now_s)
        eta = self._etas.at(len(self._waiting) + 1, now_s)
        wait_s = self._wait_without_estimates_s(now_s) if eta is None else eta.p50_s
        if self._phase is _DRAINING or self._is_paused:
            wait_s = max(wait_s, CLOSED_RETRY_AFTER_S)
        return clamped(wait_s)

    def _wait_without_estimates_s(self, now_s: float) -> float:
        mean_s = self._service_s.value
        if mean_s is None:
            # No generation has ended yet: assume that each running one is half way through.
            ages_s = [now_s - request.started_s for request in self._running()]
            mean_s = 2 * sum(ages_s) / len(ages_s) if ages_s else 0.0
        return expected_wait_s(
            num_waiting=len(self._waiting), max_concurrency=self._max_concurrency, mean_service_s=mean_s
        )

    def is_live(self, request_id: str) -> bool:
        return request_id in self._live

    def waits_for(self, request_id: str) -> WaitsFor | None:
        """Why the request waits; None when it does not wait."""
        request = self._waiting_request(request_id)
        return None if request is None else self._waits_for(request)

    def _waits_for(self, request: LiveRequest) -> WaitsFor:
        if not self._waiting.is_first_of_conversation(request):
            return "conversation"
        if not self._waiting.is_eligible(request):
            return "client_limit"
        return "opening" if self._phase is _CLOSED else "slot"

    def stats(self) -> SchedulerStats:
        counts = self._counts
        return SchedulerStats(
            max_concurrency=self._max_concurrency,
            max_queue_size=self._admission.bound.value,
            policy=self._waiting.policy,
            phase=self._phase,
            is_paused=self._is_paused,
            running=len(self._slots),
            waiting=len(self._waiting),
            preempting=self._num_in[State.PREEMPTING],
            preempted=self._num_in[_PREEMPTED],
            leaving=self._num_in[_LEAVING],
            received=counts.received,
            rejected=counts.rejected,
            finished=counts.ended[Outcome.FINISHED],
            cancelled=counts.ended[Outcome.CANCELLED],
            failed=counts.ended[Outcome.FAILED],
            expired=counts.ended[Outcome.EXPIRED],
            prompt_tokens=counts.prompt_tokens,
            generated_tokens=counts.generated_tokens,
            requeued=counts.requeued,
            slots_reclaimed=counts.slots_reclaimed,
            stale_reports=counts.stale_reports,
            eta=self._etas.stats(),
        )

    def records(self) -> dict[str, int]:
        """Sizes of the internal records, for debuggers and tests. All are 0 when no request is live.

        `eligibility_keys`: conversations and clients with live requests, at most 2 for each live request.
        `waiting_clients`, `waiting_tokens`: clients and estimated tokens of the waiting requests. `deadlines`: at most
        4 for each live request and 64 more; obsolete ones are included until `next_deadline_s` removes them.
        """
        return {
            "eligibility_keys": self._waiting.num_eligibility_keys,
            "waiting_clients": self._waiting.num_clients,
            "waiting_tokens": self._waiting.tokens,
            "deadlines": len(self._deadlines),
        }

    def requests(self, now_s: float, limit: int | None = None) -> list[RequestView]:
        """All requests with a slot, by slot, then the first `limit` waiting requests, by position. O(n)."""
        self._refresh_etas(now_s)
        running = sorted((r for r in self._running()), key=lambda r: r.grant.slot if r.grant else 0)
        views = [running_view(request, now_s) for request in running]
        for position, request in enumerate(islice(self._waiting, limit), start=1):
            eta = self._etas.at(position, now_s) if self._waiting.is_eligible(request) else None
            views.append(waiting_view(request, position, self._waits_for(request), eta, now_s))
        return views

    # --- admission, start and end -----------------------------------------------------------------------------

    @property
    def _max_concurrency(self) -> int:
        """The concurrency limit in force."""
        return self._limit.value if self._engine_limit is None else min(self._limit.value, self._engine_limit)

    def _settle(self, now_s: float) -> None:
        """Fire the deadlines that are due, then start requests until a limit is reached or none is eligible."""
        self._fire_deadlines(now_s)
        self._fill_free_slots(now_s)
        why = self._waiting.take_failure()
        if why is not None:
            self._emit(ev.PolicyChanged, now_s, self._waiting.policy, "scheduler", why)

    def _fill_free_slots(self, now_s: float) -> None:
        while self._phase is not _CLOSED and len(self._slots) < self._max_concurrency:
            request = self._waiting.take(may_start_new=self._may_start_new())
            if request is None:
                return
            self._start(request, now_s)

    def _admit(self, arrival: Arrival, now_s: float) -> None:
        """Raises `Overloaded` when the request is rejected; nothing is kept of it."""
        self._check_intake()
        request = LiveRequest(arrival, self._next_seq, now_s)
        request.waiting_tokens = self._admission.expected_tokens(arrival)
        request.expires_s = self._admission.latest_start_s(arrival, now_s)
        is_eligible = self._waiting.would_be_eligible(arrival)
        slots, free = self._max_concurrency, max(0, self._max_concurrency - len(self._slots))
        num_starting = min(free, self._waiting.num_eligible) if self._phase is _CLOSED else 0
        starts_at_once = is_eligible and num_starting < free
        if not starts_at_once:
            self._admission.check_room(
                request, self._waiting, num_starting=num_starting, num_free=free, num_slots=slots
            )
        self._next_seq += 1  # also when rejected below: no queue may see a number twice
        self._waiting.enter(request)
        position = self._waiting.position(request)
        if not starts_at_once and is_eligible:
            self._check_feasible(request, position, now_s)
        self._live[request.request_id] = request
        self._num_in[request.state] += 1
        self._watch_expiry(request)
        self._emit(ev.Admitted, now_s, request.request_id, request.seq, position)

    def _check_intake(self) -> None:
        if self._phase is _DRAINING:
            raise ShuttingDown("the server is shutting down")
        if self._is_paused:
            raise Paused("the server is paused: it admits no new requests")

    def _check_feasible(self, request: LiveRequest, position: int, now_s: float) -> None:
        """Raises `Infeasible`, and removes the request from the queue, when it would start too late.

        Called after the request has entered, because only the queue knows its position.
        """
        if request.expires_s is None or not self._settings.admit_probability:
            return
        self._refresh_etas(now_s)
        try:
            self._admission.check_feasible(request, position, now_s)
        except Infeasible:
            self._waiting.withdraw(request)
            self._waiting.end(request)
            raise

    def _start(self, request: LiveRequest, now_s: float) -> None:
        was_preempted = request.is_preempted
        self._move(request, Trigger.START)
        if not was_preempted:
            request.attempt += 1
            request.started_s = now_s
        request.slot_since_s = request.last_progress_s = now_s
        request.slice_tokens = 0
        request.grant = self._slots.acquire(request.request_id, request.attempt)
        if self._settings.stall_timeout_s is not None:
            self._watch_stall(request, request.grant, now_s + self._settings.stall_timeout_s)
        self._etas.on_started(request, now_s)
        if was_preempted:
            self._emit(ev.Resumed, now_s, request.request_id, request.grant, now_s - request.preempted_s)
        else:
            error_s = self._measure_eta_error(request, now_s)
            self._emit(ev.Started, now_s, request.request_id, request.grant, now_s - request.admitted_s, error_s)

    def _abort(self, request: LiveRequest, by: str, now_s: float) -> None:
        assert request.grant is not None
        if request.is_preempted:
            self._waiting.withdraw(request)
        self._move(request, Trigger.ABORT)
        request.abort_by = by
        self._emit(ev.AbortRequested, now_s, request.request_id, request.grant, by)
        if self._settings.abort_timeout_s is not None:
            self._watch_release(request, request.grant, now_s + self._settings.abort_timeout_s)

    def _end(self, request: LiveRequest, outcome: Outcome, detail: str, now_s: float) -> None:
        """End a request in any state: release its slot or position, its eligibility keys and its record together."""
        if request.state is State.WAITING:
            self._waiting.withdraw(request)
            self._etas.on_abandoned(request, now_s)
        else:
            if request.holds_slot:
                self._release_slot(request, now_s)
            elif request.is_preempted:
                self._waiting.withdraw(request)
            self._waiting.end_run(request)
            self._etas.on_ended(request, outcome is Outcome.FINISHED, now_s)
            if outcome is Outcome.FINISHED:
                # Only complete answers count: early cancellations must not make the server look faster.
                self._service_s.add(request.slot_time_s)
                self._admission.learn(request.generated_tokens)
            if self._adapt_bound():
                self._emit_limits(now_s, "auto", f"a generation takes {self._service_s.value:.1f} s on average")
        self._move(request, Trigger.END)
        del self._live[request.request_id]
        self._waiting.end(request)
        self._counts.ended[outcome] += 1
        self._emit_end(request, outcome, detail, now_s)

    def _release_slot(self, request: LiveRequest, now_s: float) -> None:
        """The only method that frees a slot."""
        assert request.grant is not None
        self._slots.release(request.grant)
        request.slot_time_s += now_s - request.slot_since_s

    def _move(self, request: LiveRequest, trigger: Trigger) -> None:
        self._num_in[request.state] -= 1
        request.move(trigger)
        self._num_in[request.state] += 1

    def _request_of(self, grant: Grant) -> LiveRequest | None:
        """The request that a report concerns. None when the grant is stale, which is counted."""
        request = self._live.get(grant.request_id)
        if request is None or request.state is State.WAITING or request.grant != grant:
            self._counts.stale_reports += 1
            return None
        return request

    def _running(self) -> Iterator[LiveRequest]:
        return (self._live[grant.request_id] for grant in self._slots)

    def _waiting_request(self, request_id: str) -> LiveRequest | None:
        request = self._live.get(request_id)
        return request if request is not None and request.state in (State.WAITING, State.PREEMPTED) else None

    # --- time slices and adaptive concurrency -----------------------------------------------------------------

    def _end_slice(self, request: LiveRequest, now_s: float) -> None:
        """Preempt the request if its time slice is used up and its successor has waited long enough."""
        own = self._waiting.slice_tokens
        slice_tokens = own or self._settings.slice_tokens
        if slice_tokens is None or request.slice_tokens < slice_tokens or request.state is not State.RUNNING:
            return
        if len(self._slots) > self._max_concurrency:
            return  # the limit has fallen: no request would get the slot
        successor = self._successor(request)
        if successor is None:
            return
        waits_since_s = successor.preempted_s if successor.is_preempted else successor.admitted_s
        if own is not None or now_s - waits_since_s >= SLICE_WAIT_S:
            self._preempt(request, "slice", now_s)

    def _may_start_new(self) -> bool:
        """False when only a preempted request may take a free slot: the engine is at `max_resident`, or the scheduler
        drains."""
        if self._phase is _DRAINING:
            return False
        return not self._num_in[_PREEMPTED] or self._num_resident < self._max_resident

    @property
    def _num_resident(self) -> int:
        """Requests with state in the engine: running, preempted and leaving."""
        return len(self._slots) + self._num_in[_PREEMPTED] + self._num_in[_LEAVING]

    @property
    def _max_resident(self) -> int:
        return self._settings.max_resident or 2 * self._max_concurrency

    def _successor(self, request: LiveRequest) -> LiveRequest | None:
        # Each other request that is being preempted will hand its slot to one more resident request.
        others = self._num_in[State.PREEMPTING] - (request.state is State.PREEMPTING)
        may_start_new = self._num_resident + others < self._max_resident and self._phase is not _DRAINING
        return self._waiting.successor(request, may_start_new=may_start_new)

    def _preempt(self, request: LiveRequest, why: str, now_s: float) -> None:
        assert request.grant is not None
        self._move(request, Trigger.PREEMPT)
        self._emit(ev.PreemptRequested, now_s, request.request_id, request.grant, why)
        if self._settings.abort_timeout_s is not None:
            self._watch_release(request, request.grant, now_s + self._settings.abort_timeout_s)

    def _preempted(self, request: LiveRequest, now_s: float) -> None:
        assert request.grant is not None
        # Choose the successor before the request rejoins the queue, where it would often be first itself.
        is_slot_available = self._phase is _OPEN and len(self._slots) <= self._max_concurrency
        successor = self._successor(request) if is_slot_available else None
        self._release_slot(request, now_s)
        self._move(request, Trigger.PREEMPTED)
        request.preempted_s = now_s
        self._emit(ev.Preempted, now_s, request.request_id, request.grant)
        self._waiting.rejoin(request)
        if successor is not None:
            self._waiting.start(successor)
            self._start(successor, now_s)

    def _measure_gap(self, request: LiveRequest, count: int, now_s: float) -> bool:
        """Report the gap before these tokens. True when the limit has changed: the caller must settle."""
        self._etas.on_tokens(request, count, now_s)
        # Skip the first gap of a slice: it contains the time without a slot.
        if self._adaptive is None or not request.slice_tokens:
            return False
        gap_s = (now_s - request.last_progress_s) / count
        move = self._adaptive.observe(gap_s, len(self._slots), len(self._waiting), now_s)
        if move is None:
            return False
        self._etas.invalidate()
        self._adapt_bound()
        self._emit_limits(now_s, "adaptive", move.why)
        if self._can_preempt:
            self._shrink(now_s)
        return True

    def _shrink(self, now_s: float) -> None:
        """Preempt the requests above the limit, latest start first. Requires an engine that can preempt."""
        surplus = len(self._slots) - self._num_in[State.PREEMPTING] - self._max_concurrency
        if surplus > 0:
            running = [request for request in self._running() if request.state is State.RUNNING]
            for request in sorted(running, key=lambda request: (request.started_s, request.seq))[-surplus:]:
                self._preempt(request, "limit", now_s)

    def _adapt_bound(self) -> bool:
        mean_s = self._service_s.value
        return mean_s is not None and self._admission.bound.adapt(mean_s, self._max_concurrency)

    # --- estimates --------------------------------------------------------------------------------------------

    def _refresh_etas(self, now_s: float) -> None:
        if self._etas.is_stale(now_s):
            self._etas.refresh(list(self._running()), self._waiting, self._max_concurrency, now_s)

    def _measure_eta_error(self, request: LiveRequest, now_s: float) -> float | None:
        first = request.first_sent_eta
        if first is None:
            return None
        request.first_sent_eta = None  # measured once, also if the engine fails and the request starts again
        waited_s = now_s - first.sent_s
        self._etas.measure(first.eta, waited_s)
        return first.eta.p50_s - waited_s

    # --- deadlines --------------------------------------------------------------------------------------------

    def _fire_deadlines(self, now_s: float) -> None:
        while (deadline := self._deadlines.pop_due(now_s)) is not None:
            deadline.fire(now_s)

    def _watch_expiry(self, request: LiveRequest) -> None:
        if request.expires_s is not None:
            attempt = request.attempt
            self._watch(
                request.expires_s,
                is_obsolete=lambda: request.state is not State.WAITING or request.attempt != attempt,
                fire=lambda now_s: self._end(request, Outcome.EXPIRED, "", now_s),
            )

    def _watch_stall(self, request: LiveRequest, grant: Grant, at_s: float) -> None:
        """Reclaim the slot after `stall_timeout_s` without progress.

        Tokens do not move the deadline; when it fires, it checks the last progress. So a token costs nothing.
        """

        def fire(now_s: float) -> None:
            timeout_s = self._settings.stall_timeout_s or 0.0
            due_s = request.last_progress_s + timeout_s
            if now_s < due_s:
                self._watch_stall(request, grant, due_s)
            elif now_s - at_s > LATE_TIMER_S:
                # The event loop was blocked, so reports of progress may be late too: check again later.
                self._watch_stall(request, grant, now_s + timeout_s)
            else:
                self._reclaim(request, grant, "no progress", now_s)

        self._watch(at_s, is_obsolete=lambda: not self._slots.is_current(grant), fire=fire)

    def _watch_release(self, request: LiveRequest, grant: Grant, at_s: float) -> None:
        """Reclaim the slot if the engine has not released the request by `at_s`."""
        state = request.state
        self._watch(
            at_s,
            is_obsolete=lambda: request.state is not state or request.grant is not grant,
            fire=lambda now_s: self._reclaim(request, grant, "not released", now_s),
        )

    def _reclaim(self, request: LiveRequest, grant: Grant, why: str, now_s: float) -> None:
        if request.holds_slot:
            self._counts.slots_reclaimed += 1
            self._emit(ev.SlotReclaimed, now_s, request.request_id, grant, why)
        if request.is_aborted:
            self._end(request, Outcome.CANCELLED, request.abort_by, now_s)
        else:
            self._end(request, Outcome.FAILED, "engine_error", now_s)

    def _watch(self, at_s: float, *, is_obsolete: Callable[[], bool], fire: Callable[[float], None]) -> None:
        self._deadlines.add(at_s, is_obsolete=is_obsolete, fire=fire, num_live=len(self._live))

    # --- events -----------------------------------------------------------------------------------------------

    def _emit(self, kind: Callable[..., ev.Event], now_s: float, *details: object) -> None:
        self._events.append(kind(self._num_events, now_s, *details))
        self._num_events += 1

    def _emit_limits(self, now_s: float, by: str, why: str) -> None:
        self._emit(ev.LimitsChanged, now_s, self._max_concurrency, self._admission.bound.value, by, why)

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


def _adaptive_limit(settings: SchedulerSettings) -> AdaptiveLimit | None:
    if not settings.is_adaptive:
        return None
    return AdaptiveLimit(
        initial=settings.first_concurrency,
        floor=settings.min_concurrency,
        ceiling=settings.highest_concurrency,
        target_itl_s=settings.itl_target_s,
    )
