"""A simulated server around a policy: slots, a queue and a clock. It measures service independently of the policy.

One step is one second, in which a running request prefills `chunk_tokens` of its prompt or generates one token.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import combinations

from chatstream.scheduler import Arrival, LiveRequest, WaitingQueue
from chatstream.scheduler.states import State, Trigger

PROMPT_COST, TOKEN_COST = 1, 2


def request(
    seq: int,
    client: str = "",
    *,
    at_s: float = 0.0,
    priority: int = 0,
    prompt_tokens: int = 0,
    max_new_tokens: int | None = None,
) -> LiveRequest:
    arrival = Arrival(
        request_id=f"r{seq}",
        client=client,
        priority=priority,
        prompt_tokens=prompt_tokens,
        max_new_tokens=max_new_tokens,
    )
    return LiveRequest(arrival, seq, admitted_s=at_s)


def start(member: LiveRequest) -> LiveRequest:
    """Move a taken request, or a successor, to RUNNING."""
    member.move(Trigger.START)
    return member


def preempt(member: LiveRequest) -> LiveRequest:
    """Move a running request to PREEMPTED."""
    member.move(Trigger.PREEMPT)
    member.move(Trigger.PREEMPTED)
    return member


def take(queue: WaitingQueue) -> LiveRequest:
    """Take and start the next request, which must exist."""
    member = queue.take()
    assert member is not None
    return start(member)


def seqs(members: Iterable[LiveRequest]) -> list[int]:
    return [member.seq for member in members]


@dataclass(eq=False)
class Job:
    """A request with its true lengths, which only the engine has."""

    request: LiveRequest
    prompt_tokens: int
    answer_tokens: int
    read_tokens: int = 0
    slice_tokens: int = 0

    @property
    def size(self) -> int:
        return self.prompt_tokens + self.answer_tokens


@dataclass
class Service:
    queue: WaitingQueue
    num_slots: int
    chunk_tokens: int = 1_000_000
    max_resident: int = 1_000_000
    reports_prompts: bool = True
    now_s: float = 0.0
    running: list[Job] = field(default_factory=list)
    served: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float))
    """Service units of each client: prompt tokens + 2 * generated tokens."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Waiting requests of each client."""
    waiting_new: Counter[str] = field(default_factory=Counter)
    """Those of `waiting` that have not started."""
    clients: dict[int, str] = field(default_factory=dict)
    """Client of each request, by seq."""
    submitted_s: dict[int, float] = field(default_factory=dict)
    waited_s: dict[int, float] = field(default_factory=dict)
    """Wait of each started request, by seq."""
    started: list[int] = field(default_factory=list)
    largest_batch_tokens: int = 0
    """Largest sum of prompt and answer tokens of the requests that ran or were preempted at the same time."""
    num_preempted: int = 0
    _next_seq: int = 0
    _num_resident: int = 0
    _batch_tokens: int = 0
    _jobs: dict[int, Job] = field(default_factory=dict)

    def submit(
        self, client: str, prompt_tokens: int, answer_tokens: int, *, priority: int = 0, estimate: int | None = None
    ) -> LiveRequest:
        """`estimate`: estimated prompt tokens on arrival; default: exact."""
        seq = self._next_seq
        self._next_seq += 1
        expected = prompt_tokens if estimate is None else estimate
        member = request(seq, client, at_s=self.now_s, priority=priority, prompt_tokens=expected)
        self._jobs[seq] = Job(member, prompt_tokens, answer_tokens)
        self.queue.push(member, held=False)
        self.clients[seq] = client
        self.submitted_s[seq] = self.now_s
        self.waiting[client] += 1
        self.waiting_new[client] += 1
        self._fill()
        return member

    def step(self) -> None:
        self.now_s += 1
        for job in list(self.running):
            self._advance(job)
        self._fill()

    def _advance(self, job: Job) -> None:
        member = job.request
        read = min(self.chunk_tokens, job.prompt_tokens - job.read_tokens)
        num_generated = 0 if read else 1
        job.read_tokens += read
        job.slice_tokens += num_generated
        member.generated_tokens += num_generated
        self.served[member.client] += PROMPT_COST * read + TOKEN_COST * num_generated
        self.queue.charge(member, prompt_tokens=read if self.reports_prompts else 0, tokens=num_generated)
        if member.generated_tokens >= job.answer_tokens and not read:
            self.running.remove(job)
            self.queue.end_run(member)
            del self._jobs[member.seq]
            self._num_resident -= 1
            self._batch_tokens -= job.size
            member.move(Trigger.END)
        elif self.queue.slice_tokens is not None and job.slice_tokens >= self.queue.slice_tokens:
            self._end_slice(job)

    def _end_slice(self, job: Job) -> None:
        successor = self.queue.successor(job.request, may_start_new=self._num_resident < self.max_resident)
        if successor is None:
            return
        self.num_preempted += 1
        self.running.remove(job)
        self.queue.push(preempt(job.request), held=False)
        self.waiting[job.request.client] += 1
        self.queue.start(successor)
        self._start(successor)

    def _fill(self) -> None:
        while len(self.running) < self.num_slots and (member := self.queue.take()) is not None:
            self._start(member)

    def _start(self, member: LiveRequest) -> None:
        self.waiting[member.client] -= 1
        if member.state is State.WAITING:
            self.waited_s[member.seq] = self.now_s - member.admitted_s
            self.started.append(member.seq)
            self.waiting_new[member.client] -= 1
            self._num_resident += 1
            self._batch_tokens += self._jobs[member.seq].size
            self.largest_batch_tokens = max(self.largest_batch_tokens, self._batch_tokens)
        start(member)
        job = self._jobs[member.seq]
        job.slice_tokens = 0
        self.running.append(job)


class Gaps:
    """The paper's measure of unfairness: the largest |W_f(t1, t2) - W_g(t1, t2)| over all pairs of clients.

    Both clients have waiting requests all the time from t1 to t2; W is service over weight.
    """

    def __init__(self, clients: list[str], weights: Mapping[str, float]) -> None:
        self._weights = {client: weights.get(client, 1.0) for client in clients}
        self._pairs = list(combinations(clients, 2))
        self._ranges: dict[tuple[str, str], tuple[float, float]] = {}
        self.largest = 0.0

    def measure(self, served: Mapping[str, float], is_backlogged: Mapping[str, bool]) -> None:
        share = {client: served.get(client, 0.0) / weight for client, weight in self._weights.items()}
        for pair in self._pairs:
            f, g = pair
            if not (is_backlogged[f] and is_backlogged[g]):
                self._ranges.pop(pair, None)
                continue
            ahead = share[f] - share[g]
            low, high = self._ranges.get(pair, (ahead, ahead))
            low, high = self._ranges[pair] = (min(low, ahead), max(high, ahead))
            self.largest = max(self.largest, high - low)


LONGEST_PROMPT = 400
NAMES = [f"c{n}" for n in range(6)]


@dataclass
class Day:
    """Result of `random_day`."""

    service: Service
    gap: float
    """`Gaps.largest`."""
    longest_prompt: int
    worst_estimate: int


def random_day(service: Service, seed: int, weights: Mapping[str, float], *, estimate_error: float = 0.0) -> Day:
    """Clients with different habits alternate between active and idle; the last one is idle for long, then active."""
    rng = random.Random(seed)
    gaps = Gaps(NAMES, weights)
    longest_prompt, worst_estimate = 0, 0
    for now in range(6000):
        for n, client in enumerate(NAMES):
            # About five minutes active, five minutes idle.
            is_active = (now // (300 + 37 * n) + n) % 2 == 0 if n < 5 else now > 4200
            if is_active and service.waiting[client] < (20 if n == 1 else 4) and rng.random() < 0.3:
                prompt = rng.randint(1, LONGEST_PROMPT if n % 2 else 20)
                estimate = round(prompt * (1 + rng.uniform(-estimate_error, estimate_error)))
                longest_prompt = max(longest_prompt, prompt, estimate)
                worst_estimate = max(worst_estimate, abs(estimate - prompt))
                service.submit(client, prompt, rng.randint(1, 20 if n % 3 else 120), estimate=estimate)
        service.step()
        gaps.measure(service.served, {client: service.waiting[client] > 0 for client in NAMES})
    return Day(service, gaps.largest, longest_prompt, worst_estimate)
