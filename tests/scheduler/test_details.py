"""Small promises that no other test covers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from chatstream.errors import QueueFull
from chatstream.scheduler import Arrival, Eta, Outcome, Scheduler, SchedulerSettings, rounded
from chatstream.scheduler import events as ev
from chatstream.scheduler.deadlines import Deadlines
from chatstream.scheduler.eligibility import Eligibility, KeyLimit
from chatstream.scheduler.eta import EtaEstimator, smoothed
from chatstream.scheduler.limits.adaptive import AdaptiveLimit, Move
from chatstream.scheduler.policies import QUEUES, FairQueue, PriorityQueue
from chatstream.scheduler.request import LiveRequest
from chatstream.scheduler.states import State
from tests.scheduler.builders import Core


def request(seq: int, conversation: str | None = None, client: str = "", priority: int = 0) -> LiveRequest:
    arrival = Arrival(request_id=f"r{seq}", conversation=conversation, client=client, priority=priority)
    return LiveRequest(arrival, seq, admitted_s=float(seq))


# --- changes by an operator -----------------------------------------------------------------------------------------

CHANGES = {
    ev.LimitsChanged: lambda scheduler, **origin: scheduler.set_limits(1.0, max_concurrency=3, **origin),
    ev.PolicyChanged: lambda scheduler, **origin: scheduler.set_policy("priority", 1.0, **origin),
    ev.Paused: lambda scheduler, **origin: scheduler.pause(1.0, **origin),
    ev.Unpaused: lambda scheduler, **origin: (scheduler.pause(1.0), scheduler.unpause(1.0, **origin)),
    ev.DrainStarted: lambda scheduler, **origin: scheduler.drain(1.0, **origin),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_records_by_and_why_and_both_may_be_empty(kind: type) -> None:
    for origin in ({"by": "ann", "why": "too slow"}, {}):
        scheduler = Scheduler()
        CHANGES[kind](scheduler, **origin)
        (event,) = [event for event in scheduler.take_events() if type(event) is kind]
        assert (event.by, event.why) == (origin.get("by", ""), origin.get("why", ""))
        assert event.at_s == 1.0


def test_pause_and_unpause_are_reported_once() -> None:
    core = Core()
    for _ in range(2):
        core.pause()
    assert core.scheduler.stats().is_paused is True
    for _ in range(2):
        core.unpause()
    assert core.scheduler.stats().is_paused is False
    assert [type(event) for event in core.log[1:]] == [ev.Paused, ev.Unpaused]


def test_a_drain_cancels_unstarted_requests_with_shutdown() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    core.drain()
    (end,) = core.ends("b")
    assert isinstance(end, ev.Cancelled)
    assert (end.by, end.total, end.at_s) == ("shutdown", 0, core.now_s)
    assert core.ends("a") == []


# --- eligibility ----------------------------------------------------------------------------------------------------


def test_a_request_waits_for_its_conversation_despite_free_slots() -> None:
    core = Core(max_concurrency=4, max_queue_size=5)
    core.submit("first", "second", conversation="k")
    assert (core.running, core.waiting) == (["first"], ["second"])
    assert core.scheduler.waits_for("second") == "conversation"
    core.finish("first")
    assert core.running == ["second"]


def test_a_request_waits_at_the_limit_of_its_client() -> None:
    core = Core(max_concurrency=2, max_queue_size=5, max_running_per_client=1)
    core.submit("a", "b", client="ann")
    core.submit("c", client="bob")
    core.submit("d", client="carl")
    reasons = {name: core.scheduler.waits_for(name) for name in ("a", "b", "c", "d", "unknown")}
    assert reasons == {"a": None, "b": "client_limit", "c": None, "d": "slot", "unknown": None}
    core.finish("a")
    assert core.running == ["b", "c"]


def test_before_opening_requests_wait_for_it_or_are_held() -> None:
    core = Core(is_open=False, max_concurrency=4, max_running_per_client=2)
    core.submit("a", "b", conversation="k", client="ann")
    core.submit("c", "d", client="ann")
    views = core.scheduler.requests(core.now_s)
    reasons = {"a": "opening", "b": "conversation", "c": "opening", "d": "client_limit"}
    assert {view.request_id: view.waits_for for view in views} == reasons


def test_a_preempted_request_waits_for_a_slot() -> None:
    core = Core(max_concurrency=1, can_preempt=True, slice_tokens=1)
    core.submit("long", "short")
    core.at(1.0).tokens("long")
    core.preempt("long")
    long = core.scheduler.requests(core.now_s)[-1]
    assert (long.request_id, long.is_preempted, long.waits_for) == ("long", True, "slot")


def test_key_limit_knows_its_members_and_ignores_others() -> None:
    limit = KeyLimit(1)
    first, second, unknown = request(1), request(2), request(3)
    assert limit.is_eligible("k", first) is False
    assert limit.add("k", first) is True
    assert limit.add("k", second) is False
    assert [limit.is_eligible("k", one) for one in (first, second, unknown)] == [True, False, False]
    assert limit.end("k", unknown) is None
    assert limit.end("k", first) is second
    assert limit.is_eligible("k", second) is True
    assert limit.end("k", second) is None
    assert len(limit) == 0


def test_eligibility_counts_its_conversations_and_clients() -> None:
    eligibility = Eligibility(1)
    one = request(1, conversation="k", client="ann")
    other = request(2, client="bob")
    eligibility.add(one)
    eligibility.add(other)
    assert len(eligibility) == 3  # a conversation and two clients
    eligibility.end(one)
    eligibility.end(other)
    assert len(eligibility) == 0


def test_a_change_of_policy_keeps_a_request_held() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a", conversation="k")
    core.submit("b", conversation="k")
    core.submit("c")
    core.submit("d")
    core.set_policy("priority")
    core.finish("c")
    assert core.running == ["a", "d"], "b waits for a"


# --- ETA ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [
        (0.0, 0.0), (0.04, 0.0), (0.16, 0.2), (0.96, 1.0), (1.0, 1.0), (1.4, 1.0), (1.6, 2.0), (9.4, 9.0),
        (10.4, 10.0), (10.6, 11.0), (99.4, 99.0), (104.0, 100.0), (106.0, 110.0), (1234.0, 1200.0),
    ],
)  # fmt: skip
def test_times_are_rounded_to_their_accuracy(seconds: float, shown: float) -> None:
    assert rounded(seconds) == shown


def test_an_eta_falls_at_once_and_rises_by_a_fifth_per_second() -> None:
    sent = Eta(10.0, 20.0)
    assert smoothed(sent, 0.0, Eta(2.0, 3.0), 1.0) == Eta(2.0, 3.0)
    assert smoothed(sent, 0.0, Eta(50.0, 60.0), 1.0) == Eta(12.0, 24.0)
    assert smoothed(sent, 0.0, Eta(50.0, 60.0), 2.0) == pytest.approx(Eta(14.4, 28.8)), "20 % for each second"
    assert smoothed(sent, 0.0, Eta(50.0, 60.0), 9.0) == Eta(50.0, 60.0)
    assert smoothed(sent, 0.0, Eta(50.0, 60.0), 0.0) == sent
    assert smoothed(Eta(0.5, 0.5), 0.0, Eta(50.0, 60.0), 1.0) == Eta(1.2, 1.2), "from at least a second"
    assert smoothed(sent, 0.0, Eta(50.0, 60.0), 1.0, may_jump=True) == Eta(50.0, 60.0)


def busy_core(**settings: object) -> Core:
    """One slot, after enough generations that ETAs have a basis."""
    core = Core(max_concurrency=1, max_queue_size=20, **settings)
    for n in range(40):
        core.submit(f"past{n}")
        core.at(core.now_s + 1.0)
        core.tokens(f"past{n}", 10)
        core.at(core.now_s + 9.0)
        core.finish(f"past{n}")
    return core


def test_an_eta_rises_slowly_unless_the_position_got_worse() -> None:
    for priority, may_jump in ((0, False), (5, True)):
        core = busy_core(policy="priority")
        core.submit("now", "ahead", "asks")
        sent = core.scheduler.eta("asks", core.now_s)
        assert sent is not None
        core.submit(*(f"later{n}" for n in range(8)), priority=priority)
        again = core.scheduler.eta("asks", core.now_s + 1.0)
        assert again is not None
        assert (again.p50_s > 1.3 * sent.p50_s) == may_jump
        assert (again.p50_s <= 1.21 * sent.p50_s) != may_jump


def test_only_the_first_eta_is_measured() -> None:
    core = busy_core()
    core.submit("now", "asks")
    first = core.scheduler.eta("asks", core.now_s)
    assert first is not None
    begun_s = core.now_s
    core.at(begun_s + 5.0)
    assert core.scheduler.eta("asks", core.now_s) != first
    core.finish("now")
    started = next(e for e in core.log if isinstance(e, ev.Started) and e.request_id == "asks")
    assert started.eta_error_s == pytest.approx(first.p50_s - 5.0)


def test_the_eta_of_a_preempted_request_is_not_measured() -> None:
    core = Core(can_preempt=True, max_concurrency=1, max_queue_size=5, slice_tokens=1)
    for n in range(40):
        core.submit(f"past{n}")
        core.at(core.now_s + 10.0)
        core.tokens(f"past{n}", 5)
        core.finish(f"past{n}")
    core.submit("long", "short")
    core.at(core.now_s + 1.0)
    core.tokens("long")
    core.preempt("long")
    assert core.running == ["short"]
    assert core.scheduler.eta("long", core.now_s) is not None
    before = core.scheduler.stats().eta.num_measured
    core.finish("short")
    assert core.running == ["long"]
    assert core.scheduler.stats().eta.num_measured == before


# --- slices and limits ----------------------------------------------------------------------------------------------


def test_a_request_that_is_being_preempted_counts_as_resident() -> None:
    """Two slots, at most three resident requests: a second preemption would lead to a fourth."""
    core = Core(can_preempt=True, max_concurrency=2, max_queue_size=5, slice_tokens=1, max_resident=3)
    core.submit("a", "b", "c", "d")
    core.at(1.0).tokens("a")
    core.tokens("b")
    assert core.asked_to_preempt() == ["a"]
    core.preempt("a")
    assert core.running == ["c", "b"]


def adaptive_core(**settings: object) -> Core:
    """Four requests run, four wait, and the limit is adaptive."""
    core = Core(
        can_preempt=True, adaptive="on", max_concurrency=4, max_queue_size=9, itl_target_s=0.1, stall_timeout_s=None,
        **settings,
    )  # fmt: skip
    core.submit(*(f"w{n}" for n in range(8)))
    return core


def test_a_falling_limit_preempts_only_the_latest_starts() -> None:
    core = adaptive_core()
    for _ in range(400):
        core.at(core.now_s + 1.0)
        for request_id in core.running:
            core.tokens(request_id)
        if core.asked_to_preempt():
            break
    limit = core.scheduler.stats().max_concurrency
    by_start = sorted(core.history.running, key=lambda request_id: core.history.running[request_id].seq)
    assert core.asked_to_preempt() == by_start[limit:]
    for request_id in core.asked_to_preempt():
        core.preempt(request_id)
    assert core.scheduler.stats().running == limit
    assert not core.asked_to_preempt()


def test_a_priority_preempts_lower_and_equal_priorities_but_no_higher_one() -> None:
    for running, waiting, takes_over in ((0, 1, True), (0, 0, True), (1, 0, False)):
        queue = PriorityQueue(ageing_s=60.0)
        queue.push(request(2, priority=waiting), held=False)
        successor = queue.successor(request(1, priority=running), may_start_new=True)
        assert (successor is not None) == takes_over


def test_an_unstarted_request_precedes_a_preempted_one_unless_that_has_a_higher_priority() -> None:
    for fresh, preempted, first in ((1, 0, 2), (0, 0, 2), (0, 1, 3)):
        queue = PriorityQueue(ageing_s=60.0)
        queue.push(request(2, priority=fresh), held=False)
        preempted = request(3, priority=preempted)
        preempted.state = State.PREEMPTED
        queue.push(preempted, held=False)
        successor = queue.successor(request(1), may_start_new=True)
        assert successor is not None
        assert successor.seq == first


def test_a_lower_priority_preempts_a_higher_one_only_if_it_is_older_by_more_than_the_ageing() -> None:
    queue = PriorityQueue(ageing_s=10.0)
    queue.push(request(0, priority=0), held=False)
    assert queue.successor(request(10, priority=1), may_start_new=True) is None, (
        "equal keys: the running request keeps its slot"
    )
    assert queue.successor(request(11, priority=1), may_start_new=True) is not None


# --- frozen views ---------------------------------------------------------------------------------------------------


def test_times_of_a_view_are_ages() -> None:
    core = Core(max_concurrency=1, max_queue_size=3)
    core.at(100.0).submit("a", "b", client="ann", priority=0)
    core.at(103.0).tokens("a", 7)
    core.at(108.0)
    a, b = core.scheduler.requests(108.0)
    assert (a.waited_s, a.running_s, a.last_progress_s_ago, a.generated_tokens) == (0.0, 8.0, 5.0, 7)
    assert (b.waited_s, b.running_s, b.last_progress_s_ago, b.generated_tokens) == (8.0, 0.0, 0.0, 0)
    assert (a.slot, b.slot, a.position, b.position) == (0, None, None, 1)
    core.finish("a")
    (b,) = core.scheduler.requests(110.0)
    assert (b.waited_s, b.running_s) == (8.0, 2.0)


def test_every_end_is_counted_once_by_its_kind() -> None:
    core = Core(max_concurrency=2, max_queue_size=2, max_wait_s=5.0)
    core.submit("a", "b", "c", "d")
    assert core.try_submit("e") == "queue_full"
    core.end(core.grants["a"], Outcome.FAILED, "engine_error")
    core.cancel("d")
    core.finish("b", "c")
    stats = core.scheduler.stats()
    counts = (stats.received, stats.rejected, stats.finished, stats.failed, stats.cancelled, stats.expired)
    assert counts == (5, 1, 2, 1, 1, 0)
    core.submit("f", "g", "h")
    core.at(20.0)
    assert core.scheduler.stats().expired == 1


def test_settings_do_not_change_at_run_time() -> None:
    settings = SchedulerSettings(max_concurrency=1)
    core = Core(settings)
    core.limits(max_concurrency=3, max_queue_size=9)
    assert settings == replace(settings)
    assert (settings.max_concurrency, core.scheduler.stats().max_concurrency) == (1, 3)


def test_the_view_of_a_preempted_request_has_no_slot() -> None:
    core = Core(can_preempt=True, max_concurrency=1, max_queue_size=3, slice_tokens=1)
    core.submit("a", priority=3)
    core.submit("b")
    core.at(1.0).tokens("a")
    core.preempt("a")
    b, a = core.scheduler.requests(1.0)
    assert (b.is_preempted, b.slot, b.priority) == (False, 0, 0)
    assert (a.is_preempted, a.slot, a.priority, a.position) == (True, None, 3, 1)


# --- the details of events and counts -------------------------------------------------------------------------------


@pytest.mark.parametrize("runs", [True, False])
def test_a_cancellation_keeps_its_origin_whatever_the_engine_reports(runs: bool) -> None:
    core = Core(max_concurrency=1, max_queue_size=3)
    core.submit("first", "second")
    request_id = "first" if runs else "second"
    core.cancel(request_id, by="ann")
    if runs:
        (asked,) = [e for e in core.log if isinstance(e, ev.AbortRequested)]
        assert (asked.request_id, asked.grant, asked.by) == ("first", core.grants["first"], "ann")
        core.finish("first")
    (end,) = core.ends(request_id)
    assert isinstance(end, ev.Cancelled)
    assert end.by == "ann"


def test_every_requeue_is_counted() -> None:
    core = Core(max_concurrency=1, max_queue_size=3, max_attempts=9)
    core.submit("a")
    for n in range(1, 4):
        assert core.requeue("a") is True
        assert core.scheduler.stats().requeued == n


def test_a_reclaimed_slot_is_reported_with_the_reason_and_counted() -> None:
    core = Core(max_concurrency=2, max_queue_size=3, stall_timeout_s=10.0, abort_timeout_s=3.0)
    core.submit("hangs", "deaf")
    core.at(5.0).cancel("deaf", by="ann")
    core.at(20.0)
    reclaimed = [(e.request_id, e.why) for e in core.log if isinstance(e, ev.SlotReclaimed)]
    assert reclaimed == [("deaf", "not released"), ("hangs", "no progress")]
    assert core.scheduler.stats().slots_reclaimed == 2
    (deaf,), (hangs,) = core.ends("deaf"), core.ends("hangs")
    assert isinstance(deaf, ev.Cancelled)
    assert deaf.by == "ann"
    assert isinstance(hangs, ev.Failed)
    assert hangs.code == "engine_error"


def test_all_leaving_requests_are_counted() -> None:
    core = Core(can_preempt=True, max_concurrency=2, max_queue_size=9, slice_tokens=1)
    core.submit("a", "b", "c", "d")
    core.at(1.0)
    for request_id in ("a", "b"):
        core.tokens(request_id)
        core.preempt(request_id)
    assert core.scheduler.stats().preempted == 2
    core.cancel("a")
    core.cancel("b")
    stats = core.scheduler.stats()
    assert (stats.preempted, stats.leaving, stats.waiting) == (0, 2, 0)
    for request_id in ("a", "b"):
        core.end(core.grants[request_id], Outcome.FINISHED, "stop")
    assert core.scheduler.stats().leaving == 0


def test_a_request_cancelled_during_its_preemption_is_not_resident_after_its_end() -> None:
    core = Core(can_preempt=True, max_concurrency=2, max_queue_size=9, slice_tokens=1, max_resident=3)
    core.submit("a", "b", "c", "d", "e")
    core.at(1.0).tokens("a")
    assert core.asked_to_preempt() == ["a"]
    core.cancel("a")
    core.finish("a")
    assert core.running == ["c", "b"]
    core.tokens("b")
    assert core.asked_to_preempt() == ["b"]
    core.tokens("c")
    assert core.asked_to_preempt() == ["b"], "at most three are resident: d may replace b, none may replace c"


def test_before_the_first_end_running_requests_count_as_half_way_through() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a")
    core.at(10.0).submit("b")
    assert core.scheduler.retry_after_s(20.0) == 15.0  # one of 2 * (20 + 10) / 2 s, on two slots
    core.submit("c")
    assert core.scheduler.retry_after_s(20.0) == 30.0


def test_retry_after_is_longer_while_paused_or_draining() -> None:
    for close in (Core.pause, Core.drain):
        core = Core(max_concurrency=2)
        assert core.scheduler.retry_after_s(0.0) == 1.0
        close(core)
        assert core.scheduler.retry_after_s(0.0) == 10.0


def test_after_a_lower_limit_the_new_eta_is_sent_at_once() -> None:
    """When an ETA of 5 s had become 30 s, the sent ETAs were once 5, 6, 7, 8… for a quarter of a minute."""
    core = busy_core()
    core.limits(max_concurrency=4)
    core.submit(*(f"r{n}" for n in range(4)), *(f"w{n}" for n in range(4)))
    sent = core.scheduler.eta("w3", core.now_s)
    core.limits(max_concurrency=1)
    again = core.scheduler.eta("w3", core.now_s)
    assert sent is not None
    assert again is not None
    assert again.p50_s > 2 * sent.p50_s


@pytest.mark.parametrize("policy", QUEUES)
def test_a_requeue_does_not_break_the_policy(policy: str) -> None:
    core = Core(max_concurrency=1, max_queue_size=5, policy=policy)
    core.submit("a", "b")
    assert core.requeue("a")
    core.finish("a")
    assert core.running == ["b"]
    assert core.scheduler.stats().policy == policy


def test_setting_the_policy_in_force_changes_nothing() -> None:
    """It once reset the service counts: a client that had used up its share was served first again."""
    orders = []
    for sets_policy in (False, True):
        core = Core(max_concurrency=1, max_queue_size=20, policy="fair")
        core.submit("a0", "a1", "a2", client="a")
        core.submit("b0", "b1", client="b")
        while core.running:
            [request_id] = core.running
            core.tokens(request_id, 1000 if request_id.startswith("a") else 10)
            if sets_policy:
                core.set_policy("fair")
            core.finish(request_id)
        assert not [e for e in core.log if isinstance(e, ev.PolicyChanged)]
        orders.append([e.request_id for e in core.log if isinstance(e, ev.Started)])
    assert orders[0] == orders[1] == ["a0", "b0", "b1", "a1", "a2"]


def test_a_preemption_at_the_end_of_a_slice_has_that_reason() -> None:
    core = Core(can_preempt=True, max_concurrency=1, max_queue_size=9, slice_tokens=1)
    core.at(10.0).submit("a", "b")
    core.at(10.9).tokens("a")
    assert core.asked_to_preempt() == [], "b has waited for less than a second"
    core.at(11.0).tokens("a")
    (asked,) = [e for e in core.log if isinstance(e, ev.PreemptRequested)]
    assert (asked.request_id, asked.why, asked.grant) == ("a", "slice", core.grants["a"])


def test_a_policy_with_its_own_slices_needs_no_setting_and_no_minimum_wait() -> None:
    core = Core(can_preempt=True, policy="fair-token", max_concurrency=1, max_queue_size=9)
    core.submit("a", client="ann")
    core.submit("b", client="bob")
    for n in range(200):
        if core.asked_to_preempt():
            break
        core.at(n * 0.001).tokens("a")
    assert core.asked_to_preempt() == ["a"]


def test_a_falling_limit_preempts_only_the_surplus_and_counts_pending_preemptions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def falls_to(limit: int) -> None:
        """Make the adaptive limit fall to `limit` at the next gap."""

        def observe(adaptive: AdaptiveLimit, *facts: object) -> Move:
            before = adaptive.value
            adaptive.set(limit)
            return Move(before, limit, "too slow")

        monkeypatch.setattr(AdaptiveLimit, "observe", observe)
        core.tokens("w0", 1)

    core = adaptive_core()
    core.tokens("w0")
    falls_to(3)
    assert core.asked_to_preempt() == ["w3"]
    falls_to(3)
    assert core.asked_to_preempt() == ["w3"]
    falls_to(2)
    assert core.asked_to_preempt() == ["w2", "w3"]
    asked = [e for e in core.log if isinstance(e, ev.PreemptRequested)]
    assert {event.why for event in asked} == {"limit"}
    changes = [e for e in core.log if isinstance(e, ev.LimitsChanged)]
    assert (changes[-1].max_concurrency, changes[-1].by, changes[-1].why) == (2, "adaptive", "too slow")


def test_an_eta_jumps_for_a_worse_position_only(monkeypatch: pytest.MonkeyPatch) -> None:
    def expect(p50_s: float, p90_s: float) -> None:
        monkeypatch.setattr(EtaEstimator, "at", lambda self, position, now_s: Eta(p50_s, p90_s))

    core = Core(max_concurrency=1, max_queue_size=9, policy="priority")
    core.submit("now", "asks")
    expect(10.0, 20.0)
    assert core.scheduler.eta("asks", 0.0) == Eta(10.0, 20.0)
    expect(50.0, 60.0)
    assert core.scheduler.eta("asks", 1.0) == Eta(12.0, 24.0)
    core.submit("urgent", priority=5)
    assert core.scheduler.eta("asks", 1.0) == Eta(50.0, 60.0)


def test_stats_report_the_phase_as_booleans() -> None:
    core = Core(is_open=False)
    for act, is_open, is_draining in ((None, False, False), (core.open, True, False), (core.drain, False, True)):
        if act is not None:
            act()
        stats = core.scheduler.stats()
        assert (stats.is_open, stats.is_draining) == (is_open, is_draining)
        assert all(isinstance(flag, bool) for flag in (stats.is_open, stats.is_draining, stats.is_paused))


def test_a_rejection_states_what_is_full() -> None:
    core = Core(max_concurrency=1, max_queue_size=2)
    core.submit("a", "b", "c")
    with pytest.raises(QueueFull, match=r"^the queue is full: 1 of 1 slots in use, 2 of 2 requests waiting$"):
        core.submit("d")


def test_a_rejection_of_a_held_request_does_not_blame_the_slots() -> None:
    core = Core(max_concurrency=2, max_queue_size=1)
    core.submit("a", "b", conversation="k")
    with pytest.raises(QueueFull, match=r"^the queue is full: 1 of 1 requests waiting$"):
        core.submit("c", conversation="k")


def test_opening_and_draining_are_reported_once() -> None:
    core = Core(is_open=False)
    for act in (core.open, core.open, core.drain, core.drain, core.open):
        act()
    assert [type(event) for event in core.log] == [ev.Opened, ev.DrainStarted, ev.Opened]


def test_an_automatic_bound_reports_its_change() -> None:
    core = Core(max_concurrency=1, max_queue_size="auto", ttft_slo_s=None)
    for n in range(8):
        core.submit(f"r{n}")
        core.at(core.now_s + 2.0)
        core.finish(f"r{n}")
    change = next(event for event in core.log if isinstance(event, ev.LimitsChanged))
    assert (change.max_concurrency, change.max_queue_size, change.by) == (1, 15, "auto")
    assert change.why == "a generation takes 2.0 s on average"


def test_under_fair_positions_are_distinct_for_any_backlog_of_one_client() -> None:
    queue = FairQueue()
    backlog = [request(seq, client="ann") for seq in range(60)]
    for one in backlog:
        queue.push(one, held=False)
    assert [queue.position(one) for one in backlog] == list(range(1, 61))
    arriving = request(60, client="bob")
    queue.push(arriving, held=False)
    positions = [queue.position(one) for one in (*backlog, arriving)]
    assert sorted(positions) == list(range(1, 62))
    assert positions[:-1] == sorted(positions[:-1])
    assert [one.seq for one in queue] == [seq for _, seq in sorted(zip(positions, range(61), strict=True))]


def test_a_start_reports_the_wait() -> None:
    core = Core(max_concurrency=1)
    core.at(5.0).submit("a", "b")
    core.at(12.0).finish("a")
    assert [e.waited_s for e in core.log if isinstance(e, ev.Started)] == [0.0, 7.0]


def test_obsolete_deadlines_are_removed() -> None:
    deadlines, fired = Deadlines(), list[float]()
    deadlines.add(1000.0, is_obsolete=lambda: False, fire=fired.append, num_live=1)
    for n in range(500):
        deadlines.add(100.0 + n, is_obsolete=lambda: True, fire=fired.append, num_live=1)
        assert len(deadlines) <= 4 * 1 + 64 + 1
    assert deadlines.next_s() == 1000.0
    due = deadlines.pop_due(1000.0)
    assert due is not None
    due.fire(1000.0)
    assert fired == [1000.0]


@pytest.mark.parametrize(("count", "is_too_slow"), [(1, True), (2, False)])
def test_tokens_that_arrive_together_share_the_gap(count: int, is_too_slow: bool) -> None:
    core = Core(max_concurrency=2, adaptive="on", itl_target_s=0.1)
    core.submit("a", "b")
    for n in range(450):
        for request_id in ("a", "b"):
            core.at(1.0 + 0.16 * n).tokens(request_id, count)
    assert (core.scheduler.stats().max_concurrency < 2) == is_too_slow
