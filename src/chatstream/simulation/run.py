"""Discrete-event simulation of the server in virtual time.

The loop takes the earliest of the next arrival, engine report, timer and client action, and reports it to the scheduler
as the asyncio runtime does. All decisions are those of the scheduler; the simulated engine carries them out.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from math import inf
from random import Random
from typing import Any, NamedTuple, Protocol

from chatstream.errors import Overloaded
from chatstream.scheduler import Arrival, Eta, Grant, Outcome
from chatstream.scheduler import events as ev
from chatstream.simulation.clients import ClientBehaviour
from chatstream.simulation.engine import EngineModel, Report, SimulatedEngine
from chatstream.simulation.workloads import Call

GRAIN_TOKENS = 256
"""Default interval of engine reports in tokens; see `SimulatedEngine` for its effect."""
MAX_SAMPLES = 1_000
"""At this number every other sample is dropped and the interval doubles, so that a long run stays bounded."""


class SchedulerLike(Protocol):
    """The methods of a scheduler that the simulation calls. The baselines of the benchmark implement them too."""

    def open(self, now_s: float, *, can_preempt: bool = False) -> None: ...
    def submit(self, arrival: Arrival, now_s: float) -> None: ...
    def on_tokens(self, grant: Grant, count: int, now_s: float, *, prompt_tokens: int = 0) -> None: ...
    def on_preempted(self, grant: Grant, now_s: float) -> None: ...
    def on_ended(self, grant: Grant, outcome: Outcome, detail: str, now_s: float) -> None: ...
    def cancel(self, request_id: str, by: str, now_s: float) -> bool: ...
    def handle_timer(self, now_s: float) -> None: ...
    def next_deadline_s(self) -> float | None: ...
    def take_events(self) -> list[ev.Event]: ...
    def eta(self, request_id: str, now_s: float) -> Eta | None: ...


@dataclass(slots=True, eq=False)
class CallRecord:
    """The outcome of a call. Times are virtual seconds; None means that the event did not happen."""

    call: Call
    attempts: int = 0
    admitted_s: float | None = None
    """Time of admission of the last attempt."""
    started_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    end: str = ""
    """finished, expired, cancelled, failed, abandoned (the client gave up), or the error code of a rejection."""
    generated_tokens: int = 0
    read_tokens: int = 0
    """Computed prompt tokens."""
    num_preempted: int = 0
    eta: Eta | None = None
    """Estimate on arrival; only for requests that waited, and only with `records_eta`."""

    @property
    def ttft_s(self) -> float | None:
        """Seconds from the intended time of the first attempt to the first token, retries included."""
        return None if self.first_token_s is None else self.first_token_s - self.call.at_s

    @property
    def waited_s(self) -> float | None:
        """Seconds from admission to the start."""
        return None if self.started_s is None or self.admitted_s is None else self.started_s - self.admitted_s


class Sample(NamedTuple):
    """Numbers of running and waiting requests at one moment."""

    at_s: float
    running: int
    waiting: int


@dataclass(slots=True)
class Run:
    """The results of a simulation."""

    records: list[CallRecord]
    """In the order of the calls."""
    samples: list[Sample]
    end_s: float
    busy_slot_s: float
    """Seconds of slots in use, summed over the slots."""
    num_events: int
    """Number of scheduler events."""


class LeakedRequest(AssertionError):
    """A request has not ended and no event remains: a bug in the scheduler."""


Intervention = tuple[float, Callable[["Simulation", float], None]]
"""(time, function): called with the running simulation and the time, to change limits or speed, or to inspect state."""


@dataclass(slots=True, kw_only=True)
class Simulation:
    """One run. Equal arguments give equal runs: all randomness comes from `calls` and `seed`."""

    scheduler: SchedulerLike
    engine_model: EngineModel = field(default_factory=EngineModel)
    clients: ClientBehaviour = field(default_factory=ClientBehaviour)
    seed: int = 0
    """Seed of the clients' jitter."""
    grain_tokens: int = GRAIN_TOKENS
    grain_prompt_tokens: int | None = None
    records_eta: bool = False
    """Record the ETA of each waiting request on its arrival."""
    is_exact: bool = False
    """Report the exact progress of running requests before each arrival, as a server does."""
    notices_disconnects: bool = True
    """Cancel the request of a client that gives up."""
    can_preempt: bool = True
    """Whether the engine can preempt."""
    interventions: Sequence[Intervention] = ()
    sample_every_s: float | None = None
    """Initial interval of the samples; it doubles whenever there are `MAX_SAMPLES`."""
    log: Callable[[ev.Event], None] | None = None
    """Called with every event of the scheduler."""
    watch: Callable[[float], None] | None = None
    """Called with the time after each event of the simulation."""

    engine: SimulatedEngine = field(init=False)
    _rng: Random = field(init=False)
    _agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(init=False, default_factory=list)
    _agenda_count: int = field(init=False, default=0)
    _records: dict[str, CallRecord] = field(init=False, default_factory=dict)
    _num_open: int = field(init=False, default=0)
    _num_events: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._rng = Random(f"clients {self.seed}")
        self.engine = SimulatedEngine(
            self.engine_model, grain_tokens=self.grain_tokens, grain_prompt_tokens=self.grain_prompt_tokens
        )

    def run(self, calls: Sequence[Call]) -> Run:
        """Run until every call has ended. `calls` must be sorted by time. Raises `LeakedRequest`."""
        records = [CallRecord(call) for call in calls]
        self._num_open = len(records)
        for at_s, intervention in self.interventions:
            self._schedule(at_s, self._intervene, intervention)
        engine, agenda, scheduler = self.engine, self._agenda, self.scheduler
        samples: list[Sample] = []
        sample_s, sample_every_s = 0.0 if self.sample_every_s else inf, self.sample_every_s or inf
        now_s = busy_slot_s = 0.0
        position = 0
        scheduler.open(0.0, can_preempt=self.can_preempt)
        self._apply_decisions(0.0)
        while self._num_open:
            call_s = records[position].call.at_s if position < len(records) else inf
            engine_s = engine.next_s()
            agenda_s = agenda[0][0] if agenda else inf
            deadline_s = scheduler.next_deadline_s()
            then_s = min(call_s, engine_s, agenda_s, inf if deadline_s is None else deadline_s)
            if then_s == inf:
                raise LeakedRequest(f"{self._num_open} requests have not ended, and no event is scheduled for them")
            while sample_s <= then_s:
                samples.append(Sample(sample_s, len(engine), len(self._records) - len(engine)))
                if len(samples) == MAX_SAMPLES:
                    del samples[1::2]
                    sample_every_s *= 2
                sample_s = samples[-1].at_s + sample_every_s
            busy_slot_s += (then_s - now_s) * len(engine)
            now_s = then_s
            if engine_s <= now_s:
                self._report(engine.take_next(), now_s)
            elif call_s <= now_s:
                self._send(records[position], position, now_s)
                position += 1
            elif agenda_s <= now_s:
                _, _, action, arguments = heapq.heappop(agenda)
                action(*arguments, now_s)
            else:
                scheduler.handle_timer(now_s)
                self._apply_decisions(now_s)
            if self.watch is not None:
                self.watch(now_s)
        return Run(records, samples, now_s, busy_slot_s, self._num_events)

    # --- inputs of the scheduler ------------------------------------------------------------------------------

    def _send(self, record: CallRecord, number: int, now_s: float) -> None:
        record.attempts += 1
        call, request_id = record.call, f"{number}.{record.attempts}"
        if self.is_exact:
            self.report_progress(now_s)
        self._records[request_id] = record
        arrival = Arrival(request_id=request_id, client=call.client, priority=call.priority, max_wait_s=call.max_wait_s)
        try:
            self.scheduler.submit(arrival, now_s)
        except Overloaded as refusal:
            del self._records[request_id]
            self._apply_decisions(now_s)
            retry_at_s = self.clients.retry_at_s(call.at_s, record.attempts, refusal.retry_after_s, now_s, self._rng)
            if retry_at_s < inf:
                self._schedule(retry_at_s, self._send, record, number)
            else:
                self._end(record, refusal.code, now_s)
            return
        record.admitted_s = now_s
        self._apply_decisions(now_s)
        if self.clients.patience_s is not None and record.first_token_s is None:
            self._schedule(call.at_s + self.clients.patience_s, self._abandon, record, request_id)
        if self.records_eta and record.started_s is None and record.ended_s is None:
            record.eta = self.scheduler.eta(request_id, now_s)

    def _abandon(self, record: CallRecord, request_id: str, now_s: float) -> None:
        if record.first_token_s is not None or self._records.get(request_id) is not record:
            return
        if self.notices_disconnects:
            del self._records[request_id]
            self.scheduler.cancel(request_id, "client", now_s)
        else:
            # The server does not notice the disconnect and keeps serving the request.
            self._records[request_id] = CallRecord(record.call, ended_s=now_s, end="ghost")
        record.started_s = None
        self._end(record, "abandoned", now_s)
        self._apply_decisions(now_s)

    def _report(self, report: Report, now_s: float) -> None:
        self._record_progress(report, now_s)
        if report.generation.is_complete:
            self.scheduler.on_ended(report.generation.grant, Outcome.FINISHED, "stop", now_s)
        self._apply_decisions(now_s)

    def _record_progress(self, report: Report, now_s: float) -> None:
        generation, num_tokens, num_prompt_tokens = report
        if not num_tokens and not num_prompt_tokens:
            return
        record = self._records.get(generation.grant.request_id)
        if record is not None:
            record.generated_tokens += num_tokens
            record.read_tokens += num_prompt_tokens
            if record.first_token_s is None and num_tokens:
                record.first_token_s = now_s
        self.scheduler.on_tokens(generation.grant, num_tokens, now_s, prompt_tokens=num_prompt_tokens)

    def report_progress(self, now_s: float) -> None:
        """Report all tokens generated up to now to the scheduler."""
        for report in self.engine.unreported(now_s):
            self._record_progress(report, now_s)
        self._apply_decisions(now_s)

    def _intervene(self, intervention: Callable[[Simulation, float], None], now_s: float) -> None:
        intervention(self, now_s)
        self._apply_decisions(now_s)

    def _schedule(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._agenda_count += 1
        heapq.heappush(self._agenda, (at_s, self._agenda_count, action, arguments))

    # --- decisions of the scheduler ---------------------------------------------------------------------------

    def _apply_decisions(self, now_s: float) -> None:
        """Carry out the events of the scheduler until there are none."""
        while events := self.scheduler.take_events():
            self._num_events += len(events)
            for event in events:
                if self.log is not None:
                    self.log(event)
                action = _ACTIONS.get(type(event))
                if action is not None:
                    action(self, event, now_s)

    def _on_started(self, event: ev.Started, now_s: float) -> None:
        record = self._records[event.request_id]
        record.started_s = now_s
        self.engine.start(event.grant, record.call.prompt_tokens, record.call.output_tokens, now_s)

    def _on_resumed(self, event: ev.Resumed, now_s: float) -> None:
        self.engine.resume(event.grant, now_s)

    def _on_abort(self, event: ev.AbortRequested, now_s: float) -> None:
        # Immediate, where a real engine needs at most one more step.
        self.engine.drop(event.request_id, now_s)
        self.scheduler.on_ended(event.grant, Outcome.CANCELLED, event.by, now_s)

    def _on_preempt(self, event: ev.PreemptRequested, now_s: float) -> None:
        if event.request_id not in self.engine:
            return  # the last token of the answer also used up the time slice
        self.engine.preempt(event.request_id, now_s)
        record = self._records.get(event.request_id)
        if record is not None:
            record.num_preempted += 1
        self.scheduler.on_preempted(event.grant, now_s)

    def _on_end(self, event: ev.End, now_s: float) -> None:
        record = self._records.pop(event.request_id, None)
        if record is None:
            return
        self._end(record, _END_NAMES[type(event)], now_s)

    def _end(self, record: CallRecord, how: str, now_s: float) -> None:
        if record.ended_s is None:
            record.ended_s, record.end = now_s, how
            self._num_open -= 1


_END_NAMES: dict[type, str] = {
    ev.Finished: "finished",
    ev.Expired: "expired",
    ev.Cancelled: "cancelled",
    ev.Failed: "failed",
}
_ACTIONS: dict[type, Callable[[Simulation, Any, float], None]] = {
    ev.Started: Simulation._on_started,
    ev.Resumed: Simulation._on_resumed,
    ev.PreemptRequested: Simulation._on_preempt,
    ev.AbortRequested: Simulation._on_abort,
    **dict.fromkeys(_END_NAMES, Simulation._on_end),
}
