"""The scheduler of the server, in virtual time: one loop over whatever happens next, and no clock.

Nothing here decides anything about requests: calls arrive, the engine reports, timers fire, people lose patience, and
the scheduler is told, exactly as the asyncio shell tells it. What it decides is acted on by the simulated engine.
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
"""How often the engine reports where nobody says; `SimulatedEngine` has what depends on it."""
MAX_SAMPLES = 1_000
"""When there are so many, every other one is dropped and they are taken half as often: a run may last as it likes."""


class SchedulerLike(Protocol):
    """What the simulation asks of a scheduler. The baselines of the benchmark have it too."""

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
class Visit:
    """What became of a call. Times are virtual seconds; None: it never came to that."""

    call: Call
    attempts: int = 0
    admitted_s: float | None = None
    """By the last attempt."""
    started_s: float | None = None
    first_token_s: float | None = None
    ended_s: float | None = None
    end: str = ""
    """finished, expired, cancelled, failed, abandoned (nobody waited for it any more), or the code of a refusal."""
    generated_tokens: int = 0
    read_tokens: int = 0
    """Of the prompt."""
    num_preempted: int = 0
    told: Eta | None = None
    """Only of those who had to wait, and only where estimates were asked for."""

    @property
    def ttft_s(self) -> float | None:
        """From the time at which the client meant to send, its retries included, to the first token."""
        return None if self.first_token_s is None else self.first_token_s - self.call.at_s

    @property
    def waited_s(self) -> float | None:
        """From its place in line to its slot."""
        return None if self.started_s is None or self.admitted_s is None else self.started_s - self.admitted_s


class Sample(NamedTuple):
    """The line at one moment."""

    at_s: float
    running: int
    waiting: int


@dataclass(slots=True)
class Run:
    """Everything that happened."""

    visits: list[Visit]
    """In the order of the calls."""
    samples: list[Sample]
    end_s: float
    busy_slot_s: float
    """Seconds in which a slot was taken, summed over the slots."""
    num_events: int
    """Decisions of the scheduler."""


class LeakedRequest(AssertionError):
    """Somebody waits and nothing will ever happen again: a bug of the scheduler."""


Intervention = tuple[float, Callable[["Simulation", float], None]]
"""(time, what is done to the running simulation then): limits, the engine's speed, a look at the line."""


@dataclass(slots=True, kw_only=True)
class Simulation:
    """One run. Same arguments, same run: all chance is in `calls` and in `seed`."""

    scheduler: SchedulerLike
    engine_model: EngineModel = field(default_factory=EngineModel)
    clients: ClientBehaviour = field(default_factory=ClientBehaviour)
    seed: int = 0
    """Of the clients' jitter."""
    grain_tokens: int = GRAIN_TOKENS
    grain_prompt_tokens: int | None = None
    asks_eta: bool = False
    """Whoever waits is told an estimate on arrival."""
    is_exact: bool = False
    """The scheduler knows the progress of those who run to the token whenever a call arrives; a server does."""
    notices_disconnects: bool = True
    """Those who leave are cancelled."""
    can_preempt: bool = True
    """The engine can."""
    interventions: Sequence[Intervention] = ()
    sample_every_s: float | None = None
    """At first: there are never more than `MAX_SAMPLES`."""
    log: Callable[[ev.Event], None] | None = None
    """Gets every decision."""
    watch: Callable[[float], None] | None = None
    """Called with the time after everything that happens."""

    engine: SimulatedEngine = field(init=False)
    _rng: Random = field(init=False)
    _agenda: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = field(init=False, default_factory=list)
    _agenda_count: int = field(init=False, default=0)
    _visits: dict[str, Visit] = field(init=False, default_factory=dict)
    _num_open: int = field(init=False, default=0)
    _num_events: int = field(init=False, default=0)

    def __post_init__(self) -> None:
        self._rng = Random(f"clients {self.seed}")
        self.engine = SimulatedEngine(
            self.engine_model, grain_tokens=self.grain_tokens, grain_prompt_tokens=self.grain_prompt_tokens
        )

    def run(self, calls: Sequence[Call]) -> Run:
        """Until nobody waits or runs any more. `calls` must be sorted by time."""
        visits = [Visit(call) for call in calls]
        self._num_open = len(visits)
        for at_s, intervention in self.interventions:
            self._plan(at_s, self._intervene, intervention)
        engine, agenda, scheduler = self.engine, self._agenda, self.scheduler
        samples: list[Sample] = []
        sample_s, sample_every_s = 0.0 if self.sample_every_s else inf, self.sample_every_s or inf
        now_s = busy_slot_s = 0.0
        position = 0
        scheduler.open(0.0, can_preempt=self.can_preempt)
        self._act(0.0)
        while self._num_open:
            call_s = visits[position].call.at_s if position < len(visits) else inf
            engine_s = engine.next_s()
            agenda_s = agenda[0][0] if agenda else inf
            deadline_s = scheduler.next_deadline_s()
            then_s = min(call_s, engine_s, agenda_s, inf if deadline_s is None else deadline_s)
            if then_s == inf:
                raise LeakedRequest(f"{self._num_open} requests are left and nothing will ever happen to them")
            while sample_s <= then_s:
                samples.append(Sample(sample_s, len(engine), len(self._visits) - len(engine)))
                if len(samples) == MAX_SAMPLES:
                    del samples[1::2]
                    sample_every_s *= 2
                sample_s = samples[-1].at_s + sample_every_s
            busy_slot_s += (then_s - now_s) * len(engine)
            now_s = then_s
            if engine_s <= now_s:
                self._report(engine.take_next(), now_s)
            elif call_s <= now_s:
                self._send(visits[position], position, now_s)
                position += 1
            elif agenda_s <= now_s:
                _, _, action, arguments = heapq.heappop(agenda)
                action(*arguments, now_s)
            else:
                scheduler.handle_timer(now_s)
                self._act(now_s)
            if self.watch is not None:
                self.watch(now_s)
        return Run(visits, samples, now_s, busy_slot_s, self._num_events)

    # --- what happens -----------------------------------------------------------------------------------------

    def _send(self, visit: Visit, number: int, now_s: float) -> None:
        visit.attempts += 1
        call, request_id = visit.call, f"{number}.{visit.attempts}"
        if self.is_exact:
            self.report_progress(now_s)
        self._visits[request_id] = visit
        arrival = Arrival(request_id=request_id, client=call.client, priority=call.priority, max_wait_s=call.max_wait_s)
        try:
            self.scheduler.submit(arrival, now_s)
        except Overloaded as refusal:
            del self._visits[request_id]
            self._act(now_s)
            back_s = self.clients.back_s(call.at_s, visit.attempts, refusal.retry_after_s, now_s, self._rng)
            if back_s < inf:
                self._plan(back_s, self._send, visit, number)
            else:
                self._end(visit, refusal.code, now_s)
            return
        visit.admitted_s = now_s
        self._act(now_s)
        if self.clients.patience_s is not None and visit.first_token_s is None:
            self._plan(call.at_s + self.clients.patience_s, self._lose_patience, visit, request_id)
        if self.asks_eta and visit.started_s is None and visit.ended_s is None:
            visit.told = self.scheduler.eta(request_id, now_s)

    def _lose_patience(self, visit: Visit, request_id: str, now_s: float) -> None:
        if visit.first_token_s is not None or self._visits.get(request_id) is not visit:
            return
        if self.notices_disconnects:
            del self._visits[request_id]
            self.scheduler.cancel(request_id, "client", now_s)
        else:
            # Nobody reads it any more, but the server goes on.
            self._visits[request_id] = Visit(visit.call, ended_s=now_s, end="ghost")
        visit.started_s = None
        self._end(visit, "abandoned", now_s)
        self._act(now_s)

    def _report(self, report: Report, now_s: float) -> None:
        self._tell(report, now_s)
        if report.generation.is_complete:
            self.scheduler.on_ended(report.generation.grant, Outcome.FINISHED, "stop", now_s)
        self._act(now_s)

    def _tell(self, report: Report, now_s: float) -> None:
        generation, num_tokens, num_prompt_tokens = report
        if not num_tokens and not num_prompt_tokens:
            return
        visit = self._visits.get(generation.grant.request_id)
        if visit is not None:
            visit.generated_tokens += num_tokens
            visit.read_tokens += num_prompt_tokens
            if visit.first_token_s is None and num_tokens:
                visit.first_token_s = now_s
        self.scheduler.on_tokens(generation.grant, num_tokens, now_s, prompt_tokens=num_prompt_tokens)

    def report_progress(self, now_s: float) -> None:
        """Tell the scheduler of every token that was generated up to now."""
        for report in self.engine.unreported(now_s):
            self._tell(report, now_s)
        self._act(now_s)

    def _intervene(self, intervention: Callable[[Simulation, float], None], now_s: float) -> None:
        intervention(self, now_s)
        self._act(now_s)

    def _plan(self, at_s: float, action: Callable[..., None], *arguments: Any) -> None:
        self._agenda_count += 1
        heapq.heappush(self._agenda, (at_s, self._agenda_count, action, arguments))

    # --- what was decided -------------------------------------------------------------------------------------

    def _act(self, now_s: float) -> None:
        """Do what the scheduler has decided, until it has nothing more to say."""
        while events := self.scheduler.take_events():
            self._num_events += len(events)
            for event in events:
                if self.log is not None:
                    self.log(event)
                action = _ACTIONS.get(type(event))
                if action is not None:
                    action(self, event, now_s)

    def _on_started(self, event: ev.Started, now_s: float) -> None:
        visit = self._visits[event.request_id]
        visit.started_s = now_s
        self.engine.start(event.grant, visit.call.prompt_tokens, visit.call.output_tokens, now_s)

    def _on_resumed(self, event: ev.Resumed, now_s: float) -> None:
        self.engine.resume(event.grant, now_s)

    def _on_abort(self, event: ev.AbortRequested, now_s: float) -> None:
        # At once: a real engine needs at most one step more.
        self.engine.drop(event.request_id, now_s)
        self.scheduler.on_ended(event.grant, Outcome.CANCELLED, event.by, now_s)

    def _on_preempt(self, event: ev.PreemptRequested, now_s: float) -> None:
        if event.request_id not in self.engine:
            return  # the token that used up its slice was its last
        self.engine.preempt(event.request_id, now_s)
        visit = self._visits.get(event.request_id)
        if visit is not None:
            visit.num_preempted += 1
        self.scheduler.on_preempted(event.grant, now_s)

    def _on_end(self, event: ev.End, now_s: float) -> None:
        visit = self._visits.pop(event.request_id, None)
        if visit is None:
            return
        self._end(visit, _END_NAMES[type(event)], now_s)

    def _end(self, visit: Visit, how: str, now_s: float) -> None:
        if visit.ended_s is None:
            visit.ended_s, visit.end = now_s, how
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
