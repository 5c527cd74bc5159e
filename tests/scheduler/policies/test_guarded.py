"""A policy from outside the package that fails is replaced by first come, first served."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeAlias

import pytest

from chatstream.scheduler import (
    QUEUES,
    Arrival,
    FifoQueue,
    LiveRequest,
    Outcome,
    Scheduler,
    SchedulerSettings,
    WaitingQueue,
)
from chatstream.scheduler import events as ev
from chatstream.scheduler.policies import PriorityQueue, SpfQueue
from tests.scheduler.builders import Core

ReplaceQueue: TypeAlias = Callable[[Core, str, WaitingQueue], None]
METHODS = ["push", "unhold", "take", "successor", "start", "withdraw", "charge", "end_run", "position", "__iter__"]


class Broken(PriorityQueue):
    """Raises from the `nth` call of `method` on."""

    def __init__(self, method: str, nth: int) -> None:
        super().__init__(ageing_s=60.0)
        self.calls = 0
        original = getattr(super(), method)

        def call(*args: Any, **details: Any) -> Any:
            self.calls += 1
            if self.calls >= nth:
                raise RuntimeError("a bug")
            return original(*args, **details)

        if method == "__iter__":
            self.iterate = call
        else:
            setattr(self, method, call)

    def __iter__(self) -> Any:
        return getattr(self, "iterate", super().__iter__)()


@pytest.fixture
def replace_queue(monkeypatch: pytest.MonkeyPatch) -> ReplaceQueue:
    """Function that registers `queue` as a policy and selects it."""

    def replace(core: Core, name: str, queue: WaitingQueue) -> None:
        monkeypatch.setitem(QUEUES, name, lambda settings: queue)
        core.set_policy(name)

    return replace


def failures_of(core: Core) -> list[ev.PolicyChanged]:
    return [e for e in core.log if isinstance(e, ev.PolicyChanged) and e.by == "scheduler"]


@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("method", METHODS)
def test_when_any_method_fails_every_request_is_served_and_one_event_reports_it(
    method: str, nth: int, replace_queue: ReplaceQueue
) -> None:
    core = Core(max_concurrency=1, max_queue_size=20, policy="priority", slice_tokens=2, can_preempt=True)
    core.submit("a", "b", "c1", "c2", conversation=None)
    core.submit("k1", "k2", "k3", conversation="k")
    replace_queue(core, "broken", Broken(method, nth))
    core.submit("late", priority=3)
    core.at(5.0)
    for _ in range(60):
        if not core.running:
            break
        first = core.running[0]
        core.at(core.now_s + 1.0).tokens(first)
        core.tokens(first)
        for request_id in core.asked_to_preempt():
            core.preempt(request_id)
        if core.waiting:
            core.position(core.waiting[-1])
        if core.history.tokens.get(core.running[0], 0) >= 3:
            core.finish(core.running[0])
        if core.scheduler.is_live("c2") and "c2" not in core.grants:
            core.cancel("c2")
    core.history.check_complete()
    assert [(e.policy, e.by, e.why) for e in failures_of(core)] == [
        ("fcfs", "scheduler", "broken failed: RuntimeError('a bug')")
    ]
    assert core.scheduler.stats().policy == "fcfs"


def test_a_held_request_that_a_policy_returns_does_not_start(replace_queue: ReplaceQueue) -> None:
    class Unfair(PriorityQueue):
        def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
            return next(iter(self), None)  # returns held requests too, and does not remove them

    core = Core(max_concurrency=2, max_queue_size=20, policy="priority")
    core.submit("k1", "k2", conversation="k")
    replace_queue(core, "unfair", Unfair(60.0))
    core.submit("other")
    assert core.running == ["k1", "other"]
    [failure] = failures_of(core)
    assert "it returned k2, which is not eligible" in failure.why


@pytest.mark.parametrize("can_run_more", [True, False])
def test_a_policy_that_returns_no_request_although_one_is_eligible_is_replaced(
    can_run_more: bool, replace_queue: ReplaceQueue
) -> None:
    class Lazy(PriorityQueue):
        def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
            return None

    core = Core(
        max_concurrency=1,
        max_queue_size=20,
        policy="priority",
        can_preempt=True,
        slice_tokens=1,
        max_resident=3 if can_run_more else 2,
    )
    core.submit("a", "b", "c")
    core.at(1.0).tokens("a")
    core.preempt("a")
    assert core.running == ["b"]
    replace_queue(core, "lazy", Lazy(60.0))
    core.submit("late")
    core.finish("b")
    [failure] = failures_of(core)
    assert "take returned no request although one is eligible" in failure.why
    assert core.running == ["a"]


def test_a_withdrawn_held_request_no_longer_counts_as_held(replace_queue: ReplaceQueue) -> None:
    class Lazy(PriorityQueue):
        is_lazy = False

        def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
            return None if self.is_lazy else super().take(may_start_new=may_start_new)

    lazy = Lazy(60.0)
    core = Core(max_concurrency=1, max_queue_size=20, policy="priority")
    replace_queue(core, "lazy", lazy)
    core.submit("k1", "k2", conversation="k")
    core.cancel("k2")
    core.submit("waits")
    lazy.is_lazy = True
    core.finish("k1")
    assert core.running == ["waits"]


def test_no_request_starts_while_draining_even_if_a_policy_returns_one() -> None:
    class Eager(PriorityQueue):
        def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
            return super().take()

    scheduler = Scheduler(SchedulerSettings(max_concurrency=1), queue=Eager(60.0))
    scheduler.open(0.0)
    for request_id in ("runs", "a", "b"):
        scheduler.submit(Arrival(request_id=request_id), 0.0)
    [grant] = [e.grant for e in scheduler.take_events() if isinstance(e, ev.Started)]
    scheduler.drain(0.0, at_most=1)
    scheduler.on_ended(grant, Outcome.FINISHED, "stop", 1.0)
    assert not [e for e in scheduler.take_events() if isinstance(e, ev.Started)]
    assert scheduler.stats().waiting == 1


def test_a_policy_that_fails_while_it_is_replaced_is_not_reported(replace_queue: ReplaceQueue) -> None:
    class Broken(PriorityQueue):
        def __iter__(self) -> Any:
            raise RuntimeError("a bug")

    core = Core(max_concurrency=1, max_queue_size=9, policy="priority")
    core.submit("runs", "low", priority=-1)
    core.submit("high", priority=1)
    replace_queue(core, "broken", Broken(60.0))
    core.set_policy("priority")
    assert core.scheduler.stats().policy == "priority"
    assert [e.policy for e in core.log if isinstance(e, ev.PolicyChanged)] == ["broken", "priority"]
    core.set_policy("fcfs")
    core.finish("runs")
    assert core.running == ["low"]


def test_a_policy_may_return_no_request_while_all_are_held() -> None:
    core = Core(max_concurrency=2, max_queue_size=20, policy="priority")
    core.submit("k1", "k2", "k3", conversation="k")
    assert core.running == ["k1"]
    assert core.scheduler.stats().policy == "priority"


def test_a_subclass_of_a_built_in_policy_is_guarded() -> None:
    class Broken(FifoQueue):
        def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
            raise RuntimeError("a bug")

    scheduler = Scheduler(SchedulerSettings(max_concurrency=1), queue=Broken())
    scheduler.open(0.0)
    scheduler.submit(Arrival(request_id="a"), 0.0)
    assert scheduler.stats().running == 1
    [failure] = [e for e in scheduler.take_events() if isinstance(e, ev.PolicyChanged)]
    assert (failure.policy, failure.why) == ("fcfs", "fcfs failed: RuntimeError('a bug')")


def test_a_built_in_policy_with_a_predictor_from_outside_is_guarded(monkeypatch: pytest.MonkeyPatch) -> None:
    class Broken:
        def predict(self, arrival: Arrival) -> float:
            raise RuntimeError("a bug")

        def observe(self, arrival: Arrival, generated_tokens: int) -> None:
            pass

    monkeypatch.setitem(QUEUES, "spf", lambda settings: SpfQueue(settings.spf_ageing_s_per_token, Broken()))
    core = Core(policy="spf", max_concurrency=1)
    core.submit("a")
    assert core.running == ["a"]
    [failure] = failures_of(core)
    assert (failure.policy, failure.why) == ("fcfs", "spf failed: RuntimeError('a bug')")


@pytest.mark.parametrize("policy", QUEUES)
def test_a_policy_of_the_package_is_not_guarded(policy: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **details: object) -> None:
        raise RuntimeError("a bug")

    core = Core(max_concurrency=1)
    core.set_policy(policy)
    monkeypatch.setattr(type(QUEUES[policy](core.settings)), "take", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        core.submit("a")
