"""What every policy promises, whatever its order. Runs for every entry of `QUEUES`."""

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
    """A request that differs from the others in everything a policy may look at."""
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


def test_everybody_who_is_not_held_is_taken_exactly_once(queue: WaitingQueue) -> None:
    for n in range(20):
        queue.push(some(n), held=False)
    taken = [take(queue) for _ in range(20)]
    assert sorted(seqs(taken)) == list(range(20))
    assert queue.take() is None
    assert len(queue) == 0


def test_a_held_request_is_counted_but_not_taken_until_it_is_unheld(queue: WaitingQueue) -> None:
    held, other = some(0), some(1)
    queue.push(held, held=True)
    queue.push(other, held=False)
    assert len(queue) == 2
    assert queue.take() is other
    assert queue.take() is None
    assert queue.position(held) == 1
    queue.unhold(held)
    assert queue.take() is held


def test_whoever_is_discarded_is_never_taken(queue: WaitingQueue) -> None:
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


def test_a_request_whose_engine_failed_comes_back_and_starts_again(queue: WaitingQueue) -> None:
    failed, other = some(0), some(3)  # of one client
    queue.push(failed, held=False)
    assert take(queue) is failed
    queue.push(other, held=False)
    failed.move(Trigger.REQUEUE)
    queue.end_run(failed)
    queue.push(failed, held=False)
    assert {take(queue), take(queue)} == {failed, other}
    assert queue.take() is None


def test_a_preempted_request_comes_back_and_goes_on(queue: WaitingQueue) -> None:
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


def test_a_preempted_request_can_be_given_up(queue: WaitingQueue) -> None:
    first, second = some(0), some(1)
    queue.push(first, held=False)
    take(queue)
    queue.push(preempt(first), held=False)
    queue.push(second, held=False)
    queue.withdraw(first)
    queue.end_run(first)
    assert seqs(queue) == [1]
    assert take(queue) is second


def test_when_the_engine_can_hold_no_more_only_those_who_have_begun_start(queue: WaitingQueue) -> None:
    begun, fresh, held = some(2), some(1), some(0)
    queue.push(begun, held=False)
    take(queue)
    queue.push(fresh, held=False)
    queue.push(held, held=True)
    assert queue.take(may_start_new=False) is None
    queue.push(preempt(begun), held=False)
    assert queue.take(may_start_new=False) is begun
    assert queue.take(may_start_new=False) is None
    assert queue.take(may_start_new=True) is fresh


def test_an_empty_line_has_nobody(queue: WaitingQueue) -> None:
    queue.push(running := some(0), held=False)
    take(queue)
    queue.charge(running, prompt_tokens=10, tokens=1)
    assert queue.take() is None
    assert queue.successor(running, may_start_new=True) is None
    assert list(queue) == []


def test_a_successor_may_start_and_is_only_looked_for(queue: WaitingQueue) -> None:
    """The running one has had more than anybody, and is less urgent: under every policy somebody should take over."""
    running = request(0, "greedy", priority=-10, max_new_tokens=50)
    queue.push(running, held=False)
    take(queue)
    held, fresh = request(1, "a", priority=10, max_new_tokens=1), request(2, "b", max_new_tokens=50)
    queue.push(held, held=True)
    queue.push(fresh, held=False)
    running.generated_tokens = 10_000
    queue.charge(running, prompt_tokens=0, tokens=10_000)
    before = list(queue)
    assert queue.successor(running, may_start_new=True) is fresh
    assert queue.successor(running, may_start_new=False) is None
    assert list(queue) == before

    queue.start(fresh)
    queue.push(preempt(running), held=False)
    start(fresh)
    queue.charge(fresh, prompt_tokens=0, tokens=10)
    assert take(queue) is running
    for member in (running, fresh):
        queue.end_run(member)
    assert seqs(queue) == [1]


def test_what_is_reported_of_strangers_is_harmless(queue: WaitingQueue) -> None:
    """The policy may have been chosen while they ran."""
    stranger = start(some(0))
    stranger.generated_tokens = 7
    queue.charge(stranger, prompt_tokens=0, tokens=2)
    queue.push(preempt(stranger), held=False)
    assert take(queue) is stranger
    queue.end_run(stranger)
    queue.end_run(start(some(1)))
    assert len(queue) == 0


# --- against a list ----------------------------------------------------------------------------------------------


class AnyOrder(RuleBasedStateMachine):
    """Whatever happens, the queue has those members that it should have, and offers only those that may start."""

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
            self._starts(member)

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
            self._starts(successor)

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
    @rule(n=st.integers(0, 99), comes_back=st.booleans())
    def end(self, n: int, comes_back: bool) -> None:
        member = self.running.pop(n % len(self.running))
        if comes_back and not member.generated_tokens:
            member.move(Trigger.REQUEUE)
            self.queue.end_run(member)
            self.queue.push(member, held=False)
            self.waiting.append(member)
        else:
            self.queue.end_run(member)

    @precondition(lambda self: self.waiting)
    @rule(n=st.integers(0, 99))
    def discard(self, n: int) -> None:
        member = self.waiting.pop(n % len(self.waiting))
        self.held.discard(member)
        self.queue.withdraw(member)
        if member.is_preempted:
            self.queue.end_run(member)

    def _starts(self, member: LiveRequest) -> None:
        self.waiting.remove(member)
        self.running.append(start(member))

    @invariant()
    def members_are_those_that_wait(self) -> None:
        assert len(self.queue) == len(self.waiting)
        assert set(self.queue) == set(self.waiting)

    @invariant()
    def positions_are_those_of_the_iteration(self) -> None:
        assert [self.queue.position(member) for member in self.queue] == list(range(1, len(self.waiting) + 1))

    def teardown(self) -> None:
        for member in [one for one in self.waiting if one in self.held]:
            self.queue.unhold(member)
        assert set(iter(self.queue.take, None)) == set(self.waiting)


@pytest.mark.parametrize("policy", QUEUES)
def test_whatever_happens_the_members_are_those_that_should_be(policy: str) -> None:
    machine = type("AnyOrderUnder", (AnyOrder,), {"policy": policy})
    thorough = settings(max_examples=40, stateful_step_count=40, deadline=None, derandomize=True)
    run_state_machine_as_test(machine, settings=thorough)


# --- cost --------------------------------------------------------------------------------------------------------


class Watched(LiveRequest):
    """Counts how often it is compared."""

    __slots__ = ()
    num_compared = 0

    def __eq__(self, other: object) -> bool:
        Watched.num_compared += 1
        return self is other

    def __hash__(self) -> int:
        return self.seq


@contextmanager
def count_lines() -> Iterator[Callable[[], int]]:
    """Lines of Python that are run: the same on every machine, however busy."""
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
def test_with_10_000_members_nothing_scans_the_line(queue: WaitingQueue, num_clients: int) -> None:
    members: list[LiveRequest] = []
    for n in range(10_000):
        one = request(n, f"c{n % num_clients}", at_s=float(n), priority=n % 20 - 10, prompt_tokens=n % 300)
        members.append(Watched(one.arrival, one.seq, one.admitted_s))
        queue.push(members[-1], held=n % 3 == 0)
    newcomer = request(10_000, "c0", at_s=1e4)
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
        queue.push(newcomer, held=False)
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
                todo += one  # strings as keys are not told
    return len(seen)


def test_clients_that_came_and_went_leave_nothing_behind(queue: WaitingQueue) -> None:
    def churn(first: int) -> int:
        """Twenty wait at any time, never the same ones; every third gives up, every fifth goes away while preempted."""
        crowd: list[LiveRequest] = []
        for n in range(first, first + 4000):
            crowd.append(request(n, f"client {n}", at_s=float(n), prompt_tokens=n % 100))
            queue.push(crowd[-1], held=n % 11 == 0)
            if len(crowd) <= 20:
                continue
            if n % 3 == 0:
                queue.withdraw(crowd.pop(0))
            elif (member := queue.take()) is not None:
                start(member)
                crowd.remove(member)
                queue.charge(member, prompt_tokens=5, tokens=n % 7)
                if n % 5 == 0:
                    queue.push(preempt(member), held=False)
                    queue.withdraw(member)
                queue.end_run(member)
        for member in crowd:
            queue.withdraw(member)
        return num_objects(queue)

    after_4000 = churn(0)
    assert churn(4000) <= after_4000 + 100
