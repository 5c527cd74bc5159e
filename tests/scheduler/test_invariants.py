"""The scheduler under every order of facts that Hypothesis can think of.

After each call: the log is replayed by `History` (which trusts nothing else), a list that is scanned stands in for
the queue, and the invariants are checked. docs/reliability.md says which invariant is held by which test.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, initialize, invariant, multiple, precondition, rule

from chatstream.errors import Overloaded
from chatstream.scheduler import QUEUES, Arrival, Grant, Outcome, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.testing import History

NUMBER = st.integers(0, 5)


class SchedulerMachine(RuleBasedStateMachine):
    """Hypothesis picks among those who run by number, so that most steps do something; rare facts are thrown for."""

    old_grants = Bundle("old_grants")

    @initialize(
        is_open=st.sampled_from([True, True, True, False]),
        max_concurrency=st.integers(1, 3),
        max_queue_size=st.integers(0, 4),
        max_wait_s=st.sampled_from([None, 5.0]),
        stall_timeout_s=st.sampled_from([None, 8.0]),
        abort_timeout_s=st.sampled_from([None, 3.0]),
        policy=st.sampled_from(["fcfs", "fcfs", *QUEUES]),
        slice_tokens=st.sampled_from([None, 2, 2]),
        max_resident=st.sampled_from([None, 3, 4]),
        max_running_per_client=st.sampled_from([None, None, 1, 2]),
        max_waiting_per_client=st.sampled_from([None, None, 2]),
        max_waiting_tokens=st.sampled_from([None, None, 1000]),
    )
    def build(self, is_open: bool, max_wait_s: float | None, **settings: Any) -> None:
        self.settings = SchedulerSettings(max_wait_s=max_wait_s, **settings)
        self.scheduler = Scheduler(self.settings)
        self.can_preempt = self.settings.slice_tokens is not None or self.settings.policy == "fair-token"
        max_concurrency = self.settings.first_concurrency
        self.history = History(
            max_concurrency,
            settings["max_queue_size"],
            is_fcfs=self.settings.policy == "fcfs",
            max_running_per_client=self.settings.max_running_per_client,
            has_slices=self.can_preempt,
        )
        self.max_wait_s = max_wait_s
        self.max_running_allowed = max_concurrency
        self.now_s = 0.0
        self.number = 0
        self.grants: dict[str, Grant] = {}
        self.line: list[str] = []  # the naive model: who waits, in order of admission
        self.places: dict[str, int] = {}
        self.expires_s: dict[str, float] = {}
        if is_open:
            self.open()

    # --- rules --------------------------------------------------------------------------------------------------

    @rule(
        client=st.sampled_from(["x", "y", "z"]),
        conversation=st.sampled_from([None, None, "a", "b"]),
        max_wait_s=st.sampled_from([None, None, 0.5, 20.0]),
        priority=st.sampled_from([0, 0, 3, -1]),
        max_new_tokens=st.sampled_from([None, 10, 500]),
        burst=st.integers(1, 4),
    )
    def submit(self, max_wait_s: float | None, burst: int, **details: Any) -> None:
        for _ in range(burst):
            self.number += 1
            request_id = f"r{self.number}"
            arrival = Arrival(request_id=request_id, max_wait_s=max_wait_s, **details)
            hint_s = self.scheduler.retry_after_s(self.now_s)
            backlog = self.scheduler.stats().waiting
            try:
                self.scheduler.submit(arrival, self.now_s)
                waits_s = [w for w in (max_wait_s, self.max_wait_s) if w is not None]
                self.expires_s[request_id] = self.now_s + min(waits_s, default=float("inf"))
            except Overloaded as refusal:
                assert refusal.retry_after_s is not None
                assert 1.0 <= refusal.retry_after_s <= 120.0
                if self.scheduler.stats().waiting == backlog:
                    assert refusal.retry_after_s == hint_s
            self.take()

    @rule(count=st.integers(0, 3), prompt_tokens=st.sampled_from([0, 0, 7]))
    def tokens(self, count: int, prompt_tokens: int) -> None:
        for request_id in sorted(self.history.running):
            self.scheduler.on_tokens(self.grants[request_id], count, self.now_s, prompt_tokens=prompt_tokens)
            self.take()

    @precondition(lambda self: any(r.is_preempting for r in self.history.running.values()))
    @rule()
    def engine_preempts(self) -> None:
        for request_id, request in list(self.history.running.items()):
            if request.is_preempting:
                self.scheduler.on_preempted(self.grants[request_id], self.now_s)
                self.take()

    @precondition(lambda self: self.can_preempt and self.line and self.history.running)
    @rule(seconds=st.sampled_from([0.2, 1.0, 1.0]))
    def slices_are_used_up(self, seconds: float) -> None:
        self.time_passes(seconds, is_late=False)
        self.tokens(count=3, prompt_tokens=0)
        if any(r.is_preempting for r in self.history.running.values()):
            self.engine_preempts()

    @precondition(lambda self: self.grants)
    @rule(target=old_grants, number=NUMBER, outcome=st.sampled_from(["stop", "error"]))
    def engine_ends(self, number: int, outcome: str) -> object:
        request_id = self.pick(self.grants, number)
        grant = self.grants[request_id]
        kind = Outcome.FINISHED if outcome == "stop" else Outcome.FAILED
        self.scheduler.on_ended(grant, kind, outcome, self.now_s)
        self.take()
        return grant

    @precondition(lambda self: self.history.running)
    @rule(target=old_grants, number=NUMBER)
    def engine_is_lost_before_the_first_token(self, number: int) -> object:
        request_id = self.pick(self.history.running, number)
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
        self.scheduler.on_preempted(grant, self.now_s)
        assert not self.scheduler.requeue(grant, self.now_s)
        assert self.scheduler.take_events() == []
        assert self.scheduler.requests(self.now_s) == before

    @precondition(lambda self: self.grants or self.line)
    @rule(number=NUMBER)
    def cancel_twice(self, number: int) -> None:
        request_id = self.pick([*self.grants, *self.line], number)
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

    @rule(
        what=st.sampled_from(["limits", "policy", "pause", "drain"]),
        max_concurrency=st.integers(1, 4) | st.none(),
        max_queue_size=st.integers(0, 5) | st.none(),
        policy=st.sampled_from([*QUEUES]),
    )
    def an_operator_intervenes(
        self, what: str, max_concurrency: int | None, max_queue_size: int | None, policy: str
    ) -> None:
        """And undoes some of it at once or a step later: most of the time the line should move."""
        now_s = self.now_s
        match what:
            case "limits":
                if max_concurrency is not None:
                    max_concurrency = min(max_concurrency, self.settings.max_resident or max_concurrency)
                self.scheduler.set_limits(now_s, max_concurrency=max_concurrency, max_queue_size=max_queue_size)
                self.take()
                stats = self.scheduler.stats()
                self.max_running_allowed = max(stats.running, stats.max_concurrency)
            case "policy":
                before = self.scheduler.requests(now_s)
                self.scheduler.set_policy(policy, now_s)
                self.take()
                assert {v.request_id for v in before} >= {v.request_id for v in self.scheduler.requests(now_s)}
                self.places.clear()
            case "pause":
                self.scheduler.pause(now_s)
                self.take()
                self.submit(max_wait_s=None, burst=1)
                self.scheduler.unpause(now_s)
                self.take()
            case "drain":
                self.scheduler.drain(now_s)
                self.take()
                stats = self.scheduler.stats()
                assert stats.waiting == stats.preempted, "only those who have begun are left"

    @precondition(lambda self: self.line)
    @rule(number=NUMBER)
    def ask_for_the_time(self, number: int) -> None:
        request_id = self.pick(self.line, number)
        eta = self.scheduler.eta(request_id, self.now_s)
        if eta is not None:
            assert 0.0 <= eta.p50_s <= eta.p90_s < float("inf")
            assert self.scheduler.position(request_id) is not None
        assert self.scheduler.take_events() == []

    @precondition(lambda self: not self.scheduler.stats().is_open)
    @rule()
    def open(self) -> None:
        self.scheduler.open(self.now_s, can_preempt=self.can_preempt)
        self.take()

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
        if self.scheduler.is_exact:
            for place, request_id in enumerate(self.line, start=1):
                assert self.scheduler.position(request_id) == place
                assert place <= self.places.get(request_id, place)
                self.places[request_id] = place
        else:
            views = self.scheduler.requests(self.now_s)
            places = [v.position for v in views if v.position is not None]
            assert places == list(range(1, len(self.line) + 1))
            assert all(v.position == self.scheduler.position(v.request_id) for v in views)

    @invariant()
    def no_slot_is_free_while_somebody_may_start(self) -> None:
        stats = self.scheduler.stats()
        if stats.is_open and stats.running < stats.max_concurrency:
            assert not any(self.history.could_have_started(r) for r in self.history.waiting.values())

    @invariant()
    def everybody_is_accounted_for(self) -> None:
        s = self.scheduler.stats()
        ended = s.finished + s.cancelled + s.failed + s.expired
        assert s.received == s.rejected + ended + s.running + s.waiting + s.leaving
        assert (s.leaving, s.preempted) == (
            len(self.history.leaving),
            sum(r.is_preempted for r in self.history.waiting.values()),
        )
        assert len(self.history.ended) == s.finished + s.cancelled + s.failed + s.expired

    @invariant()
    def nobody_waits_beyond_the_time_allowed(self) -> None:
        for request_id in self.line:
            if self.history.waiting[request_id].is_preempted:
                continue  # it was served once
            assert self.now_s < self.expires_s.get(request_id, float("inf"))

    @invariant()
    def memory_follows_the_live_requests(self) -> None:
        stats, records = self.scheduler.stats(), self.scheduler.records()
        live = stats.running + stats.waiting + stats.leaving
        assert records["deadlines"] <= 4 * live + 64 + 1
        assert records["eligibility_keys"] <= 2 * live

    @invariant()
    def what_is_counted_adds_up(self) -> None:
        waiting = [view for view in self.scheduler.requests(self.now_s) if view.position is not None]
        records = self.scheduler.records()
        assert records["waiting_tokens"] == sum(view.waiting_tokens for view in waiting)
        assert records["waiting_clients"] == len({view.client for view in waiting})
        assert self.scheduler.stats().preempting == sum(r.is_preempting for r in self.history.running.values())

    @staticmethod
    def pick(among: Iterable[str], number: int) -> str:
        names = sorted(among)
        return names[number % len(names)]

    def take(self) -> None:
        events = self.scheduler.take_events()
        for before, event in zip([None, *events], events, strict=False):
            self.history.feed([event])
            if isinstance(before, ev.Preempted) and isinstance(event, ev.Started):
                self.check_that_the_engine_may_hold_one_more()
            match event:
                case ev.Admitted():
                    self.line.append(event.request_id)
                case ev.Preempted():
                    del self.grants[event.request_id]
                    self.line.append(event.request_id)
                    self.line.sort(key=lambda request_id: int(request_id[1:]))
                    for request_id in self.line:  # one of those behind it takes its slot, unless all of them are held
                        self.places.pop(request_id, None)
                case ev.Resumed():
                    self.line.remove(event.request_id)
                    self.grants[event.request_id] = event.grant
                case ev.AbortRequested():
                    if event.request_id in self.line:
                        self.line.remove(event.request_id)
                        self.grants[event.request_id] = event.grant  # its engine still has to let go of it
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

    def check_that_the_engine_may_hold_one_more(self) -> None:
        """Somebody has begun in the slot of another that has not ended."""
        begun = len(self.history.running) + len(self.history.leaving)
        begun += sum(r.is_preempted for r in self.history.waiting.values())
        max_concurrency = self.scheduler.stats().max_concurrency
        assert begun <= max(self.settings.max_resident or 2 * max_concurrency, max_concurrency)

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
        assert (stats.preempting, stats.preempted, stats.leaving) == (0, 0, 0)
        assert self.scheduler.next_deadline_s() is None
        assert not any(self.scheduler.records().values())


TestScheduler = SchedulerMachine.TestCase
TestScheduler.settings = settings(max_examples=200, stateful_step_count=80, deadline=None)


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
