"""`spf`: its order, its gain under overload, and the bound of the wait."""

from __future__ import annotations

import heapq
import math
import random
from collections.abc import Callable

from hypothesis import given
from hypothesis import strategies as st

from chatstream.scheduler import Arrival, FifoQueue, SchedulerSettings, WaitingQueue
from chatstream.scheduler.policies.spf import SpfQueue
from tests.scheduler.policies.service import request, seqs, take

AGEING_S = 0.05
"""Per token."""


class Oracle:
    """Predicts `lengths` by request id, and `max_new_tokens` for other requests."""

    def __init__(self, lengths: dict[str, float] | None = None) -> None:
        self._lengths = lengths or {}
        self.observed: list[tuple[str, int]] = []

    def predict(self, arrival: Arrival) -> float:
        return self._lengths.get(arrival.request_id, arrival.max_new_tokens or 0)

    def observe(self, arrival: Arrival, generated_tokens: int) -> None:
        self.observed.append((arrival.request_id, generated_tokens))


def queue_of(*lengths: tuple[float, int]) -> SpfQueue:
    """A queue of requests, each given as (arrival in seconds, tokens)."""
    queue = SpfQueue(AGEING_S, Oracle())
    for seq, (at_s, tokens) in enumerate(lengths):
        queue.push(request(seq, at_s=at_s, max_new_tokens=tokens), held=False)
    return queue


def test_the_shortest_prediction_starts_first_and_the_earlier_of_equal_ones() -> None:
    assert seqs(iter(queue_of((0, 300), (0, 100), (0, 200), (0, 100)).take, None)) == [1, 3, 2, 0]


def test_one_predicted_token_is_worth_ageing_s_per_token_seconds_of_waiting() -> None:
    head_start_s = 100 * AGEING_S
    assert seqs(iter(queue_of((0, 200), (head_start_s - 0.1, 100), (head_start_s + 0.1, 100)).take, None)) == [1, 0, 2]


@given(st.lists(st.tuples(st.floats(0, 100), st.integers(1, 2000)), max_size=40))
def test_no_request_is_passed_by_one_that_arrives_after_the_ageing_window(
    arrivals: list[tuple[float, int]],
) -> None:
    order = list(iter(queue_of(*sorted(arrivals)).take, None))
    for index, later in enumerate(order):
        for sooner in order[:index]:
            fewer = (later.arrival.max_new_tokens or 0) - (sooner.arrival.max_new_tokens or 0)
            assert sooner.admitted_s <= later.admitted_s + max(0, fewer) * AGEING_S + 1e-9


def test_only_answers_that_were_not_cancelled_are_observed() -> None:
    oracle = Oracle()
    queue = SpfQueue(AGEING_S, oracle)
    for seq, (tokens, abort_by) in enumerate([(7, ""), (3, "client"), (0, "")]):
        queue.push(request(seq), held=False)
        member = take(queue)
        member.generated_tokens, member.abort_by = tokens, abort_by
        queue.end_run(member)
    assert oracle.observed == [("r0", 7)]


# --- the share that starts in time, at twice the capacity -----------------------------------

NUM_SLOTS, MEAN_SERVICE_S, SLO_S = 4, 5.36, 30.0


def answer_tokens(rng: random.Random) -> int:
    """As in the Azure chat trace of 2023: three log-normal humps, mean 211, at most 1000."""
    u = rng.random()
    mu, sd = (4.727, 1.021) if u < 0.284 else (4.573, 0.364) if u < 0.719 else (6.006, 0.05)
    return max(1, min(1000, round(rng.lognormvariate(mu, sd))))


def attainment(make: Callable[[Oracle], WaitingQueue], *, load: float, sigma: float = 0.0, seed: int = 3) -> float:
    """Share of requests that start within the SLO; others expire. Predictions have a log-normal error of `sigma`."""
    rng, num = random.Random(seed), 2000
    lengths = [answer_tokens(rng) for _ in range(num)]
    s_per_token = MEAN_SERVICE_S / (sum(lengths) / num)
    predictions = {f"r{seq}": tokens * math.exp(rng.gauss(0, sigma)) for seq, tokens in enumerate(lengths)}
    queue = make(Oracle(predictions))
    arrivals_s: list[float] = []
    now_s = 0.0
    for _ in range(num):
        now_s += rng.expovariate(load * NUM_SLOTS / MEAN_SERVICE_S)
        arrivals_s.append(now_s)
    free = NUM_SLOTS
    happens: list[tuple[float, int, str, int]] = [(at_s, 2, "comes", seq) for seq, at_s in enumerate(arrivals_s)]
    members = {}
    in_time = 0
    while happens:
        now_s, _, what, seq = heapq.heappop(happens)
        if what == "comes":
            members[seq] = request(seq, at_s=now_s)
            queue.push(members[seq], held=False)
            heapq.heappush(happens, (now_s + SLO_S, 1, "expires", seq))
        elif what == "expires" and seq in members:
            queue.withdraw(members.pop(seq))
        elif what == "ends":
            free += 1
        while free and (member := queue.take()) is not None:
            free -= 1
            in_time += 1
            del members[member.seq]
            heapq.heappush(happens, (now_s + lengths[member.seq] * s_per_token, 0, "ends", member.seq))
    return in_time / num


def shipped(oracle: Oracle) -> WaitingQueue:
    return SpfQueue(SchedulerSettings().spf_ageing_s_per_token, oracle)


def test_noisy_predictions_with_ageing_keep_most_of_the_gain_of_an_oracle() -> None:
    strict = attainment(lambda oracle: SpfQueue(1e6, oracle), load=2.0)
    rough = attainment(shipped, load=2.0, sigma=0.7)
    first_come = attainment(lambda oracle: FifoQueue(), load=2.0)
    assert first_come < 0.55
    assert rough >= 0.59
    assert rough >= 0.9 * strict


def test_below_capacity_almost_every_request_starts_in_time() -> None:
    assert attainment(shipped, load=0.8, sigma=0.7) >= 0.98


class Ageless(SpfQueue):
    def __init__(self) -> None:
        super().__init__(1e6, Oracle())


def wait_of_long_answer_s(queue: WaitingQueue) -> float | None:
    """Seconds that a request of 400 tokens waits, on one slot overloaded by short ones; None: it never starts."""
    rng = random.Random(4)
    now_s, seq, next_s = 0.0, 0, 0.0
    while now_s < 2000:
        while next_s <= now_s:
            length = 400 if seq == 20 else rng.randint(40, 60)
            queue.push(request(seq, at_s=next_s, max_new_tokens=length), held=False)
            seq, next_s = seq + 1, next_s + rng.expovariate(1.2)
        member = queue.take()
        if member is None:
            now_s = next_s
        elif member.seq == 20:
            return now_s - member.admitted_s
        else:
            now_s += 1.0
    return None


def test_the_wait_of_a_long_answer_is_bounded_and_without_ageing_it_starves() -> None:
    waited_s = wait_of_long_answer_s(SpfQueue(AGEING_S, Oracle()))
    window_s = (400 - 40) * AGEING_S
    assert waited_s is not None
    # Requests that arrive in the window may go first, 1.2 a second and a second each, and those already waiting.
    assert window_s / 2 < waited_s <= 2 * 1.2 * window_s + 20
    assert wait_of_long_answer_s(Ageless()) is None
