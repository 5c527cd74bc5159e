"""Changes by an operator at run time: effective at once, no request is lost, and the event has `by` and `why`."""

from __future__ import annotations

import pytest

from chatstream.errors import ConfigError
from chatstream.scheduler import QUEUES
from chatstream.scheduler import events as ev
from tests.scheduler.builders import Core


def test_a_new_policy_reorders_the_waiting_requests() -> None:
    core = Core(max_concurrency=1, max_queue_size=10)
    core.submit("runs", "first")
    core.submit("urgent", priority=5)
    core.set_policy("priority")
    assert core.waiting == ["urgent", "first"]
    assert not core.scheduler.is_exact
    core.set_policy("fcfs")
    assert core.waiting == ["first", "urgent"]
    assert core.scheduler.is_exact
    changes = [e for e in core.log if isinstance(e, ev.PolicyChanged)]
    assert [(e.policy, e.by, e.why) for e in changes] == [("priority", "admin", "test"), ("fcfs", "admin", "test")]
    assert core.scheduler.stats().policy == "fcfs"


@pytest.mark.parametrize("policy", QUEUES)
def test_a_change_of_policy_loses_no_request_and_keeps_eligibility(policy: str) -> None:
    core = Core(max_concurrency=2, max_queue_size=20, max_running_per_client=1, slice_tokens=5, can_preempt=True)
    core.submit("c1", "c2", conversation="c", client="c")
    core.submit("d1", "d2", "d3", client="d")
    core.submit("e1", client="e")
    core.at(5.0).tokens("c1", 5)
    core.preempt("c1")
    before = (set(core.running), set(core.waiting))
    core.set_policy(policy)
    assert (set(core.running), set(core.waiting)) == before
    while core.running:
        core.finish(core.running[0])
    assert core.waiting == []
    core.history.check_complete()
    order = [e.request_id for e in core.log if isinstance(e, ev.Started)]
    assert order.index("c1") < order.index("c2")
    assert order.index("d1") < order.index("d2") < order.index("d3")


def test_an_unknown_policy_changes_nothing() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    with pytest.raises(ConfigError, match="fcfs"):
        core.set_policy("lifo")
    assert core.waiting == ["b"]
    assert core.scheduler.stats().policy == "fcfs"


def test_a_change_of_limits_records_the_operator_and_the_reason() -> None:
    core = Core(max_concurrency=1, max_queue_size=5)
    core.limits(max_concurrency=3, by="admin", why="quiet night")
    [change] = [e for e in core.log if isinstance(e, ev.LimitsChanged)]
    assert (change.max_concurrency, change.max_queue_size, change.by, change.why) == (3, 5, "admin", "quiet night")


def test_an_invalid_limit_changes_neither_limit() -> None:
    core = Core(max_concurrency=1, max_queue_size=5)
    for wrong in ({"max_concurrency": 0, "max_queue_size": 9}, {"max_concurrency": 9, "max_queue_size": -1}):
        with pytest.raises(ConfigError):
            core.limits(**wrong)
    stats = core.scheduler.stats()
    assert (stats.max_concurrency, stats.max_queue_size) == (1, 5)


def test_repr_shows_the_phase_and_the_policy() -> None:
    core = Core(max_concurrency=1, max_queue_size=5, is_open=False)
    assert repr(core.scheduler) == "<Scheduler running=0/1 waiting=0/5 fcfs closed>"
    core.open()
    core.submit("a", "b")
    core.pause()
    core.set_policy("fair")
    assert repr(core.scheduler) == "<Scheduler running=1/1 waiting=1/5 fair paused>"
    core.drain()
    assert repr(core.scheduler) == "<Scheduler running=1/1 waiting=0/5 fair draining paused>"


# --- ETA ------------------------------------------------------------------------------------------------------------


def serve_equal_requests(core: Core, num: int, tokens: int = 20, gap_s: float = 0.5) -> None:
    for n in range(num):
        core.submit(f"past {n}")
        for _ in range(tokens):
            core.at(core.now_s + gap_s).tokens(f"past {n}")
        core.finish(f"past {n}")


def test_there_is_no_eta_without_a_basis() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    assert core.scheduler.eta("b", core.now_s) is None
    assert core.scheduler.requests(core.now_s)[1].eta is None


def test_waiting_requests_have_an_eta_and_its_error_is_measured() -> None:
    core = Core(max_concurrency=1)
    serve_equal_requests(core, 40)
    core.submit("a", "b", "c")
    for name, expected_s in (("b", 10.0), ("c", 20.0)):
        eta = core.scheduler.eta(name, core.now_s)
        assert eta is not None
        assert eta.p50_s == pytest.approx(expected_s, rel=0.1)
        assert eta.p50_s <= eta.p90_s
    assert core.scheduler.eta("a", core.now_s) is None, "it runs"
    assert core.scheduler.eta("unknown", core.now_s) is None
    for _ in range(20):
        core.at(core.now_s + 0.5).tokens("a")
    core.finish("a")
    started = [e for e in core.log if isinstance(e, ev.Started)][-1]
    assert started.request_id == "b"
    assert started.eta_error_s == pytest.approx(0.0, abs=1.0)
    assert core.scheduler.stats().eta.num_measured == 1


def test_a_held_request_has_no_eta() -> None:
    """A held request once had an ETA of 0 s, and its error widened the p90 of all other requests."""
    core = Core(max_concurrency=2, max_queue_size=10)
    serve_equal_requests(core, 40)
    core.submit("first", "second", conversation="one")
    assert core.scheduler.eta("second", core.now_s) is None
    assert [view.eta for view in core.scheduler.requests(core.now_s)] == [None, None]
    core.at(core.now_s + 5.0).finish("first")
    assert core.scheduler.stats().eta.num_measured == 0


def test_an_eta_is_measured_once() -> None:
    core = Core(max_concurrency=1, max_queue_size=10)
    serve_equal_requests(core, 40)
    core.submit("a", "b")
    assert core.scheduler.eta("b", core.now_s) is not None
    core.at(core.now_s + 10.0).finish("a")
    core.at(core.now_s + 50.0)
    assert core.requeue("b")
    started = [e for e in core.log if isinstance(e, ev.Started) and e.request_id == "b"]
    assert [e.eta_error_s is None for e in started] == [False, True]
    assert core.scheduler.stats().eta.num_measured == 1


def test_without_a_sent_eta_nothing_is_measured() -> None:
    core = Core(max_concurrency=1)
    core.submit("a", "b")
    core.at(10.0).finish("a")
    assert [e.eta_error_s for e in core.log if isinstance(e, ev.Started)] == [None, None]
    assert core.scheduler.stats().eta.num_measured == 0


def test_views_show_the_eta_of_every_waiting_request() -> None:
    core = Core(max_concurrency=1, max_queue_size=10)
    serve_equal_requests(core, 40)
    core.submit("a", "b", "c", "d")
    etas = [view.eta for view in core.scheduler.requests(core.now_s)]
    assert etas[0] is None
    waits = [eta.p50_s for eta in etas[1:] if eta is not None]
    assert waits == sorted(waits)
    assert len(waits) == 3


def test_a_drain_in_parts_cancels_unstarted_requests_and_reports_whether_more_are_left() -> None:
    core = Core(max_concurrency=1, max_queue_size=9, policy="priority")
    core.submit("runs", "a", "b", "c", "d")
    assert core.scheduler.drain(0.0, at_most=3)
    assert core.scheduler.stats().waiting == 1
    assert not core.scheduler.drain(0.0, at_most=3)
    assert (core.scheduler.stats().running, core.scheduler.stats().waiting) == (1, 0)
    assert len([e for e in core.scheduler.take_events() if isinstance(e, ev.DrainStarted)]) == 1
