"""Admission: the checks on arrival, before any costly work is done."""

from __future__ import annotations

import pytest

from chatstream.errors import ClientLimit, Infeasible, Paused, QueueFull
from chatstream.scheduler import Outcome, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.scheduler.admission import QueueBound
from tests.scheduler.builders import Core


def warm_up(core: Core, *, service_s: float, completions: int = 40) -> Core:
    """Run enough generations of the same length that ETAs have a basis."""
    for n in range(completions):
        core.submit(f"warm-up {n}")
        for _ in range(20):
            core.at(core.now_s + service_s / 20).tokens(f"warm-up {n}")
        core.finish(f"warm-up {n}")
    return core


# --- clients --------------------------------------------------------------------------------------------------------


def test_a_client_at_its_waiting_limit_is_rejected_and_others_are_served() -> None:
    core = Core(max_concurrency=1, max_queue_size=10, max_waiting_per_client=2)
    codes = [core.try_submit(f"a{n}", client="a") for n in range(5)]
    assert codes == ["", "", "", "client_limit", "client_limit"]  # one runs, two wait
    assert core.try_submit("b", client="b") == ""


def test_a_client_without_waiting_requests_allowed_may_use_free_slots() -> None:
    core = Core(max_concurrency=2, max_queue_size=10, max_waiting_per_client=0)
    assert [core.try_submit(f"a{n}", client="a") for n in range(3)] == ["", "", "client_limit"]


def test_before_opening_requests_that_will_start_do_not_count_as_waiting() -> None:
    """While the model loads, as many requests are admitted as afterwards; once there were fewer."""
    for is_open in (True, False):
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=10, max_waiting_per_client=1)
        codes = [core.try_submit(f"a{n}", client="a") for n in range(7)]
        assert codes == [""] * 5 + ["client_limit"] * 2
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=10, max_waiting_per_client=0)
        assert [core.try_submit(f"a{n}", client="a") for n in range(5)] == [""] * 4 + ["client_limit"]
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=10, max_waiting_tokens=300)
        assert [core.try_submit(f"a{n}", prompt_tokens=20) for n in range(6)] == [""] * 5 + ["queue_full"]


def test_before_opening_a_held_request_takes_no_slot() -> None:
    """Six requests of one conversation once filled four slots and the queue, although only one could start."""
    for is_open in (True, False):
        core = Core(is_open=is_open, max_concurrency=4, max_queue_size=1)
        codes = [core.try_submit(f"k{n}", conversation="k") for n in range(3)]
        assert [*codes, core.try_submit("b")] == ["", "", "queue_full", ""]
        core = Core(is_open=is_open, max_concurrency=4, max_running_per_client=1, max_waiting_per_client=1)
        codes = [core.try_submit(f"a{n}", client="a") for n in range(3)]
        assert [*codes, core.try_submit("b", client="b")] == ["", "", "client_limit", ""]


def test_before_opening_a_cancelled_held_request_takes_no_slot() -> None:
    core = Core(is_open=False, max_concurrency=1, max_queue_size=1)
    core.submit("k0", "k1", conversation="k")
    core.cancel("k1")
    assert core.try_submit("a") == ""
    assert core.try_submit("b") == "queue_full"
    core.cancel("k0")
    assert core.try_submit("k2", conversation="k") == ""
    assert core.try_submit("c") == "queue_full"


def test_a_rejection_at_a_deadline_leaves_no_slot_idle() -> None:
    core = Core(max_concurrency=1, abort_timeout_s=30.0)
    core.submit("a", "b")
    core.cancel("a")
    core.pause()
    core.now_s = 30.0  # handle_timer has not been called yet
    assert core.try_submit("c") == "paused"
    assert core.running == ["b"]


def test_before_opening_a_held_request_counts_as_waiting() -> None:
    core = Core(is_open=False, max_concurrency=4, max_queue_size=10, max_waiting_per_client=0)
    assert [core.try_submit(f"k{n}", conversation="k") for n in range(2)] == ["", "client_limit"]


def test_requests_behind_a_client_at_its_running_limit_start_first() -> None:
    core = Core(max_concurrency=3, max_queue_size=10, max_running_per_client=1)
    core.submit("a1", "a2", "a3", client="a")
    core.submit("b1", client="b")
    assert core.running == ["a1", "b1"]
    assert core.waiting == ["a2", "a3"]
    core.finish("a1")
    assert core.running == ["a2", "b1"]


def test_the_earliest_request_of_a_client_becomes_eligible_first_also_with_conversations() -> None:
    core = Core(max_concurrency=3, max_queue_size=10, max_running_per_client=1)
    core.submit("a1", client="a", conversation="one")
    core.submit("a2", client="a", conversation="one")
    core.submit("a3", client="a", conversation="two")
    core.finish("a1")
    assert core.running == ["a2"]
    core.finish("a2")
    assert core.running == ["a3"]


def test_a_cancelled_waiting_request_makes_room_for_the_next_of_its_client() -> None:
    core = Core(max_concurrency=1, max_queue_size=10, max_waiting_per_client=1, max_running_per_client=1)
    core.submit("a1", "a2", client="a")
    core.cancel("a2")
    assert core.try_submit("a3", client="a") == ""
    core.finish("a1")
    core.finish("a3")
    assert core.scheduler.next_deadline_s() is None
    assert not any(core.scheduler.records().values())


# --- queue size -----------------------------------------------------------------------------------------------------


def test_the_queue_is_bounded_by_tokens_too() -> None:
    core = Core(max_concurrency=1, max_queue_size=100, max_waiting_tokens=1000)
    details = {"prompt_tokens": 300, "max_new_tokens": 100}
    codes = [core.try_submit(f"r{n}", **details) for n in range(5)]
    assert codes == ["", "", "", "queue_full", "queue_full"]  # the first runs and does not count
    assert core.try_submit("small", prompt_tokens=50, max_new_tokens=50) == ""
    core.cancel("r1")
    assert core.try_submit("r5", **details) == ""


def test_an_answer_without_a_limit_counts_with_the_mean_length() -> None:
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
def test_priority_does_not_change_the_queue_size(policy: str) -> None:
    for priority in (-10, 0, 10):
        core = Core(max_concurrency=1, max_queue_size=10, policy=policy)
        core.submit("runs")
        assert [core.try_submit(f"r{n}", priority=priority) for n in range(12)].count("") == 10


def test_an_automatic_bound_follows_littles_law() -> None:
    bound = QueueBound(SchedulerSettings(max_queue_size="auto", ttft_slo_s=60.0))
    assert bound.adapt(10.0, 4)
    assert bound.value == 24
    assert not bound.adapt(8.5, 4), "a small change is ignored"
    assert bound.adapt(5.0, 4)
    assert bound.value == 48
    assert bound.adapt(100.0, 1)
    assert bound.value == 8
    assert bound.adapt(0.0001, 64)
    assert bound.value == 4096


def test_switching_to_an_automatic_bound_keeps_it_within_its_range() -> None:
    """After a bound of 0 no request could wait, so the bound was never adapted."""
    for before, value in ((0, 8), (100_000, 4096), (20, 20)):
        bound = QueueBound(SchedulerSettings(max_queue_size=before))
        bound.set("auto")
        assert bound.value == value


def test_an_automatic_bound_is_reported_and_exact() -> None:
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
    assert core.scheduler.stats().max_queue_size == 20, "2 x 20 s / 2 s: the last service time was 0"


def test_early_cancellations_do_not_raise_the_automatic_bound() -> None:
    """60 requests that were cancelled after 20 ms each once raised the bound to 1,500."""
    core = Core(max_concurrency=1, max_queue_size="auto", max_wait_s=30.0, admit_probability=0.0)
    core.submit("a")
    core.at(5.0).finish("a")
    assert core.scheduler.stats().max_queue_size == 8
    for n in range(60):
        core.submit(f"r{n}")
        core.cancel(f"r{n}")
        core.at(core.now_s + 0.02).end(core.grants[f"r{n}"], Outcome.CANCELLED, "client")
    assert core.scheduler.stats().max_queue_size == 8


# --- feasibility ----------------------------------------------------------------------------------------------------


def test_a_request_that_would_start_too_late_is_rejected_with_retry_after() -> None:
    core = warm_up(Core(max_concurrency=1, max_queue_size=100, max_wait_s=35.0), service_s=10.0)
    codes = [core.try_submit(f"r{n}") for n in range(8)]
    # One runs; the others start after 10, 20, 30 and 40 seconds.
    assert codes == ["", "", "", "", "infeasible", "infeasible", "infeasible", "infeasible"]
    with pytest.raises(Infeasible) as refusal:
        core.submit("late")
    assert refusal.value.http_status == 429
    assert refusal.value.retry_after_s == pytest.approx(40.0, rel=0.1)
    waiting = [view for view in core.scheduler.requests(core.now_s) if view.position is not None]
    assert len(waiting) == 3, "no rejected request is in the queue"
    assert core.scheduler.records()["waiting_tokens"] == sum(view.waiting_tokens for view in waiting)


def test_a_rejected_request_does_not_make_a_held_one_eligible() -> None:
    """Both requests once had the same `seq`, which made the second request of the conversation eligible."""
    core = warm_up(Core(max_concurrency=1, max_queue_size=100), service_s=10.0)
    core.submit("k1", conversation="k")
    assert core.try_submit("impatient", max_wait_s=1.0) == "infeasible"
    core.submit("k2", conversation="k")
    core.limits(max_concurrency=4)
    assert core.running == ["k1"]


def test_retry_after_follows_the_progress_of_the_running_requests() -> None:
    """It was once the same 20 seconds until a running request ended."""
    core = warm_up(Core(max_concurrency=1, max_queue_size=1), service_s=10.0)
    core.submit("runs", "waits")
    assert core.scheduler.retry_after_s(core.now_s) == pytest.approx(20.0, abs=1.0)
    for _ in range(16):
        core.at(core.now_s + 0.5).tokens("runs")
    assert core.scheduler.retry_after_s(core.now_s) == pytest.approx(12.0, abs=1.0)


def test_a_certain_start_in_time_satisfies_any_admit_probability() -> None:
    core = warm_up(Core(max_concurrency=1, max_queue_size=9, max_wait_s=1000.0, admit_probability=1.0), service_s=10.0)
    assert [core.try_submit(f"r{n}") for n in range(3)] == [""] * 3


def test_a_request_with_a_shorter_maximum_wait_is_rejected_earlier() -> None:
    core = warm_up(Core(max_concurrency=1, max_queue_size=100), service_s=10.0)
    core.submit("runs", "waits")
    assert core.try_submit("patient", max_wait_s=30.0) == ""
    assert core.try_submit("impatient", max_wait_s=15.0) == "infeasible"
    assert core.try_submit("has no limit") == ""


def test_no_request_is_infeasible_without_a_basis_or_if_disabled_or_with_a_free_slot() -> None:
    fresh = Core(max_concurrency=1, max_queue_size=100, max_wait_s=5.0)
    assert [fresh.try_submit(f"r{n}") for n in range(5)] == [""] * 5
    by_choice = warm_up(
        Core(max_concurrency=1, max_queue_size=100, max_wait_s=5.0, admit_probability=0.0), service_s=10
    )
    assert [by_choice.try_submit(f"r{n}") for n in range(5)] == [""] * 5
    free = warm_up(Core(max_concurrency=2, max_queue_size=100, max_wait_s=0.001), service_s=10.0)
    assert [free.try_submit(f"r{n}") for n in range(3)] == ["", "", "infeasible"]


def test_the_ttft_objective_leaves_time_for_the_prefill() -> None:
    core = Core(max_concurrency=1, max_queue_size=100, ttft_slo_s=30.0)
    for n in range(40):  # a prefill of 1,000 tokens takes 10 s
        core.submit(f"w{n}", prompt_tokens=1000)
        core.at(core.now_s + 10.0).tokens(f"w{n}")
        core.finish(f"w{n}")
    core.submit("runs", prompt_tokens=1000)
    core.submit("waits", prompt_tokens=1000)
    assert core.scheduler.next_deadline_s() == pytest.approx(core.now_s + 15.0, abs=0.5), "30 s - 1.5 x 10 s"
    core.at(core.now_s + 16.0)
    assert [type(e) for e in core.ends("waits")] == [ev.Expired], "its first token would come too late"


# --- pause ----------------------------------------------------------------------------------------------------------


def test_a_pause_rejects_new_requests_and_serves_admitted_ones() -> None:
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


def test_a_rejection_changes_nothing_for_other_requests() -> None:
    core = Core(max_concurrency=1, max_queue_size=1, max_waiting_per_client=1)
    core.submit("a", "b", client="a")
    before = core.scheduler.requests(core.now_s)
    for details, error in (({"client": "a"}, ClientLimit), ({"client": "b"}, QueueFull)):
        with pytest.raises(error):
            core.submit(f"c of {details['client']}", **details)
    assert core.scheduler.requests(core.now_s) == before
    assert core.scheduler.stats().rejected == 2
    assert not core.scheduler.is_live("c of a")
