"""The scheduler under every order of facts that Hypothesis can think of.

After each call: the log is replayed by `History` (which trusts nothing else), a list that is scanned stands in for
the queue, and the invariants are checked. The numbers are those of the design: 1 limits, 2 one state and one end,
3 conservation, 4 slots, 5 first come first served, 6 positions, 7 work conservation, 12 expiry, 13 cancel,
15 atomic admission, 18 limits at any time, 19 watchdog, 20 drain, 21 determinism, 23 replayable log.
(14, tokens are a prefix of what was generated, is held at the delivering end: tests/runtime/.)
"""

from __future__ import annotations

import hashlib
import random

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from chatstream.errors import Overloaded
from chatstream.scheduler import Arrival, Grant, Outcome, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.testing import History


class SchedulerMachine(RuleBasedStateMachine):
    admitted = Bundle("admitted")
    old_grants = Bundle("old_grants")

    @initialize(
        max_concurrency=st.integers(1, 3),
        max_queue_size=st.integers(0, 4),
        max_wait_s=st.sampled_from([None, 5.0]),
        stall_timeout_s=st.sampled_from([None, 8.0]),
        abort_timeout_s=st.sampled_from([None, 3.0]),
    )
    def build(self, max_concurrency: int, max_queue_size: int, **timeouts: float | None) -> None:
        self.scheduler = Scheduler(
            SchedulerSettings(max_concurrency=max_concurrency, max_queue_size=max_queue_size, **timeouts)
        )
        self.history = History(max_concurrency, max_queue_size)
        self.max_wait_s = timeouts["max_wait_s"]
        self.max_running_allowed = max_concurrency
        self.now_s = 0.0
        self.number = 0
        self.grants: dict[str, Grant] = {}
        self.line: list[str] = []  # the naive model: who waits, in order of admission
        self.places: dict[str, int] = {}
        self.expires_s: dict[str, float] = {}

    # --- rules --------------------------------------------------------------------------------------------------

    @rule(
        target=admitted,
        conversation=st.sampled_from([None, None, "a", "b"]),
        max_wait_s=st.sampled_from([None, None, 0.5, 20.0]),
        burst=st.integers(1, 4),
    )
    def submit(self, conversation: str | None, max_wait_s: float | None, burst: int) -> object:
        taken = []
        for _ in range(burst):
            self.number += 1
            request_id = f"r{self.number}"
            arrival = Arrival(request_id=request_id, conversation=conversation, max_wait_s=max_wait_s)
            try:
                self.scheduler.submit(arrival, self.now_s)
                taken.append(request_id)
                waits_s = [w for w in (max_wait_s, self.max_wait_s) if w is not None]
                self.expires_s[request_id] = self.now_s + min(waits_s, default=float("inf"))
            except Overloaded as refusal:
                assert refusal.retry_after_s is not None
                assert 1.0 <= refusal.retry_after_s <= 120.0
            self.take()
        return multiple(*taken)

    @rule(request_id=admitted, count=st.integers(1, 3))
    def tokens(self, request_id: str, count: int) -> None:
        if request_id in self.grants:
            self.scheduler.on_tokens(self.grants[request_id], count, self.now_s)
            self.take()

    @rule(target=old_grants, request_id=consumes(admitted), outcome=st.sampled_from(["stop", "error"]))
    def engine_ends(self, request_id: str, outcome: str) -> object:
        if request_id not in self.grants:
            return multiple()
        grant = self.grants[request_id]
        kind = Outcome.FINISHED if outcome == "stop" else Outcome.FAILED
        self.scheduler.on_ended(grant, kind, outcome, self.now_s)
        self.take()
        return grant

    @rule(target=old_grants, request_id=admitted)
    def engine_is_lost_before_the_first_token(self, request_id: str) -> object:
        if request_id not in self.grants:
            return multiple()
        grant = self.grants[request_id]
        self.scheduler.requeue(grant, self.now_s)
        self.take()
        return multiple() if request_id in self.grants else grant

    @rule(grant=old_grants, outcome=st.sampled_from(list(Outcome)))
    def a_late_report_changes_nothing(self, grant: Grant, outcome: Outcome) -> None:
        if self.grants.get(grant.request_id) == grant:
            return
        before = self.scheduler.requests(self.now_s)
        self.scheduler.on_ended(grant, outcome, "late", self.now_s)
        self.scheduler.on_tokens(grant, 1, self.now_s)
        assert not self.scheduler.requeue(grant, self.now_s)
        assert self.scheduler.take_events() == []
        assert self.scheduler.requests(self.now_s) == before

    @rule(request_id=admitted)
    def cancel_twice(self, request_id: str) -> None:
        self.scheduler.cancel(request_id, "client", self.now_s)
        self.take()
        self.scheduler.cancel(request_id, "client", self.now_s)
        assert self.scheduler.take_events() == []

    @rule(seconds=st.sampled_from([0.1, 1.0, 3.0, 10.0]), is_late=st.booleans())
    def time_passes(self, seconds: float, is_late: bool) -> None:
        until_s = self.now_s + seconds
        while not is_late and (due_s := self.scheduler.next_deadline_s()) is not None and due_s <= until_s:
            self.now_s = max(self.now_s, due_s)
            self.scheduler.handle_timer(self.now_s)
            self.take()
            assert (next_s := self.scheduler.next_deadline_s()) is None or next_s > self.now_s
        self.now_s = until_s
        self.scheduler.handle_timer(self.now_s)
        self.take()

    @rule(max_concurrency=st.integers(1, 4) | st.none(), max_queue_size=st.integers(0, 5) | st.none())
    def change_limits(self, max_concurrency: int | None, max_queue_size: int | None) -> None:
        self.scheduler.set_limits(self.now_s, max_concurrency=max_concurrency, max_queue_size=max_queue_size)
        self.take()
        running = self.scheduler.stats().running
        self.max_running_allowed = max(running, self.scheduler.stats().max_concurrency)

    @rule()
    def open(self) -> None:
        self.scheduler.open(self.now_s)
        self.take()

    @rule()
    def drain(self) -> None:
        self.scheduler.drain(self.now_s)
        self.take()
        assert self.scheduler.stats().waiting == 0

    # --- what must hold after every call ------------------------------------------------------------------------

    @invariant()
    def limits_are_exact(self) -> None:
        stats = self.scheduler.stats()
        assert stats.running <= self.max_running_allowed
        self.max_running_allowed = max(stats.max_concurrency, min(self.max_running_allowed, stats.running))

    @invariant()
    def the_log_replays_to_the_state(self) -> None:
        views = self.scheduler.requests(self.now_s)
        assert {v.request_id for v in views if v.position is None} == set(self.history.running)
        assert {v.request_id for v in views if v.position is not None} == set(self.history.waiting)
        assert {v.request_id: v.slot for v in views if v.position is None} == {
            i: r.grant.slot for i, r in self.history.running.items() if r.grant
        }

    @invariant()
    def places_are_exact_and_never_grow(self) -> None:
        for place, request_id in enumerate(self.line, start=1):
            assert self.scheduler.position(request_id) == place
            assert place <= self.places.get(request_id, place)
            self.places[request_id] = place

    @invariant()
    def no_slot_is_free_while_somebody_may_start(self) -> None:
        stats = self.scheduler.stats()
        if stats.is_open and stats.running < stats.max_concurrency:
            assert not any(self.history._may_start(r) for r in self.history.waiting.values())

    @invariant()
    def everybody_is_accounted_for(self) -> None:
        s = self.scheduler.stats()
        assert s.received == s.rejected + s.finished + s.cancelled + s.failed + s.expired + s.running + s.waiting
        assert len(self.history.ended) == s.finished + s.cancelled + s.failed + s.expired

    @invariant()
    def nobody_waits_beyond_the_time_allowed(self) -> None:
        for request_id in self.line:
            assert self.now_s < self.expires_s.get(request_id, float("inf"))

    @invariant()
    def memory_follows_the_live_requests(self) -> None:
        live = self.scheduler.stats().running + self.scheduler.stats().waiting
        assert len(self.scheduler._deadlines) <= 4 * live + 64 + 1
        assert len(self.scheduler._conversation_turns) <= live

    def take(self) -> None:
        events = self.scheduler.take_events()
        self.history.feed(events)
        for event in events:
            match event:
                case ev.Admitted():
                    self.line.append(event.request_id)
                case ev.Started():
                    assert event.at_s < self.expires_s.get(event.request_id, float("inf"))
                    self.line.remove(event.request_id)
                    self.grants[event.request_id] = event.grant
                case ev.Requeued():
                    del self.grants[event.request_id]
                    self.line.append(event.request_id)
                    self.line.sort(key=lambda request_id: int(request_id[1:]))
                    for request_id in self.line:  # those behind it have somebody ahead again
                        self.places.pop(request_id, None)
                case ev.Finished() | ev.Cancelled() | ev.Failed() | ev.Expired():
                    self.grants.pop(event.request_id, None)
                    if event.request_id in self.line:
                        self.line.remove(event.request_id)

    def teardown(self) -> None:
        """Liveness: when the faults stop, everybody who is still there ends and nothing is held."""
        if not hasattr(self, "scheduler"):
            return
        self.scheduler.open(self.now_s)
        self.take()
        for _ in range(100):
            if not self.grants:
                break
            for grant in list(self.grants.values()):
                self.scheduler.on_ended(grant, Outcome.FINISHED, "stop", self.now_s)
                self.take()
        self.history.check_complete()
        stats = self.scheduler.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert not len(self.scheduler._conversation_turns)


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=60, deadline=None)


def random_run(seed: int) -> str:
    """The hash of the log of one run of random facts."""
    rng = random.Random(seed)
    scheduler = Scheduler(SchedulerSettings(max_concurrency=3, max_queue_size=8, max_wait_s=4.0, stall_timeout_s=6.0))
    scheduler.open(0.0)
    grants: dict[str, Grant] = {}
    digest = hashlib.sha256()
    now_s = 0.0
    for n in range(400):
        now_s += rng.expovariate(2.0)
        choice = rng.random()
        if choice < 0.5:
            try:
                scheduler.submit(Arrival(request_id=f"r{n}", conversation=rng.choice([None, "a", "b"])), now_s)
            except Overloaded:
                pass
        elif grants:
            request_id = rng.choice(sorted(grants))
            if choice < 0.7:
                scheduler.on_tokens(grants[request_id], 1, now_s)
            elif choice < 0.8:
                scheduler.cancel(request_id, "client", now_s)
            elif choice < 0.85:
                scheduler.requeue(grants[request_id], now_s)
            else:
                scheduler.on_ended(grants[request_id], rng.choice(list(Outcome)[:3]), "x", now_s)
        scheduler.handle_timer(now_s)
        for event in scheduler.take_events():
            digest.update(repr(event).encode())
            if isinstance(event, ev.Started):
                grants[event.request_id] = event.grant
            elif not scheduler.is_live(event.request_id if hasattr(event, "request_id") else ""):
                grants.pop(getattr(event, "request_id", ""), None)
    return digest.hexdigest()


@pytest.mark.parametrize("seed", range(20))
def test_the_same_seed_gives_the_same_log(seed: int) -> None:
    assert random_run(seed) == random_run(seed)


def test_different_seeds_give_different_logs() -> None:
    assert len({random_run(seed) for seed in range(20)}) == 20
