"""Who may join the line: everything that is decided at the door, before anything costly is done."""

from __future__ import annotations

import pytest

from chatstream.errors import ClientLimit, Infeasible, Paused, QueueFull
from chatstream.scheduler import Outcome, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.scheduler.admission import QueueBound
from tests.scheduler.builders import Core


def warm_up(core: Core, *, service_s: float, completions: int = 40) -> Core:
    """Enough generations of the same length that expected times have a basis."""
    for n in range(completions):
        core.submit(f"warm-up {n}")
        for _ in range(20):
            core.at(core.now_s + service_s / 20).tokens(f"warm-up {n}")
        core.finish(f"warm-up {n}")
    return core


# --- clients --------------------------------------------------------------------------------------------------------


def test_one_client_may_have_only_so_many_requests_waiting_and_the_others_are_served() -> None:
    core = Core(max_concurrency=1, max_queue_size=10, max_waiting_per_client=2)
    codes = [core.try_submit(f"a{n}", client="a") for n in range(5)]
    assert codes == ["", "", "", "client_limit", "client_limit"]  # one runs, two wait
    assert core.try_submit("b", client="b") == ""


def test_a_free_slot_is_open_to_a_client_that_may_not_wait() -> None:
    core = Core(max_concurrency=2, max_queue_size=10, max_waiting_per_client=0)
    assert [core.try_submit(f"a{n}", client="a") for n in range(3)] == ["", "", "client_limit"]


def test_before_the_opening_those_who_will_have_a_slot_do_not_count_as_waiting() -> None:
    """While a model loads as many are admitted as afterwards; there were fewer, because nobody runs yet."""
    for is_open in (True, False):
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=10, max_waiting_per_client=1)
        codes = [core.try_submit(f"a{n}", client="a") for n in range(7)]
        assert codes == [""] * 5 + ["client_limit"] * 2
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=10, max_waiting_per_client=0)
        assert [core.try_submit(f"a{n}", client="a") for n in range(5)] == [""] * 4 + ["client_limit"]
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=10, max_waiting_tokens=300)
        assert [core.try_submit(f"a{n}", prompt_tokens=20) for n in range(6)] == [""] * 5 + ["queue_full"]


def test_before_the_opening_who_is_held_takes_no_slot_that_somebody_else_will_have() -> None:
    """Six of one conversation filled four slots and a place, of which one could start; another client was refused."""
    for is_open in (True, False):
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=1)
        codes = [core.try_submit(f"k{n}", conversation="k") for n in range(3)]
        assert [*codes, core.try_submit("b")] == ["", "", "queue_full", ""]
        core = Core(is_open=is_open, max_concurrency=4, max_running_per_client=1, max_waiting_per_client=1)
        codes = [core.try_submit(f"a{n}", client="a") for n in range(3)]
        assert [*codes, core.try_submit("b", client="b")] == ["", "", "client_limit", ""]


def test_before_the_opening_a_held_request_that_is_withdrawn_takes_no_slot() -> None:
    core = Core(is_open=False, max_concurrency=1, max_queue_size=1)
    core.submit("k0", "k1", conversation="k")
    core.cancel("k1")
    assert core.try_submit("a") == ""
    assert core.try_submit("b") == "queue_full"
    core.cancel("k0")
    assert core.try_submit("k2", conversation="k") == ""
    assert core.try_submit("c") == "queue_full"


def test_a_refusal_that_comes_with_a_deadline_leaves_no_slot_idle() -> None:
    core = Core(max_concurrency=1, abort_timeout_s=30.0)
    core.submit("a", "b")
    core.cancel("a")
    core.pause()
    core.now_s = 30.0  # nobody has looked at the timer yet
    assert core.try_submit("c") == "paused"
    assert core.running == ["b"]


def test_before_the_opening_whoever_is_held_counts_as_waiting() -> None:
    core = Core(is_open=False, max_concurrency=4, max_queue_size=10, max_waiting_per_client=0)
    assert [core.try_submit(f"k{n}", conversation="k") for n in range(2)] == ["", "client_limit"]


def test_a_client_gets_only_so_many_slots_and_those_behind_it_pass() -> None:
    core = Core(max_concurrency=3, max_queue_size=10, max_running_per_client=1)
    core.submit("a1", "a2", "a3", client="a")
    core.submit("b1", client="b")
    assert core.running == ["a1", "b1"]
    assert core.waiting == ["a2", "a3"]
    core.finish("a1")
    assert core.running == ["a2", "b1"]


def test_the_turn_of_a_client_goes_to_its_earliest_request_also_after_a_conversation_was_busy() -> None:
    core = Core(max_concurrency=3, max_queue_size=10, max_running_per_client=1)
    core.submit("a1", client="a", conversation="one")
    core.submit("a2", client="a", conversation="one")
    core.submit("a3", client="a", conversation="two")
    core.finish("a1")
    assert core.running == ["a2"]
    core.finish("a2")
    assert core.running == ["a3"]


def test_a_client_that_left_the_line_makes_room_for_its_next_request() -> None:
    core = Core(max_concurrency=1, max_queue_size=10, max_waiting_per_client=1, max_running_per_client=1)
    core.submit("a1", "a2", client="a")
    core.cancel("a2")
    assert core.try_submit("a3", client="a") == ""
    core.finish("a1")
    core.finish("a3")
    assert core.scheduler.next_deadline_s() is None
    assert not any(core.scheduler.records().values())


# --- places ---------------------------------------------------------------------------------------------------------


def test_the_line_is_bounded_by_tokens_too() -> None:
    core = Core(max_concurrency=1, max_queue_size=100, max_waiting_tokens=1000)
    details = {"prompt_tokens": 300, "max_new_tokens": 100}
    codes = [core.try_submit(f"r{n}", **details) for n in range(5)]
    assert codes == ["", "", "", "queue_full", "queue_full"]  # the first runs and does not count
    assert core.try_submit("small", prompt_tokens=50, max_new_tokens=50) == ""
    core.cancel("r1")
    assert core.try_submit("r5", **details) == ""


def test_an_answer_without_a_limit_counts_as_long_as_answers_have_been() -> None:
    core = Core(max_concurrency=1, max_queue_size=100, max_waiting_tokens=100)
    core.submit("first")
    with pytest.raises(
        QueueFull, match=r"^this request has about 256 tokens and about 0 are waiting; the maximum is 100$"
    ):
        core.submit("unknown")
    core.tokens("first", 40)
    core.finish("first")
    core.submit("runs")
    assert [core.try_submit(f"r{n}") for n in range(3)] == ["", "", "queue_full"]


@pytest.mark.parametrize("policy", ["fcfs", "priority"])
def test_priority_does_not_change_the_number_of_places(policy: str) -> None:
    for priority in (-10, 0, 10):
        core = Core(max_concurrency=1, max_queue_size=10, policy=policy)
        core.submit("runs")
        assert [core.try_submit(f"r{n}", priority=priority) for n in range(12)].count("") == 10


def test_an_automatic_bound_follows_littles_law() -> None:
    bound = QueueBound(SchedulerSettings(max_queue_size="auto", ttft_slo_s=60.0))
    assert bound.adapt(10.0, 4)
    assert bound.value == 24
    assert not bound.adapt(8.5, 4), "a small change is left alone"
    assert bound.adapt(5.0, 4)
    assert bound.value == 48
    assert bound.adapt(100.0, 1)
    assert bound.value == 8
    assert bound.adapt(0.0001, 64)
    assert bound.value == 4096


def test_an_automatic_bound_is_never_the_one_that_was_there_before() -> None:
    """After a bound of 0 nobody could ever wait, so nothing was ever measured."""
    for before, value in ((0, 8), (100_000, 4096), (20, 20)):
        bound = QueueBound(SchedulerSettings(max_queue_size=before))
        bound.set("auto")
        assert bound.value == value


def test_an_automatic_bound_is_told_and_exact() -> None:
    core = Core(max_concurrency=2, max_queue_size="auto", max_wait_s=20.0, admit_probability=0.0)
    core.submit("a")
    core.at(4.0).finish("a")
    assert core.scheduler.stats().max_queue_size == 10
    changed = [e for e in core.log if isinstance(e, ev.LimitsChanged)]
    assert [(e.max_queue_size, e.by) for e in changed] == [(10, "auto")]
    assert [core.try_submit(f"r{n}") for n in range(14)].count("") == 12
    core.limits(max_queue_size=3)
    core.finish("r0")
    assert core.scheduler.stats().max_queue_size == 3
    core.limits(max_queue_size="auto")
    assert core.scheduler.stats().max_queue_size == 20, "2 x 20 s / 2 s: the last one took no time"


def test_who_asks_and_leaves_does_not_make_the_line_longer() -> None:
    """It did: 60 requests that were cancelled after 20 ms each made room for 1,500."""
    core = Core(max_concurrency=1, max_queue_size="auto", max_wait_s=30.0, admit_probability=0.0)
    core.submit("a")
    core.at(5.0).finish("a")
    assert core.scheduler.stats().max_queue_size == 8
    for n in range(60):
        core.submit(f"r{n}")
        core.cancel(f"r{n}")
        core.at(core.now_s + 0.02).end(core.grants[f"r{n}"], Outcome.CANCELLED, "client")
    assert core.scheduler.stats().max_queue_size == 8


# --- in time --------------------------------------------------------------------------------------------------------


def test_who_would_start_too_late_is_refused_at_the_door_and_told_when_to_come_back() -> None:
    core = warm_up(Core(max_concurrency=1, max_queue_size=100, max_wait_s=35.0), service_s=10.0)
    codes = [core.try_submit(f"r{n}") for n in range(8)]
    # One runs; the others start after 10, 20, 30 and 40 seconds.
    assert codes == ["", "", "", "", "infeasible", "infeasible", "infeasible", "infeasible"]
    with pytest.raises(Infeasible) as refusal:
        core.submit("late")
    assert refusal.value.http_status == 429
    assert refusal.value.retry_after_s == pytest.approx(40.0, rel=0.1)
    waiting = [view for view in core.scheduler.requests(core.now_s) if view.position is not None]
    assert len(waiting) == 3, "nobody who was refused stands in line"
    assert core.scheduler.records()["waiting_tokens"] == sum(view.waiting_tokens for view in waiting)


def test_who_is_held_does_not_start_because_somebody_was_refused_before_it() -> None:
    """A number in line that was given to both once let it start beside the earlier request of its conversation."""
    core = warm_up(Core(max_concurrency=1, max_queue_size=100), service_s=10.0)
    core.submit("k1", conversation="k")
    assert core.try_submit("impatient", max_wait_s=1.0) == "infeasible"
    core.submit("k2", conversation="k")
    core.limits(max_concurrency=4)
    assert core.running == ["k1"]


def test_when_to_come_back_follows_from_how_far_those_are_who_run() -> None:
    """It did not: it was the same 20 seconds until somebody ended."""
    core = warm_up(Core(max_concurrency=1, max_queue_size=1), service_s=10.0)
    core.submit("runs", "waits")
    assert core.scheduler.retry_after_s(core.now_s) == pytest.approx(20.0, abs=1.0)
    for _ in range(16):
        core.at(core.now_s + 0.5).tokens("runs")
    assert core.scheduler.retry_after_s(core.now_s) == pytest.approx(12.0, abs=1.0)


def test_who_will_certainly_start_in_time_is_admitted_however_sure_one_must_be() -> None:
    core = warm_up(Core(max_concurrency=1, max_queue_size=9, max_wait_s=1000.0, admit_probability=1.0), service_s=10.0)
    assert [core.try_submit(f"r{n}") for n in range(3)] == [""] * 3


def test_a_request_with_less_patience_is_refused_sooner() -> None:
    core = warm_up(Core(max_concurrency=1, max_queue_size=100), service_s=10.0)
    core.submit("runs", "waits")
    assert core.try_submit("patient", max_wait_s=30.0) == ""
    assert core.try_submit("impatient", max_wait_s=15.0) == "infeasible"
    assert core.try_submit("has no limit") == ""


def test_nobody_is_refused_as_too_late_without_a_basis_or_by_choice_or_with_a_free_slot() -> None:
    fresh = Core(max_concurrency=1, max_queue_size=100, max_wait_s=5.0)
    assert [fresh.try_submit(f"r{n}") for n in range(5)] == [""] * 5
    by_choice = warm_up(
        Core(max_concurrency=1, max_queue_size=100, max_wait_s=5.0, admit_probability=0.0), service_s=10
    )
    assert [by_choice.try_submit(f"r{n}") for n in range(5)] == [""] * 5
    free = warm_up(Core(max_concurrency=2, max_queue_size=100, max_wait_s=0.001), service_s=10.0)
    assert [free.try_submit(f"r{n}") for n in range(3)] == ["", "", "infeasible"]


def test_a_time_to_first_token_leaves_room_for_the_prompt_to_be_read() -> None:
    core = Core(max_concurrency=1, max_queue_size=100, ttft_slo_s=30.0)
    for n in range(40):  # a prompt of 1,000 tokens takes 10 s to read
        core.submit(f"w{n}", prompt_tokens=1000)
        core.at(core.now_s + 10.0).tokens(f"w{n}")
        core.finish(f"w{n}")
    core.submit("runs", prompt_tokens=1000)
    core.submit("waits", prompt_tokens=1000)
    assert core.scheduler.next_deadline_s() == pytest.approx(core.now_s + 15.0, abs=0.5), "and half as much again"
    core.at(core.now_s + 16.0)
    assert [type(e) for e in core.ends("waits")] == [ev.Expired], "its first token would come too late"


# --- pause ----------------------------------------------------------------------------------------------------------


def test_a_pause_refuses_new_requests_and_serves_those_who_are_there() -> None:
    core = Core(max_concurrency=1, max_queue_size=5)
    core.submit("a", "b")
    core.pause()
    with pytest.raises(Paused) as refusal:
        core.submit("c")
    assert (refusal.value.code, refusal.value.http_status) == ("paused", 503)
    core.finish("a")
    assert core.running == ["b"]
    core.pause()
    core.unpause()
    core.unpause()
    assert core.try_submit("d") == ""
    assert [type(e) for e in core.log if isinstance(e, ev.Paused | ev.Unpaused)] == [ev.Paused, ev.Unpaused]


def test_every_refusal_costs_nothing() -> None:
    core = Core(max_concurrency=1, max_queue_size=1, max_waiting_per_client=1)
    core.submit("a", "b", client="a")
    before = core.scheduler.requests(core.now_s)
    for details, error in (({"client": "a"}, ClientLimit), ({"client": "b"}, QueueFull)):
        with pytest.raises(error):
            core.submit(f"c of {details['client']}", **details)
    assert core.scheduler.requests(core.now_s) == before
    assert core.scheduler.stats().rejected == 2
    assert not core.scheduler.is_live("c of a")
