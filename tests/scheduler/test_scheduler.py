"""What the scheduler decides, one situation at a time: facts in, decisions out, no loop and no clock."""

from __future__ import annotations

import pytest

from chatstream.errors import ConfigError, QueueFull, ShuttingDown
from chatstream.scheduler import Arrival, Outcome, Scheduler
from chatstream.scheduler import events as ev
from tests.scheduler.builders import Core

# --- admission ------------------------------------------------------------------------------------------------------


def test_slots_are_filled_first_then_the_line() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a", "b", "c", "d")
    assert core.running == ["a", "b"]
    assert core.waiting == ["c", "d"]


def test_a_burst_within_one_instant_admits_exactly_slots_plus_places() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    codes = [core.try_submit(f"r{n}") for n in range(10)]
    assert codes == [""] * 7 + ["queue_full"] * 3


@pytest.mark.parametrize(("max_queue_size", "admitted"), [(0, 2), (1, 3), (5, 7)])
def test_small_queues_are_exact_too(max_queue_size: int, admitted: int) -> None:
    core = Core(max_concurrency=2, max_queue_size=max_queue_size)
    assert [core.try_submit(f"r{n}") for n in range(12)].count("") == admitted


def test_a_refusal_says_when_to_come_back() -> None:
    core = Core(max_concurrency=1, max_queue_size=0)
    core.submit("a")
    core.at(4.0)
    with pytest.raises(QueueFull) as refusal:
        core.submit("b")
    assert refusal.value.retry_after_s == pytest.approx(8.0)  # the running one is taken to be half way through


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


def test_a_refused_request_leaves_nothing_behind_and_may_come_back_with_its_id() -> None:
    core = Core(max_concurrency=1, max_queue_size=0)
    core.submit("a")
    assert core.try_submit("b") == "queue_full"
    assert not core.scheduler.is_live("b")
    core.finish("a")
    core.scheduler.submit(Arrival(request_id="b"), core.now_s)
    assert core.running == ["b"]


def test_before_the_opening_requests_are_held_up_to_slots_plus_places_and_start_in_order() -> None:
    core = Core(max_concurrency=2, max_queue_size=1, is_open=False)
    assert [core.try_submit(n) for n in "abcd"] == ["", "", "", "queue_full"]
    assert core.running == []
    assert [core.scheduler.position(n) for n in "abc"] == [1, 2, 3]
    core.open()
    assert core.running == ["a", "b"]
    assert core.scheduler.position("c") == 1


# --- order and place ------------------------------------------------------------------------------------------------


def test_strictly_first_come_first_served() -> None:
    core = Core(max_concurrency=1, max_queue_size=3)
    core.submit("a", "b", "c", "d")
    for name in "abcd":
        assert core.running == [name]
        core.finish(name)


def test_the_next_one_starts_in_the_same_call_in_which_a_slot_becomes_free() -> None:
    core = Core(max_concurrency=2)
    core.submit("a", "b", "c")
    core.at(1.5).finish("b")
    end, start = core.log[-2:]
    assert isinstance(end, ev.Finished)
    assert isinstance(start, ev.Started)
    assert (start.request_id, start.at_s, start.waited_s) == ("c", 1.5, 1.5)


def test_a_place_counts_those_ahead_and_moves_up_when_one_of_them_leaves() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b", "c", "d")
    assert [core.scheduler.position(n) for n in "abcd"] == [None, 1, 2, 3]
    core.cancel("c")
    assert core.scheduler.position("d") == 2
    core.finish("a")
    assert core.scheduler.position("d") == 1


def test_a_conversation_runs_one_request_at_a_time_and_those_behind_may_pass() -> None:
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


def test_a_held_request_that_becomes_free_to_start_keeps_its_place() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a1", conversation="a")
    core.submit("x")
    core.submit("a2", conversation="a")
    core.submit("y")
    core.finish("a1")
    assert core.running == ["a2", "x"]
    assert core.waiting == ["y"]


def test_cancelling_the_first_of_a_conversation_in_line_lets_the_second_have_its_turn() -> None:
    core = Core(max_concurrency=1)
    core.submit("x")
    core.submit("a1", "a2", conversation="a")
    core.cancel("a1")
    core.finish("x")
    assert core.running == ["a2"]


# --- ends -----------------------------------------------------------------------------------------------------------


def test_cancelling_a_waiting_request_frees_its_place_at_once() -> None:
    core = Core(max_concurrency=1, max_queue_size=1)
    core.submit("a", "b")
    assert core.cancel("b")
    assert core.try_submit("c") == ""


def test_a_cancelled_running_request_holds_its_slot_until_the_engine_lets_go() -> None:
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
    assert [core.cancel("a"), core.cancel("a"), core.cancel("b"), core.cancel("b"), core.cancel("nobody")] == [
        True,
        True,
        True,
        False,
        False,
    ]
    assert len([e for e in core.log if isinstance(e, ev.AbortRequested)]) == 1


def test_a_late_report_of_a_former_occupant_does_not_free_the_slot_again() -> None:
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


def test_whoever_waited_as_long_as_allowed_expires_and_never_starts() -> None:
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


def test_however_short_the_wait_a_free_slot_is_taken_first() -> None:
    core = Core(max_concurrency=1)
    core.at(1000.0).submit("a", max_wait_s=1e-300)
    assert core.running == ["a"]
    core.submit("b", max_wait_s=1e-300)
    core.at(1000.1)
    assert isinstance(core.ends("b")[0], ev.Expired)


def test_a_watchdog_that_wakes_late_looks_again_before_it_takes_a_slot() -> None:
    core = Core(max_concurrency=1, stall_timeout_s=10.0)
    core.submit("a")
    core.now_s = 60.0
    core.scheduler.handle_timer(60.0)
    assert core.running == ["a"]
    core.at(70.0)
    assert core.running == []


def test_a_timer_that_comes_late_does_not_let_an_expired_request_start() -> None:
    core = Core(max_concurrency=1, max_wait_s=10.0)
    core.submit("a", "b")
    core.now_s = 11.0  # nobody called handle_timer at 10
    core.finish("a")
    assert core.running == []
    assert isinstance(core.ends("b")[0], ev.Expired)


def test_a_request_whose_engine_failed_before_the_first_token_comes_back_to_its_old_place() -> None:
    core = Core(max_concurrency=1, max_attempts=2)
    core.submit("a", "b")
    assert core.requeue("a")
    assert core.running == ["a"]  # first again, not last
    assert core.grants["a"].attempt == 2
    assert not core.requeue("a")  # its attempts are used up


def test_a_request_that_has_delivered_tokens_is_never_started_again() -> None:
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


def test_an_engine_that_does_not_let_go_of_a_cancelled_request_loses_the_slot() -> None:
    core = Core(max_concurrency=1, abort_timeout_s=5.0)
    core.submit("a", "b")
    core.cancel("a")
    core.at(5.0)
    assert core.running == ["b"]
    assert [type(e) for e in core.ends("a")] == [ev.Cancelled]
    core.finish("a")  # the engine wakes up at last
    assert core.running == ["b"]


# --- limits at run time ---------------------------------------------------------------------------------------------


def test_raising_the_limit_starts_the_next_at_once() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b", "c")
    core.limits(max_concurrency=3)
    assert core.running == ["a", "b", "c"]


def test_lowering_the_limit_lets_the_running_ones_finish_and_starts_nobody_until_it_fits() -> None:
    core = Core(max_concurrency=3)
    core.submit("a", "b", "c", "d")
    core.limits(max_concurrency=1)
    assert core.running == ["a", "b", "c"]
    core.finish("a", "b")
    assert core.running == ["c"]
    core.finish("c")
    assert core.running == ["d"]


def test_lowering_the_queue_size_sends_nobody_away_but_refuses_new_ones_until_it_fits() -> None:
    core = Core(max_concurrency=1, max_queue_size=3)
    core.submit("a", "b", "c", "d")
    core.limits(max_queue_size=1)
    assert core.waiting == ["b", "c", "d"]
    core.finish("a", "b")
    assert core.try_submit("e") == "queue_full"
    core.finish("c")
    assert core.try_submit("e2") == ""


def test_an_impossible_limit_changes_nothing() -> None:
    core = Core(max_concurrency=2, max_queue_size=3)
    with pytest.raises(ConfigError, match="max_queue_size"):
        core.limits(max_concurrency=5, max_queue_size=-1)
    assert core.scheduler.stats().max_concurrency == 2


# --- drain ----------------------------------------------------------------------------------------------------------


def test_a_drain_ends_those_who_wait_refuses_new_ones_and_lets_the_running_finish() -> None:
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


def test_nobody_is_started_again_while_draining() -> None:
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


def test_the_views_say_who_runs_and_who_waits_and_for_how_long() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", client="alice")
    core.at(2.0).submit("b", client="bob")
    core.at(3.0).tokens("a", 4)
    core.at(5.0)
    running, waiting = core.scheduler.requests(core.now_s)
    assert (running.client, running.slot, running.position) == ("alice", 0, None)
    assert (running.generated_tokens, running.running_s, running.last_progress_s_ago) == (4, 5.0, 2.0)
    assert (waiting.client, waiting.slot, waiting.position, waiting.waited_s) == ("bob", None, 1, 3.0)


def test_what_came_in_equals_what_was_refused_plus_what_ended_plus_what_lives() -> None:
    core = Core(max_concurrency=1, max_queue_size=2, max_wait_s=5.0)
    for name in "abcdef":
        core.try_submit(name)
    core.finish("a")
    core.cancel("b")
    core.at(6.0)
    stats = core.scheduler.stats()
    ended = stats.finished + stats.cancelled + stats.failed + stats.expired
    assert stats.received == stats.rejected + ended + stats.running + stats.waiting == 6


def test_tokens_are_counted_when_they_are_made_whatever_becomes_of_the_request() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    first = core.grants["a"]
    core.scheduler.on_tokens(first, 0, core.now_s, prompt_tokens=30)
    core.scheduler.on_tokens(first, 1, core.now_s, prompt_tokens=10)
    core.tokens("a", 2)
    core.end(first, Outcome.FAILED, "engine_error")
    core.scheduler.on_tokens(first, 5, core.now_s, prompt_tokens=7)  # too late: nobody's
    core.tokens("b")
    stats = core.scheduler.stats()
    assert (stats.prompt_tokens, stats.generated_tokens) == (40, 4)


def test_a_readable_repr() -> None:
    core = Core(max_concurrency=2, max_queue_size=5)
    core.submit("a", "b", "c")
    assert repr(core.scheduler) == "<Scheduler running=2/2 waiting=1/5 fcfs>"


def test_the_core_runs_on_plain_calls_alone() -> None:
    scheduler = Scheduler()
    scheduler.open(0.0)
    scheduler.submit(Arrival(request_id="a"), 0.0)
    assert [type(e).__name__ for e in scheduler.take_events()] == ["Opened", "Received", "Admitted", "Started"]
