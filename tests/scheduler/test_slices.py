"""Time slices: a long generation is preempted, keeps its rank and its state, and resumes."""

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


def use_up_slice(core: Core, request_id: str) -> None:
    """Generate until the slice of the request is used up, and let the engine preempt it at once."""
    for _ in range(10):
        core.tokens(request_id)
    assert core.asked_to_preempt() == [request_id]
    core.preempt(request_id)


def core_with_pending_preemption(**changes: object) -> Core:
    """`long` has used up its slice and must be preempted for `short`, which has waited for 5 seconds."""
    core = sliced(**changes)
    core.submit("long", "short")
    core.at(5.0).tokens("long", 10)
    assert core.asked_to_preempt() == ["long"]
    return core


def test_after_its_slice_a_generation_is_preempted_for_a_waiting_request() -> None:
    core = sliced()
    core.submit("long", "short")
    core.at(5.0)
    for n in range(10):
        assert core.asked_to_preempt() == [], f"{n} tokens are not a slice"
        core.tokens("long")
    assert core.asked_to_preempt() == ["long"]
    assert core.running == ["long"], "it keeps its slot until the engine has preempted it"
    core.preempt("long")
    assert core.running == ["short"]
    assert core.position("long") == 1
    assert core.scheduler.stats().preempted == 1
    core.at(6.0).finish("short")
    assert core.running == ["long"]
    [resumed] = [e for e in core.log if isinstance(e, ev.Resumed)]
    assert (resumed.request_id, resumed.preempted_s) == ("long", 1.0)
    assert resumed.grant.attempt == 1, "a resumption is not another attempt"
    assert core.scheduler.stats().preempted == 0


def test_a_generation_keeps_its_slot_until_another_request_has_waited_long_enough() -> None:
    core = sliced()
    core.submit("long")
    core.tokens("long", 50)
    core.submit("new")
    core.tokens("long", 50)
    assert core.asked_to_preempt() == []
    core.at(1.0).tokens("long")
    assert core.asked_to_preempt() == ["long"]


def test_an_engine_that_cannot_preempt_is_never_asked_to() -> None:
    core = Core(max_concurrency=1, max_queue_size=10, slice_tokens=10)
    core.submit("long", "short")
    core.at(5.0).tokens("long", 100)
    assert core.asked_to_preempt() == []


def test_a_preempted_request_resumes_before_later_arrivals() -> None:
    core = sliced()
    core.submit("long", "second", "third")
    core.at(5.0)
    use_up_slice(core, "long")
    assert core.running == ["second"]
    core.finish("second")
    assert core.running == ["long"]


def test_slices_go_to_unstarted_requests_first_then_to_preempted_ones() -> None:
    core = sliced(max_resident=3)
    core.submit("a", "b", "c", "d")
    core.at(5.0)
    use_up_slice(core, "a")
    use_up_slice(core, "b")
    assert core.running == ["c"]
    core.at(10.0)
    use_up_slice(core, "c")
    assert core.running == ["a"], "three have started: a fourth would exceed max_resident"
    assert core.waiting == ["b", "c", "d"]


def test_at_max_resident_a_free_slot_goes_to_a_preempted_request() -> None:
    core = sliced(policy="priority", max_resident=2)
    core.submit("a", "b")
    core.at(5.0)
    use_up_slice(core, "a")
    core.submit("urgent", priority=5)
    core.limits(max_concurrency=2)
    assert core.running == ["b", "a"], "two have started: a third would exceed max_resident"


def test_at_max_resident_a_new_request_takes_a_free_slot_if_the_preempted_one_is_leaving() -> None:
    core = sliced(policy="priority", max_resident=2)
    core.submit("a", "b")
    core.at(5.0)
    use_up_slice(core, "a")
    core.submit("new", priority=5)
    core.cancel("a")
    core.limits(max_concurrency=2)
    assert core.scheduler.stats().leaving == 1
    assert core.running == ["b", "new"], "no slot stays free while a request may start"


def test_a_limit_above_max_resident_is_refused() -> None:
    core = sliced(max_resident=2)
    with pytest.raises(ConfigError, match="max_resident"):
        core.limits(max_concurrency=3)
    assert core.scheduler.stats().max_concurrency == 1


def test_positions_are_estimates_where_a_falling_limit_preempts() -> None:
    assert sliced().scheduler.is_exact
    assert not sliced(max_concurrency=4, adaptive="on").scheduler.is_exact
    assert Core(max_concurrency=4, adaptive="on").scheduler.is_exact, (
        "an engine that cannot preempt never sends a request back"
    )


def test_positions_never_grow_when_slots_change_hands() -> None:
    core = sliced(max_resident=4)
    names = ["a", "b", "c", "d", "e", "f"]
    core.submit(*names)
    positions = {name: core.position(name) or 0 for name in names[1:]}
    for step in range(12):
        core.at(5.0 * (step + 1))
        use_up_slice(core, core.running[0])
        for name in positions:
            position = core.position(name)
            if position is not None and name not in core.grants:
                assert position <= positions[name]
                positions[name] = position


def test_a_preempted_request_counts_against_the_queue_size() -> None:
    core = sliced(max_queue_size=2)
    core.submit("a", "b", "c")
    core.at(5.0)
    use_up_slice(core, "a")
    assert core.try_submit("d") == "queue_full"
    assert core.scheduler.stats().waiting == 2


def test_a_preempted_request_does_not_expire() -> None:
    core = core_with_pending_preemption(max_wait_s=8.0)
    core.preempt("long")
    core.at(100.0)
    assert core.waiting == ["long"]


def test_a_preempted_request_resumes_at_once_when_its_successor_is_gone() -> None:
    core = core_with_pending_preemption()
    core.cancel("short")
    core.preempt("long")
    assert core.running == ["long"]


def test_a_generation_may_end_before_the_engine_preempts_it() -> None:
    core = core_with_pending_preemption()
    core.finish("long")
    assert core.running == ["short"]
    core.preempt("long")  # a late report
    assert core.running == ["short"]
    assert core.scheduler.stats().stale_reports == 1
    assert core.scheduler.stats().preempting == 0


@pytest.mark.parametrize("when", ["asked to preempt", "preempted"])
def test_a_cancelled_request_keeps_nothing_once_the_engine_has_released_it(when: str) -> None:
    core = core_with_pending_preemption()
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
def test_an_engine_that_does_not_respond_loses_the_request(when: str) -> None:
    core = core_with_pending_preemption(abort_timeout_s=30.0)
    if when == "preempted and cancelled":
        core.preempt("long")
        core.cancel("long")
    core.at(40.0)
    [end] = core.ends("long")
    assert type(end) is (ev.Failed if when == "asked to preempt" else ev.Cancelled)
    assert core.scheduler.stats().slots_reclaimed == (1 if when == "asked to preempt" else 0)
    assert core.running == ["short"]
    assert core.scheduler.stats().leaving == 0


def test_an_engine_failure_ends_only_the_preempted_request_that_it_reports() -> None:
    core = core_with_pending_preemption()
    core.preempt("long")
    core.end(core.grants["long"], Outcome.FAILED, "engine_error")
    assert (core.running, core.waiting) == (["short"], [])
    assert [type(e) for e in core.ends("long")] == [ev.Failed]
    assert core.scheduler.stats().preempted == 0


def test_tokens_that_arrive_after_a_preemption_count_and_may_end_the_request() -> None:
    core = core_with_pending_preemption()
    core.preempt("long")
    core.tokens("long", 2)
    assert core.history.tokens["long"] == 12
    assert core.asked_to_preempt() == []
    core.finish("long")
    assert (core.running, core.waiting) == (["short"], [])
    assert [type(e) for e in core.ends("long")] == [ev.Finished]


def test_a_preempted_request_is_never_requeued() -> None:
    core = core_with_pending_preemption()
    core.preempt("long")
    assert not core.requeue("long")


def test_a_drain_lets_started_requests_continue() -> None:
    core = sliced()
    core.submit("long", "short", "third")
    core.at(5.0)
    use_up_slice(core, "long")
    core.drain()
    assert (core.running, core.waiting) == (["short"], ["long"])
    core.finish("short")
    assert core.running == ["long"]
    core.finish("long")
    core.history.check_complete()


def test_a_stalled_generation_is_reclaimed_but_a_preempted_one_is_not_stalled() -> None:
    core = core_with_pending_preemption(stall_timeout_s=20.0)
    core.preempt("long")
    core.at(24.0)
    assert core.waiting == ["long"]
    core.at(25.0)
    assert [type(e) for e in core.ends("short")] == [ev.Failed]
    assert core.running == ["long"]
    core.at(44.0)
    assert core.running == ["long"], "the time without a slot does not count"
    core.at(45.0)
    assert [type(e) for e in core.ends("long")] == [ev.Failed]


def test_service_time_is_the_time_with_a_slot() -> None:
    core = core_with_pending_preemption(max_queue_size="auto", max_wait_s=1000.0)
    core.preempt("long")  # after 5 s in a slot
    core.at(20.0).finish("short")
    core.at(30.0).finish("long")  # after 10 s more
    changes = [e for e in core.log if isinstance(e, ev.LimitsChanged)]
    assert [(e.max_queue_size, e.why) for e in changes] == [(67, "a generation takes 15.0 s on average")]


# --- adaptive concurrency -------------------------------------------------------------------------------------------


def slow_down(core: Core, gap_s: float, seconds: float) -> None:
    """Give every running request a token every `gap_s`."""
    until_s = core.now_s + seconds
    while core.now_s < until_s:
        core.at(core.now_s + gap_s)
        for request_id in list(core.running):
            core.tokens(request_id)
        for request_id in core.asked_to_preempt():
            core.preempt(request_id)


def test_the_limit_follows_the_gaps_between_tokens_and_states_the_reason() -> None:
    core = Core(max_concurrency=8, max_queue_size=20, adaptive="on", itl_target_s=0.05, can_preempt=True)
    core.submit(*(f"r{n}" for n in range(10)))
    slow_down(core, 0.2, seconds=20.0)
    stats = core.scheduler.stats()
    assert stats.max_concurrency < 8
    assert stats.running == stats.max_concurrency, "the latest starts were preempted"
    changes = [e for e in core.log if isinstance(e, ev.LimitsChanged)]
    assert all(e.by == "adaptive" and "ms" in e.why for e in changes)
    assert [e.why for e in core.log if isinstance(e, ev.PreemptRequested)] == ["limit"] * (8 - stats.running)
    assert sorted(core.waiting[: 8 - stats.running]) == [f"r{n}" for n in range(stats.running, 8)]


def test_tokens_that_change_the_limit_are_counted_before_deadlines_fire(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stall deadline in the same call once ended the request before its tokens were counted."""
    core = Core(adaptive="on", max_concurrency=2, max_queue_size=1, stall_timeout_s=5.0)
    core.submit("a")
    core.tokens("a")
    monkeypatch.setattr(AdaptiveLimit, "observe", lambda self, *gap: Move(2, 1, "slow"))
    core.now_s = 5.5  # the timer of 5.0 is late, and the token comes first
    core.tokens("a")
    assert core.running == ["a"]
    assert core.history.tokens["a"] == 2


def test_without_preemption_requests_above_a_new_limit_end_by_themselves() -> None:
    core = Core(max_concurrency=8, max_queue_size=20, adaptive="on", itl_target_s=0.05)
    core.submit(*(f"r{n}" for n in range(8)))
    slow_down(core, 0.2, seconds=20.0)
    stats = core.scheduler.stats()
    assert stats.max_concurrency < stats.running == 8


@pytest.mark.parametrize("max_concurrency", [1, 3, 100])
def test_without_adaptive_concurrency_the_limit_is_the_operators(max_concurrency: int) -> None:
    core = Core(max_concurrency=8, max_queue_size=20, min_concurrency=2, itl_target_s=0.05, can_preempt=True)
    core.limits(max_concurrency=max_concurrency)
    core.submit(*(f"r{n}" for n in range(4)))
    slow_down(core, 0.2, seconds=20.0)
    assert core.scheduler.stats().max_concurrency == max_concurrency


def test_an_automatic_limit_starts_small_and_grows_while_requests_wait() -> None:
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
