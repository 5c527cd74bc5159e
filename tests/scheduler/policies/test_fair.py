"""Clients share by tokens: the paper's bound, weights, the lift, and what is forgotten."""

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
    """Counts from the beginning of time: who comes late has everything before it as credit."""

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
    # Of everybody who runs, the prompt may have been taken for longer than it is.
    return day.gap, 2 * (within + num_slots * PROMPT_COST * day.worst_estimate)


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("weights", [{}, WEIGHTS], ids=["equal", "weighted"])
@pytest.mark.parametrize("seed", range(2))
def test_clients_that_wait_all_the_time_never_drift_apart_by_more_than_the_paper_says(
    seed: int, weights: Mapping[str, float], num_slots: int
) -> None:
    """Theorem 4.4: 2 * max(w_p * L_input, w_q * M), M the tokens of the largest batch that there was."""
    gap, bound = gap_and_bound(FairQueue(weights), seed, num_slots=num_slots, weights=weights)
    assert 0 < gap <= bound


def test_wrong_estimates_of_prompts_cost_no_more_than_what_they_were_wrong() -> None:
    gap, bound = gap_and_bound(FairQueue(), 1, num_slots=4, weights={}, estimate_error=0.9)
    assert 0 < gap <= bound


@pytest.mark.parametrize("num_slots", [1, 2, 4])
@pytest.mark.parametrize("make", [FifoQueue, WithoutLift])
def test_the_bound_is_not_kept_by_itself(make: type[FairQueue], num_slots: int) -> None:
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
    """Everybody gets the same, but nobody more than it wants: fill up the smallest wishes first."""
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
    """Nine people want half of what there is, together; another client wants `abuse` times all of it."""
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
    """Of the nine."""
    waits_s = sorted(wait for seq, wait in service.waited_s.items() if service.clients[seq] != "abuser")
    return waits_s[len(waits_s) * 99 // 100]


def test_an_abuser_gets_what_the_others_leave() -> None:
    service, demands = abused(FairQueue(), abuse=10)
    shares = max_min_share(demands, sum(service.served.values()))
    for client, share in shares.items():
        # Some is in line or half done at the end.
        assert service.served[client] == pytest.approx(share, abs=4 * (10 + 2 * ANSWER_TOKENS)), client
    alone, _ = abused(FairQueue(), abuse=0)
    # Without the abuser a slot is often free; with it, somebody has to end first.
    assert p99_wait_s(service) <= p99_wait_s(alone) + 2 * GENERATION_S


def test_first_come_first_served_hands_everything_to_the_abuser() -> None:
    service, demands = abused(FifoQueue(), abuse=10)
    shares = max_min_share(demands, sum(service.served.values()))
    assert all(service.served[client] < 0.5 * shares[client] for client in LIGHT)
    assert p99_wait_s(service) > 20 * GENERATION_S


# --- the lift ----------------------------------------------------------------------------------------------------


def charged(queue: FairQueue, member: LiveRequest, tokens: int) -> None:
    member.generated_tokens += tokens
    queue.charge(member, prompt_tokens=0, tokens=tokens)


def test_who_returns_starts_beside_the_least_of_those_who_wait() -> None:
    queue = FairQueue()
    queue.push(request(0, "early"), held=False)
    running = take(queue)
    for n, client in enumerate(("a", "b"), start=1):
        queue.push(request(n, client), held=False)
    charged(queue, running, 500)
    queue.push(request(3, "early"), held=False)
    # a and b came when early had had nothing yet, and so does the newcomer now: it comes after them by time only.
    queue.push(request(4, "new"), held=False)
    assert [queue.counter(name) for name in ("a", "b", "early", "new")] == [0, 0, 1000, 0]
    assert seqs(iter(queue.take, None)) == [1, 2, 4, 3]


def test_who_comes_when_nobody_waits_starts_beside_the_one_taken_last() -> None:
    queue = FairQueue()
    queue.push(request(0, "first"), held=False)
    running = take(queue)
    charged(queue, running, 100)
    queue.push(request(1, "second"), held=False)
    assert queue.counter("second") == queue.counter("first") == 200


def test_who_has_enough_running_saves_nothing_up() -> None:
    """Content with one slot for long, then it wants many: it does not get all of them until it has caught up."""
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


def test_a_client_with_held_requests_only_is_lifted_when_they_may_start() -> None:
    queue = FairQueue()
    held = request(0, "a")
    queue.push(held, held=True)
    queue.push(request(1, "b"), held=False)
    charged(queue, take(queue), 100)
    queue.push(request(2, "b"), held=False)
    queue.unhold(held)
    assert queue.counter("a") == queue.counter("b") == 200


# --- charges -----------------------------------------------------------------------------------------------------


def test_the_prompt_costs_what_was_estimated_until_the_engine_knows() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    queue.push(request(1, "b", prompt_tokens=100), held=False)
    queue.push(request(2, "b", prompt_tokens=100), held=False)
    first, second = take(queue), take(queue)
    queue.push(request(3, "a"), held=False)
    assert (queue.counter("a"), queue.counter("b")) == (100, 100)
    queue.charge(first, prompt_tokens=60, tokens=0)
    queue.charge(first, prompt_tokens=60, tokens=0)
    assert queue.counter("a") == 120  # more than expected is charged as it is read
    queue.charge(second, prompt_tokens=30, tokens=0)
    assert queue.counter("b") == 100
    queue.charge(second, prompt_tokens=0, tokens=1)
    assert queue.counter("b") == 30 + 2  # less than expected is given back with the first token
    assert take(queue).client == "b"


def test_an_engine_that_reports_no_prompts_leaves_the_estimate() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    running = take(queue)
    queue.push(request(1, "a"), held=False)
    charged(queue, running, 5)
    queue.end_run(running)
    assert queue.counter("a") == 110


def test_what_was_not_read_is_given_back_when_the_engine_reports_and_the_request_ends() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    running = take(queue)
    queue.push(request(1, "a"), held=False)
    queue.charge(running, prompt_tokens=25, tokens=0)
    queue.end_run(running)
    assert queue.counter("a") == 25


def test_what_is_given_back_counts_for_who_is_next() -> None:
    queue = FairQueue()
    for seq, (client, prompt) in enumerate((("a", 100), ("b", 50), ("a", 1), ("b", 1))):
        queue.push(request(seq, client, prompt_tokens=prompt), held=False)
    first, _ = take(queue), take(queue)
    queue.charge(first, prompt_tokens=10, tokens=1)
    assert (queue.counter("a"), queue.counter("b")) == (12, 50)
    assert take(queue).client == "a"


def test_a_request_whose_engine_failed_pays_its_prompt_once() -> None:
    queue = FairQueue()
    queue.push(request(0, "a", prompt_tokens=100), held=False)
    queue.push(request(1, "b"), held=False)
    failed = take(queue)
    assert queue.counter("a") == 100
    failed.move(Trigger.REQUEUE)
    queue.end_run(failed)
    queue.push(failed, held=False)
    assert queue.counter("a") == 0


def test_who_ran_before_the_policy_was_chosen_pays_from_now_on() -> None:
    queue = FairQueue()
    for seq in range(3):
        queue.push(request(seq, "waits"), held=False)
    charged(queue, take(queue), 100)
    stranger = start(request(9, "stranger", prompt_tokens=1000))
    stranger.generated_tokens = 7
    charged(queue, stranger, 3)
    assert queue.counter("waits") == 200
    assert queue.counter("stranger") == 200 + 2 * 3
    queue.push(preempt(stranger), held=False)
    assert take(queue).client == "waits"


def test_a_token_costs_its_weight() -> None:
    queue = FairQueue({"heavy": 4.0})
    queue.push(request(0, "heavy", prompt_tokens=100), held=False)
    running = take(queue)
    queue.push(request(1, "heavy"), held=False)
    charged(queue, running, 10)
    assert queue.counter("heavy") == (100 + 2 * 10) / 4


def test_within_a_client_those_who_have_begun_go_on_first_and_the_others_by_admission() -> None:
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
    """The paper's algorithm over plain lists; it forgets nothing until everybody has gone."""

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

    def gone(self) -> None:
        if not self.ready and not self.running:
            self.counters, self.last = {}, ""


OPERATIONS = st.tuples(
    st.sampled_from(["push", "push", "take", "take", "charge", "charge", "preempt", "end", "withdraw"]),
    st.sampled_from(["a", "b", "c", "heavy", "light"]),
    st.integers(0, 40),
)


@given(st.lists(OPERATIONS, max_size=120))
@settings(max_examples=150, deadline=None, derandomize=True)
def test_the_order_is_that_of_the_paper(operations: list[tuple[str, str, int]]) -> None:
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
            model.gone()
        elif operation == "withdraw" and model.ready:
            member = model.ready.pop(n % len(model.ready))
            queue.withdraw(member)
            if member.is_preempted:
                queue.end_run(member)
            model.gone()
        for one in {member.client for member in model.ready}:
            assert queue.counter(one) == model.counters[one]


# --- positions ---------------------------------------------------------------------------------------------------


def test_a_newcomer_is_told_a_place_in_front_of_the_backlog_of_others() -> None:
    """Also when the backlog has been there for long, and its answers were not as long as expected."""
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
        newcomer = request(seq, "newcomer")
        seq += 1
        queue.push(newcomer, held=False)
        assert queue.position(newcomer) <= 2
        queue.withdraw(newcomer)


def test_places_are_those_of_the_starts_when_answers_are_as_long_as_expected() -> None:
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


def test_of_a_backlog_only_the_first_ones_are_followed_closely_but_all_keep_their_order() -> None:
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
    """Its engine failed before the first token."""
    member.move(Trigger.REQUEUE)
    queue.end_run(member)
    queue.push(member, held=False)


def test_who_comes_back_far_behind_keeps_its_place_among_those_of_its_client() -> None:
    queue = FairQueue()
    for seq in range(NUM_NEAR + 5):
        queue.push(request(seq, "a"), held=True)
    for seq in range(NUM_NEAR + 5, NUM_NEAR + 9):
        queue.push(request(seq, "a"), held=False)
    failed, running = take(queue), take(queue)
    charged(queue, running, 100_000)
    fail(queue, failed)
    assert seqs(queue) == [seq for seq in range(NUM_NEAR + 9) if seq != running.seq]


def test_those_who_have_begun_are_in_front_however_many_they_are() -> None:
    queue = FairQueue()
    for seq in range(2 * NUM_NEAR):
        queue.push(request(seq, "a"), held=False)
    failed, *running = [take(queue) for _ in range(2 * NUM_NEAR)]
    for member in running[:-1]:
        queue.push(preempt(member), held=False)
    fail(queue, failed)
    queue.push(preempt(running[-1]), held=False)
    assert seqs(queue) == [*range(1, 2 * NUM_NEAR), 0]


def test_what_is_left_of_a_preempted_answer_is_expected_and_its_prompt_no_more() -> None:
    queue = FairQueue()
    queue.push(request(0, "b", prompt_tokens=1250), held=False)
    queue.push(request(1, "a", prompt_tokens=1000, max_new_tokens=100), held=False)
    take(queue)
    begun = take(queue)
    charged(queue, begun, 90)
    queue.push(preempt(begun), held=False)
    queue.push(request(2, "b"), held=False)
    queue.push(request(3, "a"), held=False)
    assert (queue.counter("a"), queue.counter("b")) == (1180, 1250)
    assert seqs(queue) == [1, 3, 2]  # ten tokens are left: the next one of a is expected to start at 1200


# --- what is forgotten -------------------------------------------------------------------------------------------


def serve(queue: FairQueue, member: LiveRequest, tokens: int) -> None:
    charged(queue, member, tokens)
    queue.end_run(member)


def test_when_everybody_has_gone_nothing_is_left() -> None:
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


def test_one_who_is_not_ahead_is_forgotten_at_once_and_one_who_is_later() -> None:
    queue = FairQueue()
    queue.push(request(0, "ahead"), held=False)
    queue.push(request(1, "waits"), held=False)
    queue.push(request(2, "waits"), held=False)
    ahead = take(queue)
    queue.push(request(3, "gives up"), held=False)
    queue.withdraw(request(3, "gives up"))
    assert queue.num_clients == 2
    serve(queue, ahead, 10)
    assert queue.counter("ahead") == 20
    charged(queue, take(queue), 30)
    assert queue.num_clients == 2
    take(queue)  # at 60, so whoever has had 20 would be lifted anyway
    assert queue.num_clients == 1


def test_30_000_clients_one_after_the_other_leave_nothing_behind() -> None:
    """While one generation runs and runs, so that there never is nobody at all."""
    queue = FairQueue()
    queue.push(request(0, "runs on and on"), held=False)
    endless = take(queue)
    most = 0
    for n in range(1, 30_000):
        queue.push(request(n, f"c{n}"), held=False)
        serve(queue, take(queue), 3)
        most = max(most, queue.num_clients)
    assert most <= 2
    serve(queue, endless, 3)
    assert queue.num_clients == 0


def test_where_newcomers_never_end_only_so_many_are_remembered_those_who_are_ahead_most() -> None:
    queue = FairQueue()
    for n in range(3 * MAX_IDLE_CLIENTS):
        for seq in (2 * n, 2 * n + 1):
            queue.push(request(seq, f"c{seq}"), held=False)
        # Two come and one is served, so the least counter never moves.
        serve(queue, take(queue), 1 + n % 1000)
        assert queue.num_clients - len(queue) <= MAX_IDLE_CLIENTS
    ahead = [queue.counter(f"c{n}") for n in range(3 * MAX_IDLE_CLIENTS)]
    remembered = [counter for counter in ahead if counter > 0]
    assert len(remembered) == MAX_IDLE_CLIENTS
    assert min(remembered) >= 2 * 600
