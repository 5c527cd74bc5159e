"""What every waiting-queue policy promises, and what the default adds."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from chatstream.scheduler import QUEUES, Arrival, FifoQueue, LiveRequest, WaitingQueue


def request(seq: int) -> LiveRequest:
    return LiveRequest(Arrival(request_id=f"r{seq}", client=f"c{seq % 3}"), seq, admitted_s=0.0)


@pytest.fixture(params=QUEUES.values(), ids=QUEUES.keys())
def queue(request: pytest.FixtureRequest) -> WaitingQueue:
    make: Callable[[], WaitingQueue] = request.param
    return make()


def test_everybody_who_is_not_held_is_taken_exactly_once(queue: WaitingQueue) -> None:
    pushed = [request(n) for n in range(20)]
    for r in pushed:
        queue.push(r, held=False)
    taken = [queue.take() for _ in range(20)]
    assert sorted(r.seq for r in taken if r) == list(range(20))
    assert queue.take() is None
    assert len(queue) == 0


def test_a_held_request_is_counted_but_not_taken_until_it_is_unheld(queue: WaitingQueue) -> None:
    held, other = request(0), request(1)
    queue.push(held, held=True)
    queue.push(other, held=False)
    assert len(queue) == 2
    assert queue.take() is other
    assert queue.take() is None
    assert queue.position(held) == 1
    queue.unhold(held)
    assert queue.take() is held


def test_whoever_is_discarded_is_never_taken(queue: WaitingQueue) -> None:
    members = [request(n) for n in range(300)]
    for r in members:
        queue.push(r, held=r.seq % 7 == 0)
    for r in members:
        if r.seq % 10:
            queue.discard(r)
    for r in members:
        if r.seq % 70 == 0:
            queue.unhold(r)
    assert sorted(r.seq for r in iter(queue.take, None)) == list(range(0, 300, 10))


def test_positions_are_those_of_the_iteration(queue: WaitingQueue) -> None:
    for n in range(50):
        queue.push(request(n), held=n % 5 == 0)
    for r in [*queue][::3]:
        queue.discard(r)
    assert [queue.position(r) for r in queue] == list(range(1, len(queue) + 1))


def test_fifo_takes_in_order_of_admission_also_those_who_come_back() -> None:
    queue = FifoQueue()
    members = [request(n) for n in range(5)]
    for r in members:
        queue.push(r, held=False)
    first = queue.take()
    assert first is members[0]
    queue.push(members[0], held=False)
    assert [r.seq for r in iter(queue.take, None)] == [0, 1, 2, 3, 4]


def test_fifo_forgets_those_who_left() -> None:
    queue = FifoQueue()
    stays = request(0)
    queue.push(stays, held=True)
    for n in range(1, 10_000):
        r = request(n)
        queue.push(r, held=False)
        queue.discard(r)
    assert len(queue._ready) < 100
