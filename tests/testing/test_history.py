"""`History` accepts the log of a correct scheduler, and names the promise that another log breaks."""

from __future__ import annotations

import pytest

from chatstream.scheduler import Grant
from chatstream.scheduler import events as ev
from chatstream.testing import History, InvalidHistory
from tests.scheduler.builders import Core


def numbered(*events: ev.Event) -> list[ev.Event]:
    """The events with the numbers and times of a log."""
    return [event._replace(number=n, at_s=float(n)) for n, event in enumerate(events)]  # type: ignore[misc]


OPENED = ev.Opened(0, 0.0)


def received(request_id: str, conversation: str | None = None) -> ev.Event:
    return ev.Received(0, 0.0, request_id, "", conversation)


def admitted(request_id: str, seq: int, position: int = 1) -> ev.Event:
    return ev.Admitted(0, 0.0, request_id, seq, position)


def grant(request_id: str, slot: int = 0, attempt: int = 1, epoch: int = 1) -> Grant:
    return Grant(slot, request_id, attempt, epoch)


def started(request_id: str, **details: int) -> ev.Event:
    return ev.Started(0, 0.0, request_id, grant(request_id, **details), 0.0, None)


def finished(request_id: str, total: int = 0) -> ev.Event:
    return ev.Finished(0, 0.0, request_id, "stop", total)


A_RUNS = (OPENED, received("a"), admitted("a", 0), started("a"))
B_WAITS = (*A_RUNS, received("b"), admitted("b", 1))


@pytest.mark.parametrize(
    ("promise", "log"),
    [
        ("a request arrives once", (OPENED, received("a"), received("a"))),
        ("only a received request is admitted", (OPENED, admitted("a", 0))),
        ("only a received request is rejected", (OPENED, ev.Rejected(0, 0.0, "a", "queue_full", 1.0))),
        ("seq grows with every admission", (*A_RUNS, received("b"), admitted("b", 0))),
        ("a new request is the last one", (*A_RUNS, received("b"), admitted("b", 1, position=2))),
        ("no request is admitted beyond the limits", (*B_WAITS, received("c"), admitted("c", 2, position=2))),
        ("no request starts before the opening", (received("a"), admitted("a", 0), started("a"))),
        ("only a waiting request starts", (OPENED, started("a"))),
        ("at most max_concurrency requests run", (*B_WAITS, started("b", slot=1))),
        ("before an earlier eligible one", (*B_WAITS, ev.LimitsChanged(0, 0.0, 1, 2, "", ""), received("c"),
                                            admitted("c", 2, position=2), finished("a"), started("c", epoch=2))),
        ("each grant of a slot has a new epoch", (*B_WAITS, finished("a"), started("b", epoch=1))),
        ("used by one request at a time", (*B_WAITS, ev.LimitsChanged(0, 0.0, 2, 2, "", ""), started("b", epoch=2))),
        ("attempt is the number of starts", (OPENED, received("a"), admitted("a", 0), started("a", attempt=2))),
        ("only a running request has this event", (*B_WAITS, ev.Tokens(0, 0.0, "b", 1, 1))),
        ("total is the sum of num_tokens", (*A_RUNS, ev.Tokens(0, 0.0, "a", 1, 2))),
        ("a request with tokens is not requeued", (*A_RUNS, ev.Tokens(0, 0.0, "a", 1, 1),
                                                   ev.Requeued(0, 0.0, "a", grant("a")))),
        ("the grant is the current one", (*A_RUNS, ev.Requeued(0, 0.0, "a", grant("a", slot=1)))),
        ("a request is aborted once", (*A_RUNS, *[ev.AbortRequested(0, 0.0, "a", grant("a"), "client")] * 2)),
        ("an aborted request ends as cancelled", (*A_RUNS, ev.AbortRequested(0, 0.0, "a", grant("a"), "client"),
                                                  finished("a"))),
        ("only a live request ends, and once", (*A_RUNS, finished("a"), finished("a"))),
        ("only a request that waits to start expires", (*A_RUNS, ev.Expired(0, 0.0, "a", 1.0))),
        ("only a running or preempted request finishes or fails", (*B_WAITS, finished("b"))),
        ("the grant is the current one", (*A_RUNS, ev.SlotReclaimed(0, 0.0, "a", grant("a", epoch=2), "no progress"))),
        ("a draining scheduler admits no request", (*A_RUNS, ev.DrainStarted(0, 0.0), received("b"), admitted("b", 1))),
    ],
)  # fmt: skip
def test_an_impossible_log_raises_with_the_promise_that_it_breaks(promise: str, log: tuple[ev.Event, ...]) -> None:
    history = History(max_concurrency=1, max_queue_size=1)
    *before, last = numbered(*log)
    history.feed(before)
    with pytest.raises(InvalidHistory, match=promise):
        history.feed([last])


def test_a_conversation_runs_one_request_at_a_time() -> None:
    history = History(max_concurrency=2, max_queue_size=1)
    log = (OPENED, received("a1", "a"), admitted("a1", 0), started("a1"), received("a2", "a"), admitted("a2", 1))
    history.feed(numbered(*log))
    with pytest.raises(InvalidHistory, match="a held request does not start"):
        history.feed(numbered(*log, started("a2", slot=1))[-1:])


@pytest.mark.parametrize("broken", [{"number": 7}, {"at_s": -1.0}])
def test_event_numbers_have_no_gap_and_time_does_not_run_backwards(broken: dict[str, float]) -> None:
    history = History(max_concurrency=1, max_queue_size=1)
    history.feed(numbered(*A_RUNS))
    event = finished("a")._replace(number=4, at_s=4.0)._replace(**broken)  # type: ignore[union-attr,arg-type]
    with pytest.raises(InvalidHistory):
        history.feed([event])


def test_a_log_with_a_live_request_is_not_complete() -> None:
    history = History(max_concurrency=1, max_queue_size=1)
    history.feed(numbered(*B_WAITS))
    with pytest.raises(InvalidHistory, match=r"\['b', 'a'\]"):
        history.check_complete()


def test_check_complete_raises_the_first_failure_again() -> None:
    history = History(max_concurrency=1, max_queue_size=1)
    *before, last = numbered(*A_RUNS, received("b"), admitted("b", 1, position=7))
    history.feed(before)
    with pytest.raises(InvalidHistory, match="a new request is the last one"):
        history.feed([last])
    with pytest.raises(InvalidHistory, match="a new request is the last one"):
        history.check_complete()


def test_the_log_of_a_scheduler_is_accepted_and_summarised() -> None:
    core = Core(max_concurrency=1, max_queue_size=1)
    core.submit("a", "b")
    assert core.try_submit("c") == "queue_full"
    core.tokens("a", 3)
    core.finish("a", "b")
    core.history.check_complete()
    assert core.history.tokens == {"a": 3}
    assert core.history.rejected == {"c"}
    assert (core.history.peak_running, core.history.peak_waiting) == (1, 1)


def test_tokens_after_preemption_or_abort_are_accepted_until_the_request_ends() -> None:
    preempted = (*A_RUNS, ev.PreemptRequested(0, 0.0, "a", grant("a"), "slice"), ev.Preempted(0, 0.0, "a", grant("a")))
    history = History(max_concurrency=1, max_queue_size=1)
    log = (
        *preempted,
        ev.Tokens(0, 0.0, "a", 1, 1),
        ev.AbortRequested(0, 0.0, "a", grant("a"), "client"),
        ev.Tokens(0, 0.0, "a", 1, 2),
        ev.Cancelled(0, 0.0, "a", "client", 2),
    )
    history.feed(numbered(*log))
    history.check_complete()
    with pytest.raises(InvalidHistory, match="only a running request"):
        history.feed(numbered(*log, ev.Tokens(0, 0.0, "a", 1, 3))[-1:])


def test_a_requeued_request_starts_before_a_held_one_of_its_client() -> None:
    """`b` arrived before `c` but is held, as its client may run one request. `History` once called `b` passed."""
    core = Core(max_concurrency=3, max_queue_size=9, max_running_per_client=1)
    core.submit("a", client="ann", conversation="k")
    core.submit("b", client="bob", conversation="k")
    core.submit("c", client="bob")
    core.finish("a")
    assert core.requeue("c")
    assert (core.running, core.waiting) == (["c"], ["b"])
