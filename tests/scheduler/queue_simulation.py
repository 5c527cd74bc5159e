"""A queue with K slots in virtual time: the ETA of each request on arrival, and its actual wait.

First come, first served; answers of known length on an engine of known speed. The load is W-conv: the parameters of a
public chat trace (Azure 2023, 19,366 requests).
"""

from __future__ import annotations

import heapq
from bisect import bisect
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from random import Random

from chatstream.scheduler.eta import Eta, EtaEstimator
from chatstream.scheduler.request import Arrival, LiveRequest

SLOTS = 4
PREFILL_S = 1 / 1000
"""Per prompt token."""
TOKEN_S = 0.02
MEAN_SERVICE_S = 1155 * PREFILL_S + 211 * TOKEN_S

PROMPT_QUANTILES = [
    (0.0, 20), (0.05, 181), (0.25, 396), (0.5, 1020), (0.75, 1189), (0.9, 2734), (0.95, 4083),
    (0.99, 4142), (1.0, 6000),
]  # fmt: skip
OUTPUT_MIX = [(0.284, 4.727, 1.021), (0.435, 4.573, 0.364), (0.281, 6.006, 0.05)]
"""Weight, mu and sigma of three log-normal distributions."""
MAX_OUTPUT = 1000


@dataclass(slots=True)
class Job:
    at_s: float
    prompt_tokens: int
    length: int
    client: str
    max_wait_s: float | None = None
    patience_s: float | None = None
    """The client disconnects after this wait, which the estimator does not know."""
    cancelled_at: int | None = None
    """The request is cancelled after this number of tokens."""
    max_new_tokens: int | None = None


def conv_jobs(
    random: Random,
    num: int,
    rho: Callable[[float], float] = lambda _: 0.9,
    factor: Callable[[float], float] = lambda _: 1.0,
    num_clients: int = 50,
) -> Iterator[Job]:
    """Random requests. `rho` (load as a share of capacity at factor 1) and `factor` (on lengths) are functions of the
    progress, 0 to 1."""
    now_s = 0.0
    for i in range(num):
        rate = rho(i / num) * SLOTS / MEAN_SERVICE_S
        now_s += random.gammavariate(0.87, 1 / 0.87) / rate
        level = random.random()
        k = bisect([q for q, _ in PROMPT_QUANTILES], level)
        (q1, n1), (q2, n2) = PROMPT_QUANTILES[k - 1 : k + 1]
        prompt = n1 + (level - q1) / (q2 - q1) * (n2 - n1)
        _, mu, sigma = random.choices(OUTPUT_MIX, [w for w, _, _ in OUTPUT_MIX])[0]
        length = min(random.lognormvariate(mu, sigma), MAX_OUTPUT) * factor(i / num)
        yield Job(now_s, round(prompt), max(1, round(length)), f"client-{random.randrange(num_clients)}")


@dataclass(slots=True)
class Wait:
    """One request that waited: its estimates on arrival, and its actual wait."""

    number: int
    ahead: int
    eta: Eta | None
    gradio_s: float | None
    waited_s: float


@dataclass(slots=True)
class Figures:
    """Over waits of at least one second."""

    num: int
    median_abs_error: float
    mae: float
    """Mean absolute error as a share of the mean wait."""
    bias: float
    coverage: float
    mean_wait_s: float


def figures(waits: list[Wait], *, gradio: bool = False) -> Figures:
    pairs = [(w.gradio_s if gradio else w.eta.p50_s, w.eta.p90_s, w.waited_s) for w in waits if w.eta is not None]
    pairs = [(p50, p90, w) for p50, p90, w in pairs if w >= 1.0 and p50 is not None]
    errors = sorted(abs(p50 - w) / w for p50, _, w in pairs)
    total = sum(w for _, _, w in pairs)
    return Figures(
        num=len(pairs),
        median_abs_error=errors[len(errors) // 2],
        mae=sum(abs(p50 - w) for p50, _, w in pairs) / total,
        bias=sum(p50 for p50, _, _ in pairs) / total - 1,
        coverage=sum(w <= p90 for _, p90, w in pairs) / len(pairs),
        mean_wait_s=total / len(pairs),
    )


@dataclass(slots=True)
class SimulatedQueue:
    estimator: EtaEstimator = field(default_factory=EtaEstimator)
    max_queue_size: int | None = None
    refresh_every_s: float | None = None
    waits: list[Wait] = field(default_factory=list)
    now_s: float = 0.0
    _jobs: dict[int, Job] = field(default_factory=dict)
    _waiting: deque[LiveRequest] = field(default_factory=deque)
    _gone: set[int] = field(default_factory=set)
    _running: dict[int, LiveRequest] = field(default_factory=dict)
    _estimates: dict[int, tuple[int, Eta | None, float | None]] = field(default_factory=dict)
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _numbers: Iterator[int] = field(default_factory=count)
    _served: int = 0
    _served_s: float = 0.0

    def run(self, jobs: Iterator[Job]) -> list[Wait]:
        for seq, job in enumerate(jobs):
            self._run_until(job.at_s)
            self._arrive(seq, job)
        self._run_until(float("inf"))
        return self.waits

    def _run_until(self, at_s: float) -> None:
        while self._events and self._events[0][0] <= at_s:
            self.now_s, _, act = heapq.heappop(self._events)
            act()
        self.now_s = min(at_s, max(at_s, self.now_s))

    def _schedule(self, at_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._numbers), act))

    def _arrive(self, seq: int, job: Job) -> None:
        num_ahead = len(self._waiting) - len(self._gone)
        if num_ahead and self.max_queue_size is not None and num_ahead >= self.max_queue_size:
            return
        arrival = Arrival(
            request_id=str(seq),
            client=job.client,
            prompt_tokens=job.prompt_tokens,
            max_new_tokens=job.max_new_tokens,
        )
        expires_s = None if job.max_wait_s is None else self.now_s + job.max_wait_s
        request = LiveRequest(arrival, seq, self.now_s, expires_s)
        self._jobs[seq] = job
        self._waiting.append(request)
        if len(self._running) < SLOTS:
            self._fill()
            return
        self._refresh()
        gradio_s = num_ahead * self._served_s / self._served / SLOTS if self._served else None
        self._estimates[seq] = num_ahead, self.estimator.at(num_ahead + 1, self.now_s), gradio_s
        for wait_s in (job.max_wait_s, job.patience_s):
            if wait_s is not None:
                self._schedule(self.now_s + wait_s, lambda: self._abandon(request))

    def _abandon(self, request: LiveRequest) -> None:
        if request.seq in self._estimates:
            del self._estimates[request.seq]
            self._gone.add(request.seq)
            self.estimator.on_abandoned(request, self.now_s)

    def _fill(self) -> None:
        while self._waiting and len(self._running) < SLOTS:
            request = self._waiting.popleft()
            if request.seq in self._gone:
                self._gone.remove(request.seq)
                continue
            estimates = self._estimates.pop(request.seq, None)
            if estimates is not None:
                ahead, eta, gradio_s = estimates
                waited_s = self.now_s - request.admitted_s
                self.waits.append(Wait(request.seq, ahead, eta, gradio_s, waited_s))
                if eta is not None:
                    self.estimator.measure(eta, waited_s)
            request.started_s = request.last_progress_s = self.now_s
            self._running[request.seq] = request
            self.estimator.on_started(request, self.now_s)
            self._schedule(self.now_s + self._service_s(request), lambda request=request: self._end(request))

    def _length(self, request: LiveRequest) -> int:
        job = self._jobs[request.seq]
        return min(n for n in (job.length, job.cancelled_at, job.max_new_tokens) if n is not None)

    def _service_s(self, request: LiveRequest) -> float:
        return request.arrival.prompt_tokens * PREFILL_S + self._length(request) * TOKEN_S

    def _end(self, request: LiveRequest) -> None:
        self._catch_up(request)
        self._served += 1
        self._served_s += self.now_s - request.started_s
        del self._running[request.seq]
        is_complete = self._length(request) != self._jobs[request.seq].cancelled_at
        self.estimator.on_ended(request, is_complete, self.now_s)
        del self._jobs[request.seq]
        self._fill()

    def _catch_up(self, request: LiveRequest) -> None:
        """Report the tokens since the last report to the estimator."""
        first_s = request.started_s + request.arrival.prompt_tokens * PREFILL_S + TOKEN_S
        tokens = min(int((self.now_s - first_s) / TOKEN_S + 1 + 1e-6), self._length(request))
        if tokens > 0 and request.generated_tokens == 0:
            self.estimator.on_tokens(request, 1, first_s)
            request.generated_tokens, request.last_progress_s = 1, first_s
        if tokens > request.generated_tokens:
            last_s = first_s + (tokens - 1) * TOKEN_S
            self.estimator.on_tokens(request, tokens - request.generated_tokens, last_s)
            request.generated_tokens, request.last_progress_s = tokens, last_s

    def _refresh(self) -> None:
        if self.estimator.is_stale(self.now_s):
            for request in self._running.values():
                self._catch_up(request)
            waiting = [request for request in self._waiting if request.seq not in self._gone]
            self.estimator.refresh([*self._running.values()], waiting, SLOTS, self.now_s)
