"""`fair`: the bound of the paper, weights, the lift, charges, positions, and bounded memory."""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Mapping

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.scheduler import FifoQueue, LiveRequest, WaitingQueue
from chatstream.scheduler.policies.fair import MAX_IDLE_CLIENTS, FairQueue
from chatstream.scheduler.policies.fair_positions import NUM_NEAR
from chatstream.scheduler.states import Trigger
from tests.scheduler.policies.service import (
    PROMPT_COST,
    TOKEN_COST,
    Service,
    preempt,
    random_day,
    request,
    seqs,
    start,
    take,
)

# --- the bound ---------------------------------------------------------------------------------------------------


class WithoutLift(FairQueue):
    """Counters that are never lifted: a new client has all earlier service as credit."""

    def _lift(self, client: object) -> None:
        pass

    def _retire(self, client: object) -> None:
        pass


WEIGHTS = {"c0": 2.0, "c1": 4.0}


def gap_and_bound(
    queue: WaitingQueue, seed: int, *, num_slots: int, weights: Mapping[str, float], estimate_error: float = 0.0
) -> tuple[float, float]:
    day = random_day(Service(queue, num_slots, chunk_tokens=64), seed, weights, estimate_error=estimate_error)
    within = max(PROMPT_COST * day.longest_prompt, TOKEN_COST * day.service.largest_batch_tokens)
    # The prompt of each running request may be overestimated.
    return day.gap, 2 * (within + num_slots * PROMPT_COST * day.worst_estimate)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("seed", range(2))
def test_service_of_clients_that_always_wait_differs_by_at_most_the_bound_of_the_paper(
    seed: int, weights: Mapping[str, float], num_slots: int
) -> None:
    """Theorem 4.4: 2 * max(w_p * L_input, w_q * M), with M the tokens of the largest batch in the run."""
    gap, bound = gap_and_bound(FairQueue(weights), seed, num_slots=num_slots, weights=weights)
    assert 0 < gap <= bound


def test_wrong_prompt_estimates_widen_the_bound_by_at_most_their_errors() -> None:
    gap, bound = gap_and_bound(FairQueue(), 1, num_slots=4, weights={}, estimate_error=0.9)
    assert 0 < gap <= bound


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("make", [FifoQueue, WithoutLift])
def test_fcfs_and_counters_without_lift_break_the_bound(make: type[FairQueue], num_slots: int) -> None:
    gap, bound = gap_and_bound(make(), 0, num_slots=num_slots, weights={})
    assert gap > bound


def test_weights_are_shares() -> None:
    shares = {"big": 3.0, "half": 0.5}
    service = Service(FairQueue(shares), num_slots=2)
    for _ in range(400):
        for client in ("big", "one", "half"):
            while service.waiting[client] < 6:
                service.submit(client, 10, 20)
        for _ in range(20):
            service.step()
    total = sum(service.served.values())
    assert service.served["big"] / total == pytest.approx(3 / 4.5, rel=0.02)
    assert service.served["one"] / total == pytest.approx(1 / 4.5, rel=0.02)
    assert service.served["half"] / total == pytest.approx(0.5 / 4.5, rel=0.02)


# --- against a share computed independently ----------------------------------------------------------------------


def max_min_share(demands: Mapping[str, float], capacity: float) -> dict[str, float]:
    """Equal shares, except that no client gets more than it demands; the smallest demands are served first."""
    shares: dict[str, float] = {}
    left = capacity
    for n, (client, demand) in enumerate(sorted(demands.items(), key=lambda item: item[1])):
        shares[client] = min(demand, left / (len(demands) - n))
        left -= shares[client]
    return shares


ANSWER_TOKENS = 19
GENERATION_S = ANSWER_TOKENS + 1  # one step for the prompt
LIGHT = [f"light {n}" for n in range(9)]


def abused(queue: WaitingQueue, *, abuse: float) -> tuple[Service, dict[str, float]]:
    """Nine clients demand half of the capacity together; another client demands `abuse` times the capacity."""
    service = Service(queue, num_slots=2)
    rng = random.Random(7)
    demands: dict[str, float] = defaultdict(float)
    a_second = 2 / GENERATION_S  # requests that can be served
    for _ in range(6000):
        for client, rate in [*((one, 0.5 / 9 * a_second) for one in LIGHT), ("abuser", abuse * a_second)]:
            if rng.random() < rate:
                demands[client] += PROMPT_COST * 10 + TOKEN_COST * ANSWER_TOKENS
                service.submit(client, 10, ANSWER_TOKENS)
        service.step()
    return service, demands


def p99_wait_s(service: Service) -> float:
    """99th percentile of the waits of the nine clients."""
    waits_s = sorted(wait for seq, wait in service.waited_s.items() if service.clients[seq] != "abuser")
    return waits_s[len(waits_s) * 99 // 100]


def test_a_client_with_ten_times_the_capacity_leaves_others_their_max_min_share() -> None:
    service, demands = abused(FairQueue(), abuse=10)
    shares = max_min_share(demands, sum(service.served.values()))
    for client, share in shares.items():
        # At the end some requests are waiting or unfinished.
        assert service.served[client] == pytest.approx(share, abs=4 * (10 + 2 * ANSWER_TOKENS)), client
    alone, _ = abused(FairQueue(), abuse=0)
    # Without the abuser a slot is often free; with it, a request must end first.
    assert p99_wait_s(service) <= p99_wait_s(alone) + 2 * GENERATION_S


def test_fcfs_does_not_protect_others_from_such_a_client() -> None:
    service, demands = abused(FifoQueue(), abuse=10)
    shares = max_min_share(demands, sum(service.served.values()))
    assert all(service.served[client] < 0.5 * shares[client] for client in LIGHT)
    assert p99_wait_s(service) > 20 * GENERATION_S


# --- the lift ----------------------------------------------------------------------------------------------------


def charged(queue: FairQueue, member: LiveRequest, tokens: int) -> None:
    member.generated_tokens += tokens
    queue.charge(member, prompt_tokens=0, tokens=tokens)


def test_a_returning_client_is_lifted_to_the_smallest_waiting_counter() -> None:
    queue = FairQueue()
    queue.push(request(0, "early"), held=False)
    running = take(queue)
    for n, client in enumerate(("a", "b"), start=1):
        queue.push(request(n, client), held=False)
    charged(queue, running, 500)
    queue.push(request(3, "early"), held=False)
    # a and b arrived when the counter of early was 0. The smallest waiting counter is still 0, so new comes after them.
    queue.push(request(4, "new"), held=False)
    assert [queue.counter(name) for name in ("a", "b", "early", "new")] == [0, 0, 1000, 0]
    assert seqs(iter(queue.take, None)) == [1, 2, 4, 3]


def test_when_no_client_waits_the_lift_is_to_the_client_taken_last() -> None:
    queue = FairQueue()
    queue.push(request(0, "first"), held=False)
    running = take(queue)
    charged(queue, running, 100)
    queue.push(request(1, "second"), held=False)
    assert queue.counter("second") == queue.counter("first") == 200


def test_a_client_with_running_requests_only_earns_no_credit() -> None:
    """A client that used one slot sends a waiting request: it is lifted to the smallest waiting counter."""
    queue = FairQueue()
    queue.push(request(0, "modest"), held=False)
    modest = take(queue)
    queue.push(request(1, "busy"), held=False)
    busy = take(queue)
    charged(queue, modest, 10)
    charged(queue, busy, 1000)
    queue.push(request(2, "busy"), held=False)
    queue.push(request(3, "modest"), held=False)
    assert queue.counter("modest") == queue.counter("busy") == 2000


def test_a_client_with_held_requests_only_is_lifted_at_unhold() -> None:
    queue = FairQueue()
    held = request(0, "a")
    queue.push(held, held=True)
    queue.push(request(1, "b"), held=False)
    charged(queue, take(queue), 100)
    queue.push(request(2, "b"), held=False)
    queue.unhold(held)
    assert queue.counter("a") == queue.counter("b") == 200


# --- charges -----------------------------------------------------------------------------------------------------


def test_a_prompt_is_charged_by_estimate_until_the_engine_reports_it() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    queue.push(request(1, "b", prompt_tokens=100), held=False)
    queue.push(request(2, "b", prompt_tokens=100), held=False)
    first, second = take(queue), take(queue)
    queue.push(request(3, "a"), held=False)
    assert (queue.counter("a"), queue.counter("b")) == (100, 100)
    queue.charge(first, prompt_tokens=60, tokens=0)
    queue.charge(first, prompt_tokens=60, tokens=0)
    assert queue.counter("a") == 120  # tokens beyond the estimate are charged as they are reported
    queue.charge(second, prompt_tokens=30, tokens=0)
    assert queue.counter("b") == 100
    queue.charge(second, prompt_tokens=0, tokens=1)
    assert queue.counter("b") == 30 + 2  # the overestimate is refunded with the first token
    assert take(queue).client == "b"


def test_an_engine_that_reports_no_prompts_leaves_the_estimate() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    running = take(queue)
    queue.push(request(1, "a"), held=False)
    charged(queue, running, 5)
    queue.end_run(running)
    assert queue.counter("a") == 110


def test_an_unreported_part_of_a_prompt_is_refunded_at_the_end() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    running = take(queue)
    queue.push(request(1, "a"), held=False)
    queue.charge(running, prompt_tokens=25, tokens=0)
    queue.end_run(running)
    assert queue.counter("a") == 25


def test_a_refund_changes_the_next_client() -> None:
    queue = FairQueue()
    for seq, (client, prompt) in enumerate((("a", 100), ("b", 50), ("a", 1), ("b", 1))):
        queue.push(request(seq, client, prompt_tokens=prompt), held=False)
    first, _ = take(queue), take(queue)
    queue.charge(first, prompt_tokens=10, tokens=1)
    assert (queue.counter("a"), queue.counter("b")) == (12, 50)
    assert take(queue).client == "a"


def test_a_prompt_is_charged_once_when_the_engine_fails() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    queue.push(request(1, "b"), held=False)
    failed = take(queue)
    assert queue.counter("a") == 100
    failed.move(Trigger.REQUEUE)
    queue.end_run(failed)
    queue.push(failed, held=False)
    assert queue.counter("a") == 0


def test_a_request_that_started_under_another_policy_is_charged_for_later_tokens() -> None:
    queue = FairQueue()
    for seq in range(3):
        queue.push(request(seq, "waits"), held=False)
    charged(queue, take(queue), 100)
    unknown = start(request(9, "unknown", prompt_tokens=1000))
    unknown.generated_tokens = 7
    charged(queue, unknown, 3)
    assert queue.counter("waits") == 200
    assert queue.counter("unknown") == 200 + 2 * 3
    queue.push(preempt(unknown), held=False)
    assert take(queue).client == "waits"


def test_a_charge_is_divided_by_the_weight() -> None:
    queue = FairQueue({"heavy": 4.0})
    queue.push(request(0, "heavy", prompt_tokens=100), held=False)
    running = take(queue)
    queue.push(request(1, "heavy"), held=False)
    charged(queue, running, 10)
    assert queue.counter("heavy") == (100 + 2 * 10) / 4


def test_within_a_client_preempted_requests_come_first_then_by_admission() -> None:
    queue = FairQueue()
    members = [request(n, "a") for n in range(4)]
    queue.push(members[0], held=True)
    queue.push(members[1], held=False)
    queue.push(members[2], held=False)
    assert take(queue) is members[1]
    queue.push(preempt(members[1]), held=False)
    queue.push(members[3], held=False)
    queue.unhold(members[0])
    assert seqs(queue) == [1, 0, 2, 3]
    assert seqs(iter(queue.take, None)) == [1, 0, 2, 3]


# --- against a naive model ---------------------------------------------------------------------------------------


class Naive:
    """The paper's algorithm over plain lists, which keeps all counters while there are requests."""

    def __init__(self, weights: Mapping[str, float]) -> None:
        self.weights = weights
        self.counters: dict[str, float] = {}
        self.returned: dict[str, int] = {}
        self.ready: list[LiveRequest] = []
        self.running: list[LiveRequest] = []
        self.last = ""
        self.num_returns = 0

    def of(self, client: str) -> list[LiveRequest]:
        return [member for member in self.ready if member.client == client]

    def push(self, member: LiveRequest) -> None:
        client = member.client
        if not self.of(client):
            waiting = [self.counters[one.client] for one in self.ready] or [self.counters.get(self.last, 0.0)]
            self.counters[client] = max(self.counters.get(client, 0.0), min(waiting))
            self.num_returns += 1
            self.returned[client] = self.num_returns
        self.ready.append(member)

    def take(self) -> LiveRequest | None:
        if not self.ready:
            return None
        self.last = min((one.client for one in self.ready), key=lambda c: (self.counters[c], self.returned[c]))
        member = min(self.of(self.last), key=lambda one: (not one.is_preempted, one.seq))
        self.ready.remove(member)
        if not member.is_preempted:
            self.counters[self.last] += member.arrival.prompt_tokens / self.weights.get(self.last, 1.0)
        self.running.append(member)
        return member

    def charge(self, member: LiveRequest, tokens: int) -> None:
        self.counters[member.client] += 2 * tokens / self.weights.get(member.client, 1.0)

    def forget(self) -> None:
        if not self.ready and not self.running:
            self.counters, self.last = {}, ""


OPERATIONS = st.tuples(
    st.sampled_from(["push", "push", "take", "take", "charge", "charge", "preempt", "end", "withdraw"]),
    st.sampled_from(["a", "b", "c", "heavy", "light"]),
    st.integers(0, 40),
)


@given(st.lists(OPERATIONS, max_size=120))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_order_equals_that_of_a_plain_implementation_of_the_paper(operations: list[tuple[str, str, int]]) -> None:
    weights = {"heavy": 4.0, "light": 0.5}
    queue, model = FairQueue(weights), Naive(weights)
    for seq, (operation, client, n) in enumerate(operations):
        running = model.running
        if operation == "push":
            member = request(seq, client, prompt_tokens=n)
            queue.push(member, held=False)
            model.push(member)
        elif operation == "take":
            expected = model.take()
            if expected is None:
                assert queue.take() is None
            else:
                assert take(queue) is expected
        elif operation == "charge" and running:
            member = running[n % len(running)]
            member.generated_tokens += n
            queue.charge(member, prompt_tokens=0, tokens=n)
            model.charge(member, n)
        elif operation == "preempt" and running:
            member = preempt(running.pop(n % len(running)))
            queue.push(member, held=False)
            model.push(member)
        elif operation == "end" and running:
            queue.end_run(running.pop(n % len(running)))
            model.forget()
        elif operation == "withdraw" and model.ready:
            member = model.ready.pop(n % len(model.ready))
            queue.withdraw(member)
            if member.is_preempted:
                queue.end_run(member)
            model.forget()
        for one in {member.client for member in model.ready}:
            assert queue.counter(one) == model.counters[one]


# --- positions ---------------------------------------------------------------------------------------------------


def test_a_new_client_gets_a_position_ahead_of_a_backlog() -> None:
    """Also when the backlog is old, and its answers were shorter or longer than expected."""
    queue = FairQueue()
    seq = 0
    for answer_tokens in (10, 2000):
        for _ in range(60):
            while len(queue) < 200:
                queue.push(request(seq, "crowd"), held=False)
                seq += 1
            running = take(queue)
            charged(queue, running, answer_tokens)
            queue.end_run(running)
        new = request(seq, "new")
        seq += 1
        queue.push(new, held=False)
        assert queue.position(new) <= 2
        queue.withdraw(new)


def test_positions_equal_the_start_order_when_answers_have_the_expected_length() -> None:
    rng = random.Random(3)
    queue = FairQueue({"c0": 2.0})
    for n in range(60):
        queue.push(
            request(n, f"c{n % 4}", prompt_tokens=rng.randint(1, 300), max_new_tokens=rng.randint(1, 99)), held=False
        )
    expected = seqs(queue)
    started = []
    while len(queue):
        member = take(queue)
        started.append(member.seq)
        assert member.arrival.max_new_tokens is not None
        queue.charge(member, prompt_tokens=0, tokens=member.arrival.max_new_tokens)
    near = [seq for seq in expected if seq // 4 < NUM_NEAR]
    assert started == near == expected


def test_near_and_far_requests_of_a_client_keep_their_order() -> None:
    queue = FairQueue()
    members = [request(n, f"c{n % 2}") for n in range(6 * NUM_NEAR)]
    for member in members:
        queue.push(member, held=False)
    for _ in range(40):
        charged(queue, take(queue), 17)
    for client in ("c0", "c1"):
        own = [member.seq for member in queue if member.client == client]
        assert own == sorted(own)


def fail(queue: FairQueue, member: LiveRequest) -> None:
    """The engine fails before the first token of a running request."""
    member.move(Trigger.REQUEUE)
    queue.end_run(member)
    queue.push(member, held=False)


def test_a_requeued_far_request_keeps_its_order_within_the_client() -> None:
    queue = FairQueue()
    for seq in range(NUM_NEAR + 5):
        queue.push(request(seq, "a"), held=True)
    for seq in range(NUM_NEAR + 5, NUM_NEAR + 9):
        queue.push(request(seq, "a"), held=False)
    failed, running = take(queue), take(queue)
    charged(queue, running, 100_000)
    fail(queue, failed)
    assert seqs(queue) == [seq for seq in range(NUM_NEAR + 9) if seq != running.seq]


def test_preempted_requests_come_first_even_beyond_the_near_limit() -> None:
    queue = FairQueue()
    for seq in range(2 * NUM_NEAR):
        queue.push(request(seq, "a"), held=False)
    failed, *running = [take(queue) for _ in range(2 * NUM_NEAR)]
    for member in running[:-1]:
        queue.push(preempt(member), held=False)
    fail(queue, failed)
    queue.push(preempt(running[-1]), held=False)
    assert seqs(queue) == [*range(1, 2 * NUM_NEAR), 0]


def test_the_expected_cost_of_a_preempted_request_is_the_rest_of_its_answer() -> None:
    queue = FairQueue()
    queue.push(request(0, "b", prompt_tokens=1250), held=False)
    queue.push(request(1, "a", prompt_tokens=1000, max_new_tokens=100), held=False)
    take(queue)
    preempted = take(queue)
    charged(queue, preempted, 90)
    queue.push(preempt(preempted), held=False)
    queue.push(request(2, "b"), held=False)
    queue.push(request(3, "a"), held=False)
    assert (queue.counter("a"), queue.counter("b")) == (1180, 1250)
    assert seqs(queue) == [1, 3, 2]  # ten tokens are left: the next request of a is expected to start at 1200


# --- bounded memory -------------------------------------------------------------------------------------------


def serve(queue: FairQueue, member: LiveRequest, tokens: int) -> None:
    charged(queue, member, tokens)
    queue.end_run(member)


def test_without_requests_no_client_is_kept() -> None:
    queue = FairQueue()
    for n in range(50):
        queue.push(request(n, f"c{n}"), held=n % 3 == 0)
    for member in list(queue)[::2]:
        queue.withdraw(member)
    running = [take(queue) for _ in range(10)]
    for member in list(queue):
        queue.withdraw(member)
    for member in running:
        serve(queue, member, 9)
    assert queue.num_clients == 0
    assert queue.counter("c1") == 0


def test_an_idle_client_is_kept_while_its_counter_is_above_the_smallest() -> None:
    queue = FairQueue()
    queue.push(request(0, "ahead"), held=False)
    queue.push(request(1, "waits"), held=False)
    queue.push(request(2, "waits"), held=False)
    ahead = take(queue)
    queue.push(request(3, "withdrawn"), held=False)
    queue.withdraw(request(3, "withdrawn"))
    assert queue.num_clients == 2
    serve(queue, ahead, 10)
    assert queue.counter("ahead") == 20
    charged(queue, take(queue), 30)
    assert queue.num_clients == 2
    take(queue)  # at 60: a lift would raise a counter of 20 anyway
    assert queue.num_clients == 1


def test_30_000_clients_in_sequence_are_forgotten() -> None:
    """One generation runs all the time, so that the queue is never without any request."""
    queue = FairQueue()
    queue.push(request(0, "endless"), held=False)
    endless = take(queue)
    most = 0
    for n in range(1, 30_000):
        queue.push(request(n, f"c{n}"), held=False)
        serve(queue, take(queue), 3)
        most = max(most, queue.num_clients)
    assert most <= 2
    serve(queue, endless, 3)
    assert queue.num_clients == 0


def test_beyond_the_limit_the_idle_clients_with_the_smallest_counters_are_forgotten() -> None:
    queue = FairQueue()
    for n in range(3 * MAX_IDLE_CLIENTS):
        for seq in (2 * n, 2 * n + 1):
            queue.push(request(seq, f"c{seq}"), held=False)
        # Two clients arrive for each one served, so the smallest counter stays 0.
        serve(queue, take(queue), 1 + n % 1000)
        assert queue.num_clients - len(queue) <= MAX_IDLE_CLIENTS
    counters = [queue.counter(f"c{n}") for n in range(3 * MAX_IDLE_CLIENTS)]
    remembered = [counter for counter in counters if counter > 0]
    assert len(remembered) == MAX_IDLE_CLIENTS
    assert min(remembered) >= 2 * 600
