"""`fair-token`: the bound with time slices, and the choice of the successor."""

from __future__ import annotations

import random
from collections.abc import Mapping

import pytest

from chatstream.scheduler import FifoQueue, WaitingQueue
from chatstream.scheduler.policies.fair import SLICE_TOKENS, FairQueue
from tests.scheduler.policies.service import (
    LONGEST_PROMPT,
    PROMPT_COST,
    TOKEN_COST,
    Gaps,
    Service,
    preempt,
    random_day,
    request,
    start,
    take,
)

WEIGHTS = {"c0": 3.0, "c1": 2.0}
NAMES = [f"c{n}" for n in range(5)]
SLICE_COST = TOKEN_COST * SLICE_TOKENS


def sliced(weights: Mapping[str, float] | None = None) -> FairQueue:
    return FairQueue(weights, slice_tokens=SLICE_TOKENS)


def endless(
    queue: WaitingQueue, num_slots: int, requests_each: int, weights: Mapping[str, float]
) -> tuple[Service, float]:
    """Run requests that never end; returns the service and the largest gap after all have started."""
    rng = random.Random(5)
    service = Service(queue, num_slots)
    for _ in range(requests_each):
        for client in NAMES:
            service.submit(client, rng.randint(1, 40), 1_000_000)
    gaps = Gaps(NAMES, weights)
    for now in range(6000):
        service.step()
        if now > 1000:
            gaps.measure(service.served, dict.fromkeys(NAMES, True))
    return service, gaps.largest


@pytest.mark.parametrize(("num_slots", "requests_each"), [(1, 1), (1, 3), (2, 1), (2, 3), (4, 5)])
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["equal", "weighted"])
def test_clients_with_started_requests_differ_by_at_most_two_slices_per_slot(
    num_slots: int, weights: Mapping[str, float], requests_each: int
) -> None:
    service, gap = endless(sliced(weights), num_slots, requests_each, weights)
    assert 0 < gap <= 2 * num_slots * SLICE_COST
    assert service.num_preempted > 100


@pytest.mark.parametrize("make", [FifoQueue, FairQueue])
def test_without_slices_one_client_gets_all_service(make: type[FairQueue]) -> None:
    _, gap = endless(make(), 1, 1, {})
    assert gap > 20 * SLICE_COST


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("seed", range(2))
def test_while_new_requests_start_a_prompt_adds(seed: int, weights: Mapping[str, float], num_slots: int) -> None:
    """A prompt counts as one piece, even if the engine prefills it in parts."""
    day = random_day(Service(FairQueue(weights, slice_tokens=8), num_slots, chunk_tokens=64), seed, weights)
    assert 0 < day.gap <= 2 * (PROMPT_COST * LONGEST_PROMPT + num_slots * TOKEN_COST * 8)
    assert day.service.num_preempted > 50


def test_beyond_max_resident_the_bound_of_whole_generations_holds() -> None:
    """A new request waits for the end of a resident one; its client lags by the service of all residents at most."""
    service = Service(sliced(), num_slots=1, max_resident=2)
    gaps, gaps_of_residents = Gaps(NAMES, {}), Gaps(NAMES[:2], {})
    rng = random.Random(2)
    most_preempted = 0
    for _ in range(10_000):
        for client in NAMES:
            while service.waiting[client] < 2:
                service.submit(client, 1, rng.randint(100, 500))
        service.step()
        gaps.measure(service.served, dict.fromkeys(NAMES, True))
        most_preempted = max(most_preempted, sum(service.waiting.values()) - sum(service.waiting_new.values()))
    assert most_preempted == 1
    assert service.num_preempted > 100
    assert 2 * SLICE_COST < gaps.largest <= 2 * TOKEN_COST * service.largest_batch_tokens
    assert gaps_of_residents.largest == 0


# --- the successor ----------------------------------------------------------------------------------------------


def test_the_successor_is_of_the_client_with_the_least_service_and_strictly_less_than_the_running_one() -> None:
    queue = sliced()
    a, b, c = (request(n, name) for n, name in enumerate("abc"))
    for member in (a, b, c):
        queue.push(member, held=False)
    assert (take(queue), take(queue)) == (a, b)
    for member, tokens in ((a, 50), (b, 10)):
        member.generated_tokens = tokens
        queue.charge(member, prompt_tokens=0, tokens=tokens)
    assert queue.successor(b, may_start_new=True) is c
    queue.push(preempt(b), held=False)
    assert queue.successor(a, may_start_new=True) is c
    assert queue.successor(a, may_start_new=False) is b
    queue.start(c)
    queue.charge(start(c), prompt_tokens=0, tokens=10)
    assert queue.successor(c, may_start_new=True) is None
    queue.charge(c, prompt_tokens=0, tokens=1)
    assert queue.successor(c, may_start_new=True) is b


def test_requests_of_one_client_do_not_take_slots_from_each_other() -> None:
    queue = sliced()
    queue.push(request(0, "a"), held=False)
    running = take(queue)
    queue.push(request(1, "a"), held=False)
    queue.charge(running, prompt_tokens=0, tokens=1000)
    assert queue.successor(running, may_start_new=True) is None


class WithoutRunningLift(FairQueue):
    def _lift_running(self, client: object) -> None:
        pass


def seconds_kept(queue: FairQueue) -> float:
    """Seconds for which a client keeps its slot.

    It uses one slot of four for an hour, while another client uses the rest; then seven new clients want one slot each.
    """
    service = Service(queue, num_slots=4)
    service.submit("modest", 1, 100_000)
    for now in range(3600):
        if now > 100:
            while service.waiting["greedy"] < 4:
                service.submit("greedy", 1, 200)
        service.step()
    for n in range(7):
        service.submit(f"c{n}", 1, 100_000)
    before, since = service.served["modest"], service.now_s
    while service.served["modest"] - before == TOKEN_COST * (service.now_s - since) and service.now_s < 20_000:
        service.step()
    return service.now_s - since


def test_a_client_that_used_one_slot_earns_no_credit_for_it() -> None:
    assert seconds_kept(sliced()) < 500
    assert seconds_kept(WithoutRunningLift(slice_tokens=SLICE_TOKENS)) > 3000


def test_service_without_waiting_clients_does_not_count_later() -> None:
    """A client runs alone; when others overload the slots later, each gets a third from then on."""
    service = Service(sliced(), num_slots=2)
    service.submit("first", 1, 100_000)
    service.submit("short", 1, 5)
    for _ in range(5000):
        service.step()
    for client in ("second", "third") * 3:
        service.submit(client, 1, 100_000)
    before = service.served["first"]
    for _ in range(600):
        service.step()
    assert service.served["first"] - before == pytest.approx(TOKEN_COST * 600 * 2 / 3, abs=2 * 2 * SLICE_COST)


def test_a_client_behind_because_of_long_prompts_of_others_is_not_lifted() -> None:
    """After each long prompt of the other client, the client runs for long and mostly has no waiting request."""
    service = Service(sliced(), num_slots=1)
    service.submit("writes", 1, 1_000_000)
    for _ in range(60_000):
        while service.waiting["reads"] < 2:
            service.submit("reads", 2000, 10)
        service.step()
    assert service.served["writes"] == pytest.approx(service.served["reads"], abs=2 * (2000 + SLICE_COST))
