"""Small promises that nothing else would notice if they were broken: each test names the promise it holds."""

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


# --- every change by an operator says who and why -------------------------------------------------------------------

CHANGES = {
    ev.LimitsChanged: lambda scheduler, **who: scheduler.set_limits(1.0, max_concurrency=3, **who),
    ev.PolicyChanged: lambda scheduler, **who: scheduler.set_policy("priority", 1.0, **who),
    ev.Paused: lambda scheduler, **who: scheduler.pause(1.0, **who),
    ev.Unpaused: lambda scheduler, **who: (scheduler.pause(1.0), scheduler.unpause(1.0, **who)),
    ev.DrainStarted: lambda scheduler, **who: scheduler.drain(1.0, **who),
}


@pytest.mark.parametrize("kind", CHANGES)
def test_a_change_says_who_and_why_and_when_nobody_said_so_nothing(kind: type) -> None:
    for who in ({"by": "ann", "why": "too slow"}, {}):
        scheduler = Scheduler()
        CHANGES[kind](scheduler, **who)
        (event,) = [event for event in scheduler.take_events() if type(event) is kind]
        assert (event.by, event.why) == (who.get("by", ""), who.get("why", ""))
        assert event.at_s == 1.0


def test_a_pause_and_its_end_are_told_once() -> None:
    core = Core()
    for _ in range(2):
        core.pause()
    assert core.scheduler.stats().is_paused is True
    for _ in range(2):
        core.unpause()
    assert core.scheduler.stats().is_paused is False
    assert [type(event) for event in core.log[1:]] == [ev.Paused, ev.Unpaused]


def test_those_who_have_not_begun_are_told_of_the_shutdown() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    core.drain()
    (end,) = core.ends("b")
    assert isinstance(end, ev.Cancelled)
    assert (end.by, end.total, end.at_s) == ("shutdown", 0, core.now_s)
    assert core.ends("a") == []


# --- turns ----------------------------------------------------------------------------------------------------------


def test_a_request_waits_for_an_earlier_one_of_its_conversation_beside_free_slots() -> None:
    core = Core(max_concurrency=4, max_queue_size=5)
    core.submit("first", "second", conversation="k")
    assert (core.running, core.waiting) == (["first"], ["second"])
    assert core.scheduler.waits_for("second") == "conversation"
    core.finish("first")
    assert core.running == ["second"]


def test_a_request_waits_for_another_one_of_its_client() -> None:
    core = Core(max_concurrency=2, max_queue_size=5, max_running_per_client=1)
    core.submit("a", "b", client="ann")
    core.submit("c", client="bob")
    core.submit("d", client="carl")
    reasons = {name: core.scheduler.waits_for(name) for name in ("a", "b", "c", "d", "unknown")}
    assert reasons == {"a": None, "b": "client_limit", "c": None, "d": "slot", "unknown": None}
    core.finish("a")
    assert core.running == ["b", "c"]


def test_before_the_opening_requests_wait_for_it_or_for_an_earlier_one() -> None:
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


def test_turns_know_their_members_and_strangers_have_none() -> None:
    turns = KeyLimit(1)
    first, second, stranger = request(1), request(2), request(3)
    assert turns.is_eligible("k", first) is False
    assert turns.add("k", first) is True
    assert turns.add("k", second) is False
    assert [turns.is_eligible("k", one) for one in (first, second, stranger)] == [True, False, False]
    assert turns.end("k", stranger) is None
    assert turns.end("k", first) is second
    assert turns.is_eligible("k", second) is True
    assert turns.end("k", second) is None
    assert len(turns) == 0


def test_conversations_and_clients_of_whom_something_is_kept_are_counted() -> None:
    turns = Eligibility(1)
    one = request(1, conversation="k", client="ann")
    other = request(2, client="bob")
    turns.add(one)
    turns.add(other)
    assert len(turns) == 3  # a conversation and two clients
    turns.end(one)
    turns.end(other)
    assert len(turns) == 0


def test_a_change_of_policy_still_knows_whose_turn_it_is() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a", conversation="k")
    core.submit("b", conversation="k")
    core.submit("c")
    core.submit("d")
    core.set_policy("priority")
    core.finish("c")
    assert core.running == ["a", "d"], "b waits for a"


# --- expected times as they are told --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.0, 0.0), (0.04, 0.0), (0.16, 0.2), (0.96, 1.0), (1.0, 1.0), (1.4, 1.0), (1.6, 2.0), (9.4, 9.0),
        (10.4, 10.0), (10.6, 11.0), (99.4, 99.0), (104.0, 100.0), (106.0, 110.0), (1234.0, 1200.0),
    ],
)  # fmt: skip
def test_times_are_told_as_exactly_as_they_are_known(seconds: float, told: float) -> None:
    assert rounded(seconds) == told


def test_an_expected_time_falls_at_once_and_rises_by_a_fifth_a_second() -> None:
    told = Eta(10.0, 20.0)
    assert smoothed(told, 0.0, Eta(2.0, 3.0), 1.0) == Eta(2.0, 3.0)
    assert smoothed(told, 0.0, Eta(50.0, 60.0), 1.0) == Eta(12.0, 24.0)
    assert smoothed(told, 0.0, Eta(50.0, 60.0), 2.0) == pytest.approx(Eta(14.4, 28.8)), "for each second since"
    assert smoothed(told, 0.0, Eta(50.0, 60.0), 9.0) == Eta(50.0, 60.0)
    assert smoothed(told, 0.0, Eta(50.0, 60.0), 0.0) == told
    assert smoothed(Eta(0.5, 0.5), 0.0, Eta(50.0, 60.0), 1.0) == Eta(1.2, 1.2), "from a second at least"
    assert smoothed(told, 0.0, Eta(50.0, 60.0), 1.0, may_jump=True) == Eta(50.0, 60.0)


def busy_core(**settings: object) -> Core:
    """One slot, with enough behind it that times can be told."""
    core = Core(max_concurrency=1, max_queue_size=20, **settings)
    for n in range(40):
        core.submit(f"past{n}")
        core.at(core.now_s + 1.0)
        core.tokens(f"past{n}", 10)
        core.at(core.now_s + 9.0)
        core.finish(f"past{n}")
    return core


def test_what_is_told_rises_slowly_unless_somebody_came_in_front() -> None:
    for priority, may_jump in ((0, False), (5, True)):
        core = busy_core(policy="priority")
        core.submit("now", "ahead", "asks")
        told = core.scheduler.eta("asks", core.now_s)
        assert told is not None
        core.submit(*(f"later{n}" for n in range(8)), priority=priority)
        again = core.scheduler.eta("asks", core.now_s + 1.0)
        assert again is not None
        assert (again.p50_s > 1.3 * told.p50_s) == may_jump
        assert (again.p50_s <= 1.21 * told.p50_s) != may_jump


def test_only_what_was_told_first_is_measured() -> None:
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


def test_who_has_begun_is_told_a_time_that_is_not_measured() -> None:
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


def test_an_engine_that_is_preempting_one_holds_it_already() -> None:
    """Two slots, three generations in the engine at most: the second to be preempted would make the fourth."""
    core = Core(can_preempt=True, max_concurrency=2, max_queue_size=5, slice_tokens=1, max_resident=3)
    core.submit("a", "b", "c", "d")
    core.at(1.0).tokens("a")
    core.tokens("b")
    assert core.asked_to_preempt() == ["a"]
    core.preempt("a")
    assert core.running == ["c", "b"]


def adaptive_core(**settings: object) -> Core:
    """Four run, and the gaps between their tokens are ten times too long."""
    core = Core(
        can_preempt=True, adaptive="on", max_concurrency=4, max_queue_size=9, itl_target_s=0.1, stall_timeout_s=None,
        **settings,
    )  # fmt: skip
    core.submit(*(f"w{n}" for n in range(8)))
    return core


def test_when_the_limit_falls_those_who_began_last_go_back_and_no_others() -> None:
    core = adaptive_core()
    for _ in range(400):
        core.at(core.now_s + 1.0)
        for request_id in core.running:
            core.tokens(request_id)
        if core.asked_to_preempt():
            break
    limit = core.scheduler.stats().max_concurrency
    begun = sorted(core.history.running, key=lambda request_id: core.history.running[request_id].seq)
    assert core.asked_to_preempt() == begun[limit:]
    for request_id in core.asked_to_preempt():
        core.preempt(request_id)
    assert core.scheduler.stats().running == limit
    assert not core.asked_to_preempt()


def test_a_class_takes_over_from_a_lower_one_and_from_its_own_but_not_from_a_higher_one() -> None:
    for running, waiting, takes_over in ((0, 1, True), (0, 0, True), (1, 0, False)):
        queue = PriorityQueue(ageing_s=60.0)
        queue.push(request(2, priority=waiting), held=False)
        successor = queue.successor(request(1, priority=running), may_start_new=True)
        assert (successor is not None) == takes_over


def test_who_has_not_begun_goes_before_who_was_preempted_unless_that_one_is_of_a_higher_class() -> None:
    for fresh, preempted, first in ((1, 0, 2), (0, 0, 2), (0, 1, 3)):
        queue = PriorityQueue(ageing_s=60.0)
        queue.push(request(2, priority=fresh), held=False)
        preempted = request(3, priority=preempted)
        preempted.state = State.PREEMPTED
        queue.push(preempted, held=False)
        successor = queue.successor(request(1), may_start_new=True)
        assert successor is not None
        assert successor.seq == first


def test_only_who_is_older_by_more_than_the_classes_are_worth_passes_a_higher_one() -> None:
    queue = PriorityQueue(ageing_s=10.0)
    queue.push(request(0, priority=0), held=False)
    assert queue.successor(request(10, priority=1), may_start_new=True) is None, "equal keys: it keeps the slot"
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


def test_the_end_of_everybody_is_counted_once_by_its_kind() -> None:
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


def test_settings_are_not_changed_by_what_happens() -> None:
    settings = SchedulerSettings(max_concurrency=1)
    core = Core(settings)
    core.limits(max_concurrency=3, max_queue_size=9)
    assert settings == replace(settings)
    assert (settings.max_concurrency, core.scheduler.stats().max_concurrency) == (1, 3)


def test_a_preempted_one_is_shown_as_such_and_without_a_slot() -> None:
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
def test_who_cancelled_is_told_whatever_the_engine_says(runs: bool) -> None:
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


def test_every_return_to_the_line_is_counted() -> None:
    core = Core(max_concurrency=1, max_queue_size=3, max_attempts=9)
    core.submit("a")
    for n in range(1, 4):
        assert core.requeue("a") is True
        assert core.scheduler.stats().requeued == n


def test_a_slot_that_is_taken_away_is_told_with_the_reason_and_counted() -> None:
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


def test_all_who_leave_while_they_are_preempted_are_counted() -> None:
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


def test_who_is_cancelled_while_it_is_being_preempted_takes_no_room_in_the_engine() -> None:
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
    assert core.asked_to_preempt() == ["b"], "three at most: for d beside b, but for nobody beside c"


def test_nobody_has_ended_yet_so_those_who_run_are_taken_to_be_half_way_through() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a")
    core.at(10.0).submit("b")
    assert core.scheduler.retry_after_s(20.0) == 15.0  # one of 2 * (20 + 10) / 2 s, on two slots
    core.submit("c")
    assert core.scheduler.retry_after_s(20.0) == 30.0


def test_whoever_comes_while_nobody_is_taken_is_not_told_to_come_back_at_once() -> None:
    for close in (Core.pause, Core.drain):
        core = Core(max_concurrency=2)
        assert core.scheduler.retry_after_s(0.0) == 1.0
        close(core)
        assert core.scheduler.retry_after_s(0.0) == 10.0


def test_when_slots_are_taken_away_the_new_time_is_told_at_once() -> None:
    """Told 5 s, somebody whose wait had become 30 s heard 5, 6, 7, 8… for a quarter of a minute."""
    core = busy_core()
    core.limits(max_concurrency=4)
    core.submit(*(f"r{n}" for n in range(4)), *(f"w{n}" for n in range(4)))
    told = core.scheduler.eta("w3", core.now_s)
    core.limits(max_concurrency=1)
    again = core.scheduler.eta("w3", core.now_s)
    assert told is not None
    assert again is not None
    assert again.p50_s > 2 * told.p50_s


@pytest.mark.parametrize("policy", QUEUES)
def test_an_engine_that_is_lost_does_not_cost_the_line_its_policy(policy: str) -> None:
    core = Core(max_concurrency=1, max_queue_size=5, policy=policy)
    core.submit("a", "b")
    assert core.requeue("a")
    core.finish("a")
    assert core.running == ["b"]
    assert core.scheduler.stats().policy == policy


def test_naming_the_policy_that_is_in_force_changes_nothing() -> None:
    """It made everybody a newcomer: who had used up its share was served before the others again."""
    orders = []
    for names_it in (False, True):
        core = Core(max_concurrency=1, max_queue_size=20, policy="fair")
        core.submit("a0", "a1", "a2", client="a")
        core.submit("b0", "b1", client="b")
        while core.running:
            [request_id] = core.running
            core.tokens(request_id, 1000 if request_id.startswith("a") else 10)
            if names_it:
                core.set_policy("fair")
            core.finish(request_id)
        assert not [e for e in core.log if isinstance(e, ev.PolicyChanged)]
        orders.append([e.request_id for e in core.log if isinstance(e, ev.Started)])
    assert orders[0] == orders[1] == ["a0", "b0", "b1", "a1", "a2"]


def test_a_slice_and_a_limit_are_told_apart() -> None:
    core = Core(can_preempt=True, max_concurrency=1, max_queue_size=9, slice_tokens=1)
    core.at(10.0).submit("a", "b")
    core.at(10.9).tokens("a")
    assert core.asked_to_preempt() == [], "b has waited for less than a second"
    core.at(11.0).tokens("a")
    (asked,) = [e for e in core.log if isinstance(e, ev.PreemptRequested)]
    assert (asked.request_id, asked.why, asked.grant) == ("a", "slice", core.grants["a"])


def test_a_policy_with_slices_of_its_own_needs_no_setting_and_nobody_to_have_waited() -> None:
    core = Core(can_preempt=True, policy="fair-token", max_concurrency=1, max_queue_size=9)
    core.submit("a", client="ann")
    core.submit("b", client="bob")
    for n in range(200):
        if core.asked_to_preempt():
            break
        core.at(n * 0.001).tokens("a")
    assert core.asked_to_preempt() == ["a"]


def test_only_as_many_go_back_as_are_too_many_and_those_on_their_way_count(monkeypatch: pytest.MonkeyPatch) -> None:
    def falls_to(limit: int) -> None:
        """Adaptive concurrency decides so at the next gap."""

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


def test_the_same_place_is_no_news_and_a_place_further_back_is(monkeypatch: pytest.MonkeyPatch) -> None:
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


def test_how_it_stands_is_told_in_plain_truth_values() -> None:
    core = Core(is_open=False)
    for act, is_open, is_draining in ((None, False, False), (core.open, True, False), (core.drain, False, True)):
        if act is not None:
            act()
        stats = core.scheduler.stats()
        assert (stats.is_open, stats.is_draining) == (is_open, is_draining)
        assert all(isinstance(flag, bool) for flag in (stats.is_open, stats.is_draining, stats.is_paused))


def test_who_is_refused_is_told_what_is_full() -> None:
    core = Core(max_concurrency=1, max_queue_size=2)
    core.submit("a", "b", "c")
    with pytest.raises(QueueFull, match=r"^the queue is full: 1 of 1 slots in use, 2 of 2 requests waiting$"):
        core.submit("d")


def test_who_would_be_held_beside_a_free_slot_is_not_told_that_all_are_taken() -> None:
    core = Core(max_concurrency=2, max_queue_size=1)
    core.submit("a", "b", conversation="k")
    with pytest.raises(QueueFull, match=r"^the queue is full: 1 of 1 requests waiting$"):
        core.submit("c", conversation="k")


def test_what_is_so_already_is_not_told_again() -> None:
    core = Core(is_open=False)
    for act in (core.open, core.open, core.drain, core.drain, core.open):
        act()
    assert [type(event) for event in core.log] == [ev.Opened, ev.DrainStarted, ev.Opened]


def test_a_bound_that_follows_the_service_says_so() -> None:
    core = Core(max_concurrency=1, max_queue_size="auto", ttft_slo_s=None)
    for n in range(8):
        core.submit(f"r{n}")
        core.at(core.now_s + 2.0)
        core.finish(f"r{n}")
    change = next(event for event in core.log if isinstance(event, ev.LimitsChanged))
    assert (change.max_concurrency, change.max_queue_size, change.by) == (1, 15, "auto")
    assert change.why == "a generation takes 2.0 s on average"


def test_under_fair_everybody_has_a_place_of_its_own_however_long_the_backlog_of_one_client() -> None:
    queue = FairQueue()
    backlog = [request(seq, client="ann") for seq in range(60)]
    for one in backlog:
        queue.push(one, held=False)
    assert [queue.position(one) for one in backlog] == list(range(1, 61))
    newcomer = request(60, client="bob")
    queue.push(newcomer, held=False)
    places = [queue.position(one) for one in (*backlog, newcomer)]
    assert sorted(places) == list(range(1, 62))
    assert places[:-1] == sorted(places[:-1])
    assert [one.seq for one in queue] == [seq for _, seq in sorted(zip(places, range(61), strict=True))]


def test_a_start_says_how_long_it_was_waited_for() -> None:
    core = Core(max_concurrency=1)
    core.at(5.0).submit("a", "b")
    core.at(12.0).finish("a")
    assert [e.waited_s for e in core.log if isinstance(e, ev.Started)] == [0.0, 7.0]


def test_deadlines_that_have_become_pointless_are_swept() -> None:
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
def test_of_two_tokens_that_come_together_each_has_half_of_the_gap(count: int, is_too_slow: bool) -> None:
    core = Core(max_concurrency=2, adaptive="on", itl_target_s=0.1)
    core.submit("a", "b")
    for n in range(450):
        for request_id in ("a", "b"):
            core.at(1.0 + 0.16 * n).tokens(request_id, count)
    assert (core.scheduler.stats().max_concurrency < 2) == is_too_slow
