"""`priority`: the worth of a class, the bound of the wait, and time slices."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.scheduler import FifoQueue, WaitingQueue
from chatstream.scheduler.policies.priority import PriorityQueue
from chatstream.scheduler.settings import MAX_PRIORITY, MIN_PRIORITY
from tests.scheduler.policies.service import Service, preempt, request, seqs, take

AGEING_S = 60.0

ARRIVALS = st.lists(st.tuples(st.floats(0, 300), st.integers(MIN_PRIORITY, MAX_PRIORITY)), max_size=40)


def test_urgent_requests_start_first_and_earlier_ones_first_within_a_class() -> None:
    queue = PriorityQueue(AGEING_S)
    for seq, priority in enumerate((0, 1, -1, 1, 0)):
        queue.push(request(seq, priority=priority), held=False)
    assert seqs(iter(queue.take, None)) == [1, 3, 0, 4, 2]


def test_one_class_is_worth_ageing_s_seconds_of_waiting() -> None:
    queue = PriorityQueue(AGEING_S)
    queue.push(request(0, at_s=0.0), held=False)
    queue.push(request(1, at_s=AGEING_S - 1, priority=1), held=False)
    queue.push(request(2, at_s=AGEING_S + 1, priority=1), held=False)
    assert seqs(iter(queue.take, None)) == [1, 0, 2]


@given(ARRIVALS)
def test_no_request_is_passed_by_one_that_arrives_after_the_ageing_window(
    arrivals: list[tuple[float, int]],
) -> None:
    queue = PriorityQueue(AGEING_S)
    for seq, (at_s, priority) in enumerate(sorted(arrivals)):
        queue.push(request(seq, at_s=at_s, priority=priority), held=False)
    order = list(iter(queue.take, None))
    for index, later in enumerate(order):
        for sooner in order[:index]:
            head_start_s = max(0, sooner.priority - later.priority) * AGEING_S
            assert sooner.admitted_s <= later.admitted_s + head_start_s


ANSWER = 20


def overload(queue: WaitingQueue, *, urgent_priority: int, max_waiting: int) -> Service:
    """Patient requests demand three times the capacity, urgent ones a tenth of it."""
    service = Service(queue, num_slots=4)
    rng = random.Random(11)
    a_second = 4 / ANSWER
    for _ in range(8000):
        for client, rate, priority in (("urgent", 0.1, urgent_priority), ("patient", 3.0, 0)):
            if rng.random() < rate * a_second and (client == "urgent" or len(queue) < max_waiting):
                service.submit(client, 0, rng.randint(1, 2 * ANSWER - 1), priority=priority)
        service.step()
    return service


def waits_s(service: Service, client: str) -> list[float]:
    return sorted(wait for seq, wait in service.waited_s.items() if service.clients[seq] == client)


def test_urgent_requests_wait_for_one_slot_only_under_threefold_overload() -> None:
    urgent = waits_s(overload(PriorityQueue(AGEING_S), urgent_priority=2, max_waiting=20), "urgent")
    assert len(urgent) > 100
    assert sum(urgent) / len(urgent) <= ANSWER / 3  # with four slots, one ends about every five seconds
    assert urgent[len(urgent) * 99 // 100] <= 1.5 * ANSWER
    urgent = waits_s(overload(FifoQueue(), urgent_priority=2, max_waiting=20), "urgent")
    assert urgent[len(urgent) // 2] > 3 * ANSWER


class Ageless(PriorityQueue):
    """Strict classes, without ageing."""

    def __init__(self) -> None:
        super().__init__(1e9)


def crowded_out(queue: WaitingQueue) -> Service:
    """One patient request, and urgent ones that demand 1.5 times the capacity all the time."""
    service = Service(queue, num_slots=4)
    rng = random.Random(12)
    for now in range(3000):
        if now == 100:
            service.submit("patient", 0, ANSWER)
        if rng.random() < 1.5 * 4 / ANSWER:
            service.submit("urgent", 0, ANSWER, priority=3)
        service.step()
    return service


def test_the_wait_is_bounded_by_the_ageing_window_and_the_work_that_arrives_in_it() -> None:
    """Only requests that arrive within 3 classes of ageing may start earlier; their work bounds the wait."""
    service = crowded_out(PriorityQueue(AGEING_S))
    [waited_s] = waits_s(service, "patient")
    patient = next(seq for seq, name in service.clients.items() if name == "patient")
    ahead = service.started[: service.started.index(patient)]
    may_be_ahead = [seq for seq, at_s in service.submitted_s.items() if at_s <= 100 + 3 * AGEING_S]
    assert set(ahead) <= set(may_be_ahead)
    assert 3 * AGEING_S < waited_s <= (len(may_be_ahead) + 4) * ANSWER / 4


def test_without_ageing_a_patient_request_starves() -> None:
    assert waits_s(crowded_out(Ageless()), "patient") == []


# --- time slices -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("running", "waiting", "takes_over"),
    [
        pytest.param((0.0, 0), (10.0, 0), True, id="same class"),
        pytest.param((0.0, 0), (10.0, 1), True, id="more urgent"),
        pytest.param((0.0, 1), (10.0, 0), False, id="less urgent"),
        pytest.param((100.0, 1), (10.0, 0), True, id="less urgent, but aged"),
    ],
)
def test_a_successor_has_the_same_class_or_a_smaller_key(
    running: tuple[float, int], waiting: tuple[float, int], takes_over: bool
) -> None:
    queue = PriorityQueue(AGEING_S)
    first, second = (request(n, at_s=at_s, priority=priority) for n, (at_s, priority) in enumerate((running, waiting)))
    queue.push(first, held=False)
    take(queue)
    queue.push(second, held=False)
    assert queue.successor(first, may_start_new=True) is (second if takes_over else None)
    assert queue.successor(first, may_start_new=False) is None


def test_a_preempted_urgent_request_resumes_before_others_start() -> None:
    queue = PriorityQueue(AGEING_S)
    urgent, patient, running = request(0, priority=5), request(1), request(2)
    queue.push(urgent, held=False)
    take(queue)
    queue.push(running, held=False)
    take(queue)
    queue.push(patient, held=False)
    queue.push(preempt(urgent), held=False)
    assert queue.successor(running, may_start_new=True) is urgent
    queue.withdraw(urgent)
    assert queue.successor(running, may_start_new=True) is patient
