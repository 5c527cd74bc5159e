"""`fair-token`: the same counters, but a generation that has used up its slice gives way. How tight that is."""

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
    """Everybody has more to generate than there is time; how far apart do clients get, once all have begun?"""
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
def test_those_who_have_begun_stay_within_two_slices_for_each_slot(
    num_slots: int, weights: Mapping[str, float], requests_each: int
) -> None:
    service, gap = endless(sliced(weights), num_slots, requests_each, weights)
    assert 0 < gap <= 2 * num_slots * SLICE_COST
    assert service.num_preempted > 100


@pytest.mark.parametrize("make", [FifoQueue, FairQueue])
def test_without_slices_one_has_everything(make: type[FairQueue]) -> None:
    _, gap = endless(make(), 1, 1, {})
    assert gap > 20 * SLICE_COST


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("seed", range(2))
def test_where_clients_come_and_go_prompts_are_added(seed: int, weights: Mapping[str, float], num_slots: int) -> None:
    """A prompt is read in one piece, however the slices are."""
    day = random_day(Service(FairQueue(weights, slice_tokens=8), num_slots, chunk_tokens=64), seed, weights)
    assert 0 < day.gap <= 2 * (PROMPT_COST * LONGEST_PROMPT + num_slots * TOKEN_COST * 8)
    assert day.service.num_preempted > 50


def test_where_more_wait_than_may_be_resident_the_bound_of_whole_generations_holds() -> None:
    """One who has not begun waits for an end; it is behind by what all residents can have had by then, at most."""
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
        most_preempted = max(most_preempted, sum(service.waiting.values()) - sum(service.waiting_fresh.values()))
    assert most_preempted == 1
    assert service.num_preempted > 100
    assert 2 * SLICE_COST < gaps.largest <= 2 * TOKEN_COST * service.largest_batch_tokens
    assert gaps_of_residents.largest == 0


# --- who takes over ----------------------------------------------------------------------------------------------


def test_the_slot_goes_to_the_client_with_the_least_service_and_to_nobody_who_had_as_much() -> None:
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


def held_on_to(queue: FairQueue) -> float:
    """One client is content with one slot of four for an hour; then seven others want one each. Who has it how long?"""
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


def test_who_was_content_with_one_slot_does_not_keep_it_for_as_long_again() -> None:
    assert held_on_to(sliced()) < 500
    assert held_on_to(WithoutRunningLift(slice_tokens=SLICE_TOKENS)) > 3000


def test_who_had_the_service_alone_is_not_made_to_pay_for_it() -> None:
    """Nobody else wanted it; when others come, with more than there is room for, all start from there."""
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


def test_who_is_behind_for_a_good_reason_is_not_lifted() -> None:
    """The other's prompts are long: after each of them it is due for long, and mostly has nothing in line."""
    service = Service(sliced(), num_slots=1)
    service.submit("writes", 1, 1_000_000)
    for _ in range(60_000):
        while service.waiting["reads"] < 2:
            service.submit("reads", 2000, 10)
        service.step()
    assert service.served["writes"] == pytest.approx(service.served["reads"], abs=2 * (2000 + SLICE_COST))
