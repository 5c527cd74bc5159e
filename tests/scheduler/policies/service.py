"""A few slots, a queue and a clock: what a policy needs to be seen at work. Keeps accounts of its own.

One step is one second. Whoever runs reads `chunk_tokens` of its prompt in it, or generates one token.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field

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
    """It has been taken, or is somebody's successor."""
    member.move(Trigger.START)
    return member


def park(member: LiveRequest) -> LiveRequest:
    """Its engine has parked it."""
    member.move(Trigger.PREEMPT)
    member.move(Trigger.PARKED)
    return member


def take(queue: WaitingQueue) -> LiveRequest:
    """Take and start somebody, who must be there."""
    member = queue.take()
    assert member is not None
    return start(member)


def seqs(members: Iterable[LiveRequest]) -> list[int]:
    return [member.seq for member in members]


@dataclass(eq=False)
class Job:
    """What a request really is, which only the engine learns."""

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
    """Units of service that each client got: tokens read + 2 * tokens generated."""
    waiting: Counter[str] = field(default_factory=Counter)
    """Requests of each client in line."""
    waited_s: dict[int, float] = field(default_factory=dict)
    """Of each request that has started, by seq."""
    started: list[int] = field(default_factory=list)
    largest_batch_tokens: int = 0
    """Tokens of all that ran or were parked at the same time, at most."""
    num_preempted: int = 0
    _next_seq: int = 0
    _num_resident: int = 0
    _jobs: dict[int, Job] = field(default_factory=dict)

    def submit(
        self, client: str, prompt_tokens: int, answer_tokens: int, *, priority: int = 0, estimate: int | None = None
    ) -> LiveRequest:
        """`estimate`: of the prompt, at the door; exact unless given."""
        seq = self._next_seq
        self._next_seq += 1
        expected = prompt_tokens if estimate is None else estimate
        member = request(seq, client, at_s=self.now_s, priority=priority, prompt_tokens=expected)
        self._jobs[seq] = Job(member, prompt_tokens, answer_tokens)
        self.queue.push(member, held=False)
        self.waiting[client] += 1
        self._fill()
        return member

    def step(self) -> None:
        self.now_s += 1
        for job in list(self.running):
            self._advance(job)
        self._fill()

    def run_until_idle(self) -> None:
        while self.running:
            self.step()

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
            self.queue.leave(member)
            del self._jobs[member.seq]
            self._num_resident -= 1
            member.move(Trigger.END)
        elif self.queue.slice_tokens is not None and job.slice_tokens >= self.queue.slice_tokens:
            self._end_slice(job)

    def _end_slice(self, job: Job) -> None:
        successor = self.queue.successor(job.request, may_grow=self._num_resident < self.max_resident)
        if successor is None:
            return
        self.num_preempted += 1
        self.running.remove(job)
        self.queue.push(park(job.request), held=False)
        self.waiting[job.request.client] += 1
        self.queue.discard(successor)
        self._start(successor)

    def _fill(self) -> None:
        while len(self.running) < self.num_slots and (member := self.queue.take()) is not None:
            self._start(member)

    def _start(self, member: LiveRequest) -> None:
        self.waiting[member.client] -= 1
        if member.state is State.WAITING:
            self.waited_s[member.seq] = self.now_s - member.admitted_s
            self.started.append(member.seq)
            self._num_resident += 1
        start(member)
        job = self._jobs[member.seq]
        job.slice_tokens = 0
        self.running.append(job)
        batch = sum(one.size for one in self.running)
        self.largest_batch_tokens = max(self.largest_batch_tokens, batch)
