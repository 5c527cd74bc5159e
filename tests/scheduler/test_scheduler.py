"""The decisions of the scheduler, one situation at a time: facts in, decisions out, no event loop and no clock."""

from __future__ import annotations

import pytest

from chatstream.errors import ConfigError, QueueFull, ShuttingDown
from chatstream.scheduler import Arrival, Outcome, Scheduler
from chatstream.scheduler import events as ev
from tests.scheduler.builders import Core

# --- admission ------------------------------------------------------------------------------------------------------


def test_slots_are_filled_first_then_the_queue() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a", "b", "c", "d")
    assert core.running == ["a", "b"]
    assert core.waiting == ["c", "d"]


def test_a_burst_in_one_instant_admits_exactly_slots_plus_queue_size() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    codes = [core.try_submit(f"r{n}") for n in range(10)]
    assert codes == [""] * 7 + ["queue_full"] * 3


@pytest.mark.parametrize(("max_queue_size", "admitted"), [(0, 2), (1, 3), (5, 7)])
def test_small_queue_sizes_are_exact(max_queue_size: int, admitted: int) -> None:
    core = Core(max_concurrency=2, max_queue_size=max_queue_size)
    assert [core.try_submit(f"r{n}") for n in range(12)].count("") == admitted


def test_a_rejection_has_a_retry_after() -> None:
    core = Core(max_concurrency=1, max_queue_size=0)
    core.submit("a")
    core.at(4.0)
    with pytest.raises(QueueFull) as refusal:
        core.submit("b")
    assert refusal.value.retry_after_s == pytest.approx(8.0)  # the running request counts as half way through


def test_retry_after_grows_with_the_backlog_and_stays_between_1_and_120_seconds() -> None:
    hints = []
    for backlog in (0, 1, 10, 1000):
        core = Core(max_concurrency=1, max_queue_size=backlog)
        core.submit("warm-up")
        core.at(3.0).finish("warm-up")
        core.submit(*(f"r{n}" for n in range(backlog + 1)))
        with pytest.raises(QueueFull) as refusal:
            core.submit("late")
        assert refusal.value.retry_after_s is not None
        hints.append(refusal.value.retry_after_s)
    assert hints == [3.0, 6.0, 33.0, 120.0]


def test_a_rejected_request_leaves_no_record_and_its_id_can_be_reused() -> None:
    core = Core(max_concurrency=1, max_queue_size=0)
    core.submit("a")
    assert core.try_submit("b") == "queue_full"
    assert not core.scheduler.is_live("b")
    core.finish("a")
    core.scheduler.submit(Arrival(request_id="b"), core.now_s)
    assert core.running == ["b"]


def test_before_opening_requests_wait_up_to_slots_plus_queue_size_and_start_in_order() -> None:
    core = Core(max_concurrency=2, max_queue_size=1, is_open=False)
    assert [core.try_submit(n) for n in "abcd"] == ["", "", "", "queue_full"]
    assert core.running == []
    assert [core.scheduler.position(n) for n in "abc"] == [1, 2, 3]
    core.open()
    assert core.running == ["a", "b"]
    assert core.scheduler.position("c") == 1


# --- order and position ----------------------------------------------------------------------------------------------


def test_strictly_first_come_first_served() -> None:
    core = Core(max_concurrency=1, max_queue_size=3)
    core.submit("a", "b", "c", "d")
    for name in "abcd":
        assert core.running == [name]
        core.finish(name)


def test_the_next_request_starts_in_the_call_that_frees_a_slot() -> None:
    core = Core(max_concurrency=2)
    core.submit("a", "b", "c")
    core.at(1.5).finish("b")
    end, start = core.log[-2:]
    assert isinstance(end, ev.Finished)
    assert isinstance(start, ev.Started)
    assert (start.request_id, start.at_s, start.waited_s) == ("c", 1.5, 1.5)


def test_a_position_counts_the_requests_ahead_and_falls_when_one_ends() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b", "c", "d")
    assert [core.scheduler.position(n) for n in "abcd"] == [None, 1, 2, 3]
    core.cancel("c")
    assert core.scheduler.position("d") == 2
    core.finish("a")
    assert core.scheduler.position("d") == 1


def test_a_conversation_runs_one_request_at_a_time_and_requests_behind_may_pass() -> None:
    core = Core(max_concurrency=2)
    core.submit("a1", "a2", "a3", conversation="a")
    core.submit("b", conversation="b")
    assert core.running == ["a1", "b"]
    assert core.waiting == ["a2", "a3"]
    core.finish("b")
    assert core.running == ["a1"]
    assert [core.scheduler.position(n) for n in ("a2", "a3")] == [1, 2]
    core.finish("a1")
    assert core.running == ["a2"]


def test_a_held_request_that_becomes_eligible_keeps_its_rank() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a1", conversation="a")
    core.submit("x")
    core.submit("a2", conversation="a")
    core.submit("y")
    core.finish("a1")
    assert core.running == ["a2", "x"]
    assert core.waiting == ["y"]


def test_cancelling_the_first_of_a_conversation_makes_the_second_eligible() -> None:
    core = Core(max_concurrency=1)
    core.submit("x")
    core.submit("a1", "a2", conversation="a")
    core.cancel("a1")
    core.finish("x")
    assert core.running == ["a2"]


# --- ends -----------------------------------------------------------------------------------------------------------


def test_cancelling_a_waiting_request_frees_its_position_at_once() -> None:
    core = Core(max_concurrency=1, max_queue_size=1)
    core.submit("a", "b")
    assert core.cancel("b")
    assert core.try_submit("c") == ""


def test_a_cancelled_running_request_keeps_its_slot_until_the_engine_releases_it() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    core.cancel("a", by="client")
    assert isinstance(core.log[-1], ev.AbortRequested)
    assert core.running == ["a"]
    core.end(core.grants["a"], Outcome.FINISHED, "stop")  # its last token and the cancel crossed
    assert isinstance(core.ends("a")[0], ev.Cancelled)
    assert core.running == ["b"]


def test_cancel_is_idempotent_in_every_state() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    assert [core.cancel("a"), core.cancel("a"), core.cancel("b"), core.cancel("b"), core.cancel("unknown")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert len([e for e in core.log if isinstance(e, ev.AbortRequested)]) == 1


def test_a_late_report_about_an_earlier_occupant_does_not_free_the_slot_again() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    old = core.grants["a"]
    core.finish("a")
    core.end(old, Outcome.FAILED, "engine_error")
    core.scheduler.on_tokens(old, 5, core.now_s)
    assert core.running == ["b"]
    assert core.scheduler.stats().stale_reports == 2


def test_a_failure_frees_the_slot_like_any_other_end() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    core.end(core.grants["a"], Outcome.FAILED, "engine_error")
    assert core.running == ["b"]


def test_a_request_expires_after_its_maximum_wait_and_never_starts() -> None:
    core = Core(max_concurrency=1, max_wait_s=10.0)
    core.submit("a", "b")
    core.submit("c", max_wait_s=2.0)
    core.submit("d", max_wait_s=99.0)
    assert core.scheduler.next_deadline_s() == 2.0
    core.at(2.0)
    assert core.waiting == ["b", "d"]
    core.at(10.0)
    assert core.waiting == []  # a request may ask for less than the server's limit, not for more
    core.finish("a")
    assert core.running == []


def test_a_request_with_any_maximum_wait_starts_in_a_free_slot() -> None:
    core = Core(max_concurrency=1)
    core.at(1000.0).submit("a", max_wait_s=1e-300)
    assert core.running == ["a"]
    core.submit("b", max_wait_s=1e-300)
    core.at(1000.1)
    assert isinstance(core.ends("b")[0], ev.Expired)


def test_a_late_watchdog_checks_again_before_it_reclaims_a_slot() -> None:
    core = Core(max_concurrency=1, stall_timeout_s=10.0)
    core.submit("a")
    core.now_s = 60.0
    core.scheduler.handle_timer(60.0)
    assert core.running == ["a"]
    core.at(70.0)
    assert core.running == []


def test_a_late_timer_does_not_let_an_expired_request_start() -> None:
    core = Core(max_concurrency=1, max_wait_s=10.0)
    core.submit("a", "b")
    core.now_s = 11.0  # handle_timer was not called at 10
    core.finish("a")
    assert core.running == []
    assert isinstance(core.ends("b")[0], ev.Expired)


def test_a_request_whose_engine_failed_before_the_first_token_keeps_its_rank() -> None:
    core = Core(max_concurrency=1, max_attempts=2)
    core.submit("a", "b")
    assert core.requeue("a")
    assert core.running == ["a"]  # first again, not last
    assert core.grants["a"].attempt == 2
    assert not core.requeue("a")  # its attempts are used up


def test_a_request_that_has_delivered_tokens_is_never_requeued() -> None:
    core = Core(max_concurrency=1)
    core.submit("a")
    core.tokens("a")
    assert not core.requeue("a")


# --- the watchdog ---------------------------------------------------------------------------------------------------


def test_a_generation_without_progress_loses_its_slot() -> None:
    core = Core(max_concurrency=1, stall_timeout_s=30.0)
    core.submit("a", "b")
    core.at(20.0).tokens("a")
    core.at(49.9)
    assert core.running == ["a"]  # 30 s after the last token, not after the start
    core.at(50.0)
    assert isinstance(core.ends("a")[0], ev.Failed)
    assert core.running == ["b"]
    assert core.scheduler.stats().slots_reclaimed == 1


def test_an_engine_that_does_not_release_a_cancelled_request_loses_the_slot() -> None:
    core = Core(max_concurrency=1, abort_timeout_s=5.0)
    core.submit("a", "b")
    core.cancel("a")
    core.at(5.0)
    assert core.running == ["b"]
    assert [type(e) for e in core.ends("a")] == [ev.Cancelled]
    core.finish("a")  # a late report
    assert core.running == ["b"]


# --- limits at run time ---------------------------------------------------------------------------------------------


def test_raising_the_limit_starts_waiting_requests_at_once() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b", "c")
    core.limits(max_concurrency=3)
    assert core.running == ["a", "b", "c"]


def test_lowering_the_limit_lets_running_requests_finish_and_starts_none_until_they_fit() -> None:
    core = Core(max_concurrency=3)
    core.submit("a", "b", "c", "d")
    core.limits(max_concurrency=1)
    assert core.running == ["a", "b", "c"]
    core.finish("a", "b")
    assert core.running == ["c"]
    core.finish("c")
    assert core.running == ["d"]


def test_lowering_the_queue_size_ends_no_request_but_rejects_new_ones_until_they_fit() -> None:
    core = Core(max_concurrency=1, max_queue_size=3)
    core.submit("a", "b", "c", "d")
    core.limits(max_queue_size=1)
    assert core.waiting == ["b", "c", "d"]
    core.finish("a", "b")
    assert core.try_submit("e") == "queue_full"
    core.finish("c")
    assert core.try_submit("e2") == ""


def test_an_invalid_limit_changes_nothing() -> None:
    core = Core(max_concurrency=2, max_queue_size=3)
    with pytest.raises(ConfigError, match="max_queue_size"):
        core.limits(max_concurrency=5, max_queue_size=-1)
    assert core.scheduler.stats().max_concurrency == 2


# --- drain ----------------------------------------------------------------------------------------------------------


def test_a_drain_cancels_waiting_requests_rejects_new_ones_and_lets_running_ones_finish() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b", "c")
    core.drain()
    assert core.waiting == []
    assert core.running == ["a"]
    with pytest.raises(ShuttingDown) as refusal:
        core.submit("d")
    assert refusal.value.retry_after_s is not None
    core.finish("a")
    assert core.running == []
    core.history.check_complete()


def test_no_request_is_requeued_while_draining() -> None:
    core = Core(max_concurrency=1)
    core.submit("a")
    core.drain()
    assert not core.requeue("a")


def test_a_drained_scheduler_can_be_opened_again() -> None:
    core = Core(max_concurrency=1)
    core.drain()
    core.open()
    core.submit("a")
    assert core.running == ["a"]


# --- views ----------------------------------------------------------------------------------------------------------


def test_views_show_running_and_waiting_requests_with_their_times() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", client="alice")
    core.at(2.0).submit("b", client="bob")
    core.at(3.0).tokens("a", 4)
    core.at(5.0)
    running, waiting = core.scheduler.requests(core.now_s)
    assert (running.client, running.slot, running.position) == ("alice", 0, None)
    assert (running.generated_tokens, running.running_s, running.last_progress_s_ago) == (4, 5.0, 2.0)
    assert (waiting.client, waiting.slot, waiting.position, waiting.waited_s) == ("bob", None, 1, 3.0)


def test_received_equals_rejected_plus_ended_plus_live() -> None:
    core = Core(max_concurrency=1, max_queue_size=2, max_wait_s=5.0)
    for name in "abcdef":
        core.try_submit(name)
    core.finish("a")
    core.cancel("b")
    core.at(6.0)
    stats = core.scheduler.stats()
    ended = stats.finished + stats.cancelled + stats.failed + stats.expired
    assert stats.received == stats.rejected + ended + stats.running + stats.waiting == 6


def test_tokens_are_counted_when_generated_whatever_the_outcome() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    first = core.grants["a"]
    core.scheduler.on_tokens(first, 0, core.now_s, prompt_tokens=30)
    core.scheduler.on_tokens(first, 1, core.now_s, prompt_tokens=10)
    core.tokens("a", 2)
    core.end(first, Outcome.FAILED, "engine_error")
    core.scheduler.on_tokens(first, 5, core.now_s, prompt_tokens=7)  # too late: ignored
    core.tokens("b")
    stats = core.scheduler.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (40, 4)


def test_repr_shows_limits_and_policy() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a", "b", "c")
    assert repr(core.scheduler) == "<Scheduler running=2/2 waiting=1/5 fcfs>"


def test_the_scheduler_needs_only_plain_calls() -> None:
    scheduler = Scheduler()
    scheduler.open(0.0)
    scheduler.submit(Arrival(request_id="a"), 0.0)
    assert [type(e).__name__ for e in scheduler.take_events()] == ["Opened", "Received", "Admitted", "Started"]
