"""The promises of the protocol, for every entry of `QUEUES`."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from chatstream.scheduler import QUEUES, LiveRequest, SchedulerSettings, WaitingQueue
from chatstream.scheduler.states import State, Trigger
from tests.scheduler.policies.service import preempt, request, seqs, start, take

SETTINGS = SchedulerSettings(client_weights={"c0": 3.0}, max_queue_size=5)


def some(seq: int) -> LiveRequest:
    """Request number `seq`; any two differ in client, priority, arrival, prompt or `max_new_tokens`."""
    return request(
        seq,
        f"c{seq % 3}",
        at_s=float(seq),
        priority=seq * 7 % 21 - 10,
        prompt_tokens=seq * 37 % 500,
        max_new_tokens=seq * 13 % 50 + 1,
    )


@pytest.fixture(params=QUEUES)
def queue(request: pytest.FixtureRequest) -> WaitingQueue:
    return QUEUES[request.param](SETTINGS)


def test_every_eligible_request_is_taken_once(queue: WaitingQueue) -> None:
    for n in range(20):
        queue.push(some(n), held=False)
    taken = [take(queue) for _ in range(20)]
    assert sorted(seqs(taken)) == list(range(20))
    assert queue.take() is None
    assert len(queue) == 0


def test_a_held_request_counts_but_is_not_taken_before_unhold(queue: WaitingQueue) -> None:
    held, other = some(0), some(1)
    queue.push(held, held=True)
    queue.push(other, held=False)
    assert len(queue) == 2
    assert queue.take() is other
    assert queue.take() is None
    assert queue.position(held) == 1
    queue.unhold(held)
    assert queue.take() is held


def test_a_withdrawn_request_is_never_taken(queue: WaitingQueue) -> None:
    members = [some(n) for n in range(300)]
    for member in members:
        queue.push(member, held=member.seq % 7 == 0)
    for member in members:
        if member.seq % 10:
            queue.withdraw(member)
    for member in members:
        if member.seq % 70 == 0:
            queue.unhold(member)
    assert sorted(seqs(iter(queue.take, None))) == list(range(0, 300, 10))


def test_a_request_whose_engine_failed_returns_and_starts_again(queue: WaitingQueue) -> None:
    failed, other = some(0), some(3)  # of one client
    queue.push(failed, held=False)
    assert take(queue) is failed
    queue.push(other, held=False)
    failed.move(Trigger.REQUEUE)
    queue.end_run(failed)
    queue.push(failed, held=False)
    assert {take(queue), take(queue)} == {failed, other}
    assert queue.take() is None


def test_a_preempted_request_returns_and_resumes(queue: WaitingQueue) -> None:
    first = some(0)
    queue.push(first, held=False)
    take(queue)
    queue.charge(first, prompt_tokens=0, tokens=1)
    queue.push(preempt(first), held=False)
    assert len(queue) == 1
    assert queue.position(first) == 1
    assert take(queue) is first
    queue.end_run(first)
    assert len(queue) == 0


def test_a_preempted_request_can_be_withdrawn(queue: WaitingQueue) -> None:
    first, second = some(0), some(1)
    queue.push(first, held=False)
    take(queue)
    queue.push(preempt(first), held=False)
    queue.push(second, held=False)
    queue.withdraw(first)
    queue.end_run(first)
    assert seqs(queue) == [1]
    assert take(queue) is second


def test_without_may_start_new_only_preempted_requests_are_taken(queue: WaitingQueue) -> None:
    preempted, new, held = some(2), some(1), some(0)
    queue.push(preempted, held=False)
    take(queue)
    queue.push(new, held=False)
    queue.push(held, held=True)
    assert queue.take(may_start_new=False) is None
    queue.push(preempt(preempted), held=False)
    assert queue.take(may_start_new=False) is preempted
    assert queue.take(may_start_new=False) is None
    assert queue.take(may_start_new=True) is new


def test_an_empty_queue_returns_no_request(queue: WaitingQueue) -> None:
    queue.push(running := some(0), held=False)
    take(queue)
    queue.charge(running, prompt_tokens=10, tokens=1)
    assert queue.take() is None
    assert queue.successor(running, may_start_new=True) is None
    assert list(queue) == []


def test_a_successor_is_eligible_and_stays_in_the_queue_until_start(queue: WaitingQueue) -> None:
    """The running request has the most service and the lowest priority, so every policy returns a successor."""
    running = request(0, "greedy", priority=-10, max_new_tokens=50)
    queue.push(running, held=False)
    take(queue)
    held, new = request(1, "a", priority=10, max_new_tokens=1), request(2, "b", max_new_tokens=50)
    queue.push(held, held=True)
    queue.push(new, held=False)
    running.generated_tokens = 10_000
    queue.charge(running, prompt_tokens=0, tokens=10_000)
    before = list(queue)
    assert queue.successor(running, may_start_new=True) is new
    assert queue.successor(running, may_start_new=False) is None
    assert list(queue) == before

    queue.start(new)
    queue.push(preempt(running), held=False)
    start(new)
    queue.charge(new, prompt_tokens=0, tokens=10)
    assert take(queue) is running
    for member in (running, new):
        queue.end_run(member)
    assert seqs(queue) == [1]


def test_calls_for_requests_that_started_under_another_policy_are_accepted(queue: WaitingQueue) -> None:
    """The policy was selected while they ran."""
    unknown = start(some(0))
    unknown.generated_tokens = 7
    queue.charge(unknown, prompt_tokens=0, tokens=2)
    queue.push(preempt(unknown), held=False)
    assert take(queue) is unknown
    queue.end_run(unknown)
    queue.end_run(start(some(1)))
    assert len(queue) == 0


# --- against a list ----------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Random calls; the queue contains exactly the waiting requests and returns only eligible ones."""

    policy: str

    def __init__(self) -> None:
        super().__init__()
        self.queue = QUEUES[self.policy](SETTINGS)
        self.waiting: list[LiveRequest] = []
        self.held: set[LiveRequest] = set()
        self.running: list[LiveRequest] = []
        self.now_s = 0.0
        self.num_seqs = 0

    def _pick(self, members: list[LiveRequest], n: int) -> LiveRequest:
        return members[n % len(members)]

    @rule(client=st.sampled_from("abcd"), priority=st.integers(-2, 2), prompt=st.integers(0, 50), held=st.booleans())
    def push(self, client: str, priority: int, prompt: int, held: bool) -> None:
        self.now_s += 1
        member = request(self.num_seqs, client, at_s=self.now_s, priority=priority, prompt_tokens=prompt)
        self.num_seqs += 1
        self.queue.push(member, held=held)
        self.waiting.append(member)
        if held:
            self.held.add(member)

    @precondition(lambda self: self.held)
    @rule(n=st.integers(0, 99))
    def unhold(self, n: int) -> None:
        member = self._pick(sorted(self.held, key=lambda one: one.seq), n)
        self.held.remove(member)
        self.queue.unhold(member)

    @rule(may_start_new=st.booleans())
    def take(self, may_start_new: bool) -> None:
        member = self.queue.take(may_start_new=may_start_new)
        free = [one for one in self.waiting if one not in self.held and (may_start_new or one.is_preempted)]
        if member is None:
            assert free == []
        else:
            assert member in free
            self._on_started(member)

    @precondition(lambda self: self.running)
    @rule(n=st.integers(0, 99), may_start_new=st.booleans())
    def hand_over(self, n: int, may_start_new: bool) -> None:
        running = self._pick(self.running, n)
        successor = self.queue.successor(running, may_start_new=may_start_new)
        if successor is not None:
            assert successor in self.waiting
            assert successor not in self.held
            assert may_start_new or successor.is_preempted
            self.queue.push(preempt(running), held=False)
            self.running.remove(running)
            self.waiting.append(running)
            self.queue.start(successor)
            self._on_started(successor)

    @precondition(lambda self: self.running)
    @rule(n=st.integers(0, 99), prompt=st.integers(0, 30), tokens=st.integers(0, 5))
    def charge(self, n: int, prompt: int, tokens: int) -> None:
        member = self._pick(self.running, n)
        member.generated_tokens += tokens
        self.queue.charge(member, prompt_tokens=prompt, tokens=tokens)

    @precondition(lambda self: self.running)
    @rule(n=st.integers(0, 99))
    def preempt(self, n: int) -> None:
        member = self.running.pop(n % len(self.running))
        self.queue.push(preempt(member), held=False)
        self.waiting.append(member)

    @precondition(lambda self: self.running)
    @rule(n=st.integers(0, 99), is_requeued=st.booleans())
    def end(self, n: int, is_requeued: bool) -> None:
        member = self.running.pop(n % len(self.running))
        if is_requeued and not member.generated_tokens:
            member.move(Trigger.REQUEUE)
            self.queue.end_run(member)
            self.queue.push(member, held=False)
            self.waiting.append(member)
        else:
            self.queue.end_run(member)

    @precondition(lambda self: self.waiting)
    @rule(n=st.integers(0, 99))
    def withdraw(self, n: int) -> None:
        member = self.waiting.pop(n % len(self.waiting))
        self.held.discard(member)
        self.queue.withdraw(member)
        if member.is_preempted:
            self.queue.end_run(member)

    def _on_started(self, member: LiveRequest) -> None:
        self.waiting.remove(member)
        self.running.append(start(member))

    @invariant()
    def members_are_the_waiting_requests(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert set(self.queue) == set(self.waiting)

    @invariant()
    def positions_agree_with_the_order_of_iteration(self) -> None:
        assert [self.queue.position(member) for member in self.queue] == list(range(1, len(self.waiting) + 1))

    def teardown(self) -> None:
        for member in [one for one in self.waiting if one in self.held]:
            self.queue.unhold(member)
        assert set(iter(self.queue.take, None)) == set(self.waiting)


@pytest.mark.parametrize("policy", QUEUES)
def test_after_any_calls_the_queue_contains_the_waiting_requests(policy: str) -> None:
    machine = type("AnyOrderUnder", (AnyOrder,), {"policy": policy})
    thorough = settings(max_examples=40, stateful_step_count=40, deadline=None, derandomize=True)
    run_state_machine_as_test(machine, settings=thorough)


# --- cost --------------------------------------------------------------------------------------------------------


class Watched(LiveRequest):
    """Counts comparisons."""

    __slots__ = ()
    num_compared = 0

    def __eq__(self, other: object) -> bool:
        Watched.num_compared += 1
        return self is other

    def __hash__(self) -> int:
        return self.seq


@contextmanager
def count_lines() -> Iterator[Callable[[], int]]:
    """Count executed lines of Python: the same on every machine, under any load."""
    num_lines = 0

    def on_line(frame: FrameType, event: str, arg: Any) -> Any:
        nonlocal num_lines
        num_lines += event == "line"
        return on_line

    before = sys.gettrace()
    sys.settrace(on_line)
    try:
        yield lambda: num_lines
    finally:
        sys.settrace(before)


@pytest.mark.parametrize("num_clients", [1, 10_000], ids=["of one client", "of as many clients"])
def test_with_10_000_requests_no_method_loops_over_the_queue(queue: WaitingQueue, num_clients: int) -> None:
    members: list[LiveRequest] = []
    for n in range(10_000):
        one = request(n, f"c{n % num_clients}", at_s=float(n), priority=n % 20 - 10, prompt_tokens=n % 300)
        members.append(Watched(one.arrival, one.seq, one.admitted_s))
        queue.push(members[-1], held=n % 3 == 0)
    last = request(10_000, "c0", at_s=1e4)
    Watched.num_compared = 0
    with count_lines() as lines:
        for member in members[:6000:300]:
            queue.unhold(member)
        running = [take(queue) for _ in range(20)]
        for member in running:
            queue.charge(member, prompt_tokens=3, tokens=1)
            member.generated_tokens += 1
            queue.take(may_start_new=False)
            queue.successor(member, may_start_new=True)
            queue.successor(member, may_start_new=False)
        for member in running[:10]:
            queue.push(preempt(member), held=False)
        for member in running[10:]:
            queue.end_run(member)
        for member in members[6001:9001:150]:
            queue.position(member)
        for member in members[9001:9601:30]:
            if member.state is State.WAITING:
                queue.withdraw(member)
        queue.push(last, held=False)
        len(queue)
        num_lines = lines()
    num_operations = 20 * 6 + 20 + 20 + 2
    assert num_lines / num_operations < 300
    assert Watched.num_compared == 0


def num_objects(root: object) -> int:
    """Objects that `root` keeps alive, without classes, functions and modules."""
    seen: set[int] = set()
    todo = [root]
    while todo:
        one = todo.pop()
        if id(one) not in seen and not isinstance(one, type) and type(one).__name__ not in ("function", "module"):
            seen.add(id(one))
            todo += gc.get_referents(one)
            if isinstance(one, dict):
                todo += one  # `get_referents` skips keys that are strings
    return len(seen)


def test_memory_does_not_grow_with_past_clients(queue: WaitingQueue) -> None:
    def churn(first: int) -> int:
        """4000 requests of new clients, 20 waiting at a time; every third is withdrawn, every fifth while preempted."""
        waiting: list[LiveRequest] = []
        for n in range(first, first + 4000):
            waiting.append(request(n, f"client {n}", at_s=float(n), prompt_tokens=n % 100))
            queue.push(waiting[-1], held=n % 11 == 0)
            if len(waiting) <= 20:
                continue
            if n % 3 == 0:
                queue.withdraw(waiting.pop(0))
            elif (member := queue.take()) is not None:
                start(member)
                waiting.remove(member)
                queue.charge(member, prompt_tokens=5, tokens=n % 7)
                if n % 5 == 0:
                    queue.push(preempt(member), held=False)
                    queue.withdraw(member)
                queue.end_run(member)
        for member in waiting:
            queue.withdraw(member)
        return num_objects(queue)

    after_4000 = churn(0)
    assert churn(4000) <= after_4000 + 100
