"""Time slices: a long generation makes room, keeps its place and its state, and goes on."""

from __future__ import annotations

import pytest

from chatstream.errors import ConfigError
from chatstream.scheduler import Outcome
from chatstream.scheduler import events as ev
from chatstream.scheduler.limits.adaptive import AdaptiveLimit, Move
from tests.scheduler.builders import Core


def sliced(**changes: object) -> Core:
    settings: dict[str, object] = {"max_concurrency": 1, "max_queue_size": 10, "slice_tokens": 10}
    return Core(can_preempt=True, **settings | changes)


def slice_of(core: Core, request_id: str) -> None:
    """It generates until it is asked to make room, and its engine preempts it at once."""
    for _ in range(10):
        core.tokens(request_id)
    assert core.asked_to_preempt() == [request_id]
    core.preempt(request_id)


def making_room(**changes: object) -> Core:
    """`long` has had its slice, and is asked to make room for `short`, who has waited for 5 seconds."""
    core = sliced(**changes)
    core.submit("long", "short")
    core.at(5.0).tokens("long", 10)
    assert core.asked_to_preempt() == ["long"]
    return core


def test_after_its_slice_a_generation_makes_room_for_somebody_who_has_waited() -> None:
    core = sliced()
    core.submit("long", "short")
    core.at(5.0)
    for n in range(10):
        assert core.asked_to_preempt() == [], f"{n} tokens are not a slice"
        core.tokens("long")
    assert core.asked_to_preempt() == ["long"]
    assert core.running == ["long"], "it holds its slot until the engine has preempted it"
    core.preempt("long")
    assert core.running == ["short"]
    assert core.position("long") == 1
    assert core.scheduler.stats().preempted == 1
    core.at(6.0).finish("short")
    assert core.running == ["long"]
    [resumed] = [e for e in core.log if isinstance(e, ev.Resumed)]
    assert (resumed.request_id, resumed.preempted_s) == ("long", 1.0)
    assert resumed.grant.attempt == 1, "going on is not another attempt"
    assert core.scheduler.stats().preempted == 0


def test_it_keeps_its_slot_while_nobody_waits_or_nobody_waited_long_enough() -> None:
    core = sliced()
    core.submit("long")
    core.tokens("long", 50)
    core.submit("newcomer")
    core.tokens("long", 50)
    assert core.asked_to_preempt() == []
    core.at(1.0).tokens("long")
    assert core.asked_to_preempt() == ["long"]


def test_an_engine_that_cannot_preempt_is_never_asked_to() -> None:
    core = Core(max_concurrency=1, max_queue_size=10, slice_tokens=10)
    core.submit("long", "short")
    core.at(5.0).tokens("long", 100)
    assert core.asked_to_preempt() == []


def test_who_was_preempted_goes_on_before_anybody_who_came_later() -> None:
    core = sliced()
    core.submit("long", "second", "third")
    core.at(5.0)
    slice_of(core, "long")
    assert core.running == ["second"]
    core.finish("second")
    assert core.running == ["long"]


def test_slices_go_first_to_those_who_have_not_begun_then_to_the_preempted_ones() -> None:
    core = sliced(max_resident=3)
    core.submit("a", "b", "c", "d")
    core.at(5.0)
    slice_of(core, "a")
    slice_of(core, "b")
    assert core.running == ["c"]
    core.at(10.0)
    slice_of(core, "c")
    assert core.running == ["a"], "three have begun: the engine holds no fourth"
    assert core.waiting == ["b", "c", "d"]


def test_a_free_slot_goes_to_a_preempted_one_when_the_engine_holds_as_many_as_it_may() -> None:
    core = sliced(policy="priority", max_resident=2)
    core.submit("a", "b")
    core.at(5.0)
    slice_of(core, "a")
    core.submit("urgent", priority=5)
    core.limits(max_concurrency=2)
    assert core.running == ["b", "a"], "two have begun, and no third may"


def test_a_limit_above_what_the_engine_may_hold_is_refused() -> None:
    core = sliced(max_resident=2)
    with pytest.raises(ConfigError, match="max_resident"):
        core.limits(max_concurrency=3)
    assert core.scheduler.stats().max_concurrency == 1


def test_where_a_falling_limit_sends_some_back_places_are_estimates() -> None:
    assert sliced().scheduler.is_exact
    assert not sliced(max_concurrency=4, adaptive="on").scheduler.is_exact
    assert Core(max_concurrency=4, adaptive="on").scheduler.is_exact, "an engine that cannot preempt sends nobody back"


def test_positions_never_grow_when_slots_change_hands() -> None:
    core = sliced(max_resident=4)
    names = ["a", "b", "c", "d", "e", "f"]
    core.submit(*names)
    places = {name: core.position(name) or 0 for name in names[1:]}
    for step in range(12):
        core.at(5.0 * (step + 1))
        slice_of(core, core.running[0])
        for name in places:
            place = core.position(name)
            if place is not None and name not in core.grants:
                assert place <= places[name]
                places[name] = place


def test_the_line_is_as_full_as_before_so_that_the_limits_stay_exact() -> None:
    core = sliced(max_queue_size=2)
    core.submit("a", "b", "c")
    core.at(5.0)
    slice_of(core, "a")
    assert core.try_submit("d") == "queue_full"
    assert core.scheduler.stats().waiting == 2


def test_who_was_preempted_does_not_expire() -> None:
    core = making_room(max_wait_s=8.0)
    core.preempt("long")
    core.at(100.0)
    assert core.waiting == ["long"]


def test_a_slice_that_finds_nobody_any_more_goes_on_at_once() -> None:
    core = making_room()
    core.cancel("short")
    core.preempt("long")
    assert core.running == ["long"]


def test_the_answer_may_end_while_its_engine_was_asked_to_preempt_it() -> None:
    core = making_room()
    core.finish("long")
    assert core.running == ["short"]
    core.preempt("long")  # a late report
    assert core.running == ["short"]
    assert core.scheduler.stats().stale_reports == 1
    assert core.scheduler.stats().preempting == 0


@pytest.mark.parametrize("when", ["asked to preempt", "preempted"])
def test_a_cancelled_one_holds_nothing_once_its_engine_has_let_go(when: str) -> None:
    core = making_room()
    if when == "preempted":
        core.preempt("long")
    assert core.cancel("long")
    assert core.cancel("long"), "twice is harmless"
    if when == "preempted":
        assert (core.running, core.waiting) == (["short"], [])
        assert core.scheduler.stats().leaving == 1
    else:
        assert (core.running, core.waiting) == (["long"], ["short"])
    core.end(core.grants["long"], Outcome.FAILED, "whatever the engine says")
    assert [type(e) for e in core.ends("long")] == [ev.Cancelled]
    assert core.running == ["short"]
    stats = core.scheduler.stats()
    assert (stats.leaving, stats.preempted) == (0, 0)
    core.finish("short")
    core.history.check_complete()


@pytest.mark.parametrize("when", ["asked to preempt", "preempted and cancelled"])
def test_an_engine_that_does_not_answer_loses_the_request(when: str) -> None:
    core = making_room(abort_timeout_s=30.0)
    if when == "preempted and cancelled":
        core.preempt("long")
        core.cancel("long")
    core.at(40.0)
    [end] = core.ends("long")
    assert type(end) is (ev.Failed if when == "asked to preempt" else ev.Cancelled)
    assert core.scheduler.stats().slots_reclaimed == (1 if when == "asked to preempt" else 0)
    assert core.running == ["short"]
    assert core.scheduler.stats().leaving == 0


def test_an_engine_that_fails_while_it_holds_a_preempted_one_ends_that_request_only() -> None:
    core = making_room()
    core.preempt("long")
    core.end(core.grants["long"], Outcome.FAILED, "engine_error")
    assert (core.running, core.waiting) == (["short"], [])
    assert [type(e) for e in core.ends("long")] == [ev.Failed]
    assert core.scheduler.stats().preempted == 0


def test_what_was_generated_before_the_preempting_still_counts_and_may_be_the_end() -> None:
    core = making_room()
    core.preempt("long")
    core.tokens("long", 2)
    assert core.history.tokens["long"] == 12
    assert core.asked_to_preempt() == []
    core.finish("long")
    assert (core.running, core.waiting) == (["short"], [])
    assert [type(e) for e in core.ends("long")] == [ev.Finished]


def test_a_preempted_one_is_never_started_again_from_its_beginning() -> None:
    core = making_room()
    core.preempt("long")
    assert not core.requeue("long")


def test_a_drain_lets_those_who_have_begun_go_on() -> None:
    core = sliced()
    core.submit("long", "short", "third")
    core.at(5.0)
    slice_of(core, "long")
    core.drain()
    assert (core.running, core.waiting) == (["short"], ["long"])
    core.finish("short")
    assert core.running == ["long"]
    core.finish("long")
    core.history.check_complete()


def test_a_stalled_slice_is_reclaimed_and_a_preempted_one_is_not_taken_for_stalled() -> None:
    core = making_room(stall_timeout_s=20.0)
    core.preempt("long")
    core.at(24.0)
    assert core.waiting == ["long"]
    core.at(25.0)
    assert [type(e) for e in core.ends("short")] == [ev.Failed]
    assert core.running == ["long"]
    core.at(44.0)
    assert core.running == ["long"], "its time without a slot does not count"
    core.at(45.0)
    assert [type(e) for e in core.ends("long")] == [ev.Failed]


def test_service_is_the_time_with_a_slot() -> None:
    core = making_room(max_queue_size="auto", max_wait_s=1000.0)
    core.preempt("long")  # held 5 s
    core.at(20.0).finish("short")
    core.at(30.0).finish("long")  # and 10 s more
    changes = [e for e in core.log if isinstance(e, ev.LimitsChanged)]
    assert [(e.max_queue_size, e.why) for e in changes] == [(67, "a generation takes 15.0 s on average")]


# --- adaptive concurrency -------------------------------------------------------------------------------------------


def slow_down(core: Core, gap_s: float, seconds: float) -> None:
    """Everybody who runs gets a token every `gap_s`."""
    until_s = core.now_s + seconds
    while core.now_s < until_s:
        core.at(core.now_s + gap_s)
        for request_id in list(core.running):
            core.tokens(request_id)
        for request_id in core.asked_to_preempt():
            core.preempt(request_id)


def test_the_limit_follows_the_gaps_between_tokens_and_says_why() -> None:
    core = Core(max_concurrency=8, max_queue_size=20, adaptive="on", itl_target_s=0.05, can_preempt=True)
    core.submit(*(f"r{n}" for n in range(10)))
    slow_down(core, 0.2, seconds=20.0)
    stats = core.scheduler.stats()
    assert stats.max_concurrency < 8
    assert stats.running == stats.max_concurrency, "those who started last were preempted"
    changes = [e for e in core.log if isinstance(e, ev.LimitsChanged)]
    assert all(e.by == "adaptive" and "ms" in e.why for e in changes)
    assert [e.why for e in core.log if isinstance(e, ev.PreemptRequested)] == ["limit"] * (8 - stats.running)
    assert sorted(core.waiting[: 8 - stats.running]) == [f"r{n}" for n in range(stats.running, 8)]


def test_tokens_that_move_the_limit_come_before_anything_that_is_due_then(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stall that was due in the same call ended the request, which went on to report tokens."""
    core = Core(adaptive="on", max_concurrency=2, max_queue_size=1, stall_timeout_s=5.0)
    core.submit("a")
    core.tokens("a")
    monkeypatch.setattr(AdaptiveLimit, "observe", lambda self, *gap: Move(2, 1, "slow"))
    core.now_s = 5.5  # the timer of 5.0 is late, and the token comes first
    core.tokens("a")
    assert core.running == ["a"]
    assert core.history.tokens["a"] == 2


def test_without_preempting_those_above_the_new_limit_end_by_themselves() -> None:
    core = Core(max_concurrency=8, max_queue_size=20, adaptive="on", itl_target_s=0.05)
    core.submit(*(f"r{n}" for n in range(8)))
    slow_down(core, 0.2, seconds=20.0)
    stats = core.scheduler.stats()
    assert stats.max_concurrency < stats.running == 8


@pytest.mark.parametrize("max_concurrency", [1, 3, 100])
def test_without_adaptive_concurrency_the_limit_is_what_the_operator_chose(max_concurrency: int) -> None:
    core = Core(max_concurrency=8, max_queue_size=20, min_concurrency=2, itl_target_s=0.05, can_preempt=True)
    core.limits(max_concurrency=max_concurrency)
    core.submit(*(f"r{n}" for n in range(4)))
    slow_down(core, 0.2, seconds=20.0)
    assert core.scheduler.stats().max_concurrency == max_concurrency


def test_an_automatic_limit_begins_small_and_grows_while_requests_wait() -> None:
    core = Core(max_concurrency="auto", max_queue_size=200, itl_target_s=0.1)
    assert core.scheduler.stats().max_concurrency == 4
    core.submit(*(f"r{n}" for n in range(100)))
    slow_down(core, 0.02, seconds=60.0)
    assert core.scheduler.stats().max_concurrency > 4


def test_the_engines_own_limit_is_never_exceeded() -> None:
    core = Core(max_concurrency=5, max_queue_size=20, is_open=False)
    core.open(engine_limit=3)
    core.submit(*(f"r{n}" for n in range(10)))
    assert len(core.running) == 3
    assert core.scheduler.stats().max_concurrency == 3
    core.limits(max_concurrency=2)
    assert core.scheduler.stats().max_concurrency == 2
