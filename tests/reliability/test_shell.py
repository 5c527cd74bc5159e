"""The asyncio shell, from the bytes of an HTTP request to the engine, under everything that can go wrong.

Each seed is a world of its own: settings, clients, misfortunes, the order in which tasks run, how the network cuts and
delays what is sent. `scripts/nightly` runs thousands of them. A failing seed is shrunk and names the command that
repeats it.
"""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest

from chatstream.api import streaming
from chatstream.runtime import QueueWorker, RequestStream, worker
from chatstream.runtime.resumable import ResumableStreams
from chatstream.runtime.stream import EventLog
from chatstream.scheduler import Scheduler
from chatstream.scheduler.admission import Admission
from chatstream.scheduler.eligibility import KeyLimit
from chatstream.scheduler.slots import Slots
from chatstream.sessions import Conversations
from tests.reliability.faults import FAULT_POINTS
from tests.reliability.shrinking import FailingSeed, check_seed
from tests.reliability.world import World, faults_of, run_world

SEEDS = range(60)


@pytest.fixture(autouse=True)
def _without_a_log() -> Iterator[None]:
    """What goes wrong is logged, thousands of times."""
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@cache
def digest(seed: int) -> str:
    """Of a run that was checked; each seed runs once, whichever test asks first."""
    return check_seed(seed).digest()


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_goes_wrong_nothing_is_left_and_everybody_has_one_end(seed: int) -> None:
    assert digest(seed)


def test_the_same_seeds_give_the_same_runs_in_another_process() -> None:
    """With another order of hashes and other addresses. Here half of the seeds; scripts/nightly runs all twice."""
    seeds = SEEDS[::2]
    program = (
        "import logging; logging.disable(logging.CRITICAL)\n"
        "from tests.reliability.world import run_world\n"
        f"for seed in {seeds}: print(run_world(seed).digest())"
    )
    hash_seed = "1" if os.environ.get("PYTHONHASHSEED") != "1" else "2"
    output = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONHASHSEED": hash_seed},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert output.split() == [digest(seed) for seed in seeds]


def test_different_seeds_give_different_runs() -> None:
    assert len({digest(seed) for seed in SEEDS}) == len(SEEDS)


NEEDS = {
    # These strike only when something else has: somebody is cancelled, or an attempt is over.
    "first token after cancel": ["disconnect at a write"],
    "finish during cancel": ["disconnect at a write"],
    "late callback": ["queue full at requeue"],
}
CONTAINED = ["observer raises", "callback raises"]


# --- every fault point is reached, and matters ----------------------------------------------------------------------


def test_there_are_many_fault_points_and_each_says_what_it_does() -> None:
    assert len(FAULT_POINTS) >= 24
    assert all(what and 0 < share <= 1 for what, share in FAULT_POINTS.values())
    drawn = Counter(name for seed in range(200) for name in faults_of(seed))
    assert set(drawn) == set(FAULT_POINTS)


@pytest.mark.parametrize("name", [name for name in FAULT_POINTS if name not in CONTAINED])
def test_each_fault_strikes_and_changes_what_happens(name: str) -> None:
    assert any(with_it.digest() != without.digest() for with_it, without in runs_with_and_without(name))


@pytest.mark.parametrize("name", CONTAINED)
def test_faults_that_must_change_nothing_change_nothing(name: str) -> None:
    """That they would, if nobody held them back, is shown by the sabotage "foreign code is not contained"."""
    assert any(True for _ in runs_with_and_without(name))
    assert all(with_it.digest() == without.digest() for with_it, without in runs_with_and_without(name))


def runs_with_and_without(name: str) -> Iterator[tuple[World, World]]:
    """Only those in which it struck. Lazily: a caller who has seen enough stops."""
    others = NEEDS.get(name, [])
    for seed in range(100, 130):
        with_it = run_world(seed, num_requests=6, faults=[name, *others])
        if with_it.faults.hits[name]:
            yield with_it, run_world(seed, num_requests=6, faults=others)


# --- the checks notice ----------------------------------------------------------------------------------------------


def _nothing(*args: object, **kwargs: object) -> None:
    return None


def _forget_cancelled_tasks(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, task, job: None if task.cancelled() else original(self, task, job)


def _wrap(patch: pytest.MonkeyPatch, owner: type, name: str, wrapper: Callable[[Any], Any]) -> None:
    patch.setattr(owner, name, wrapper(getattr(owner, name)))


SABOTAGES: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "a slot is not given back when its task was cancelled": lambda patch: _wrap(
        patch, QueueWorker, "_on_task_done", _forget_cancelled_tasks
    ),
    "foreign code is not contained": lambda patch: patch.setattr(
        worker, "_guarded", lambda function, argument: function(argument)
    ),
    "a reader that leaves is not noticed": lambda patch: patch.setattr(RequestStream, "close", _nothing),
    "nobody looks whether the client is still there": lambda patch: patch.setattr(
        streaming, "cancel_on_disconnect", _wait_for_ever
    ),
    "the timer is not set": lambda patch: patch.setattr(QueueWorker, "_arm", _nothing),
    "generations that hang are not noticed": lambda patch: patch.setattr(Scheduler, "_watch_stall", _nothing),
    "generations that do not let go keep their slot": lambda patch: patch.setattr(
        Scheduler, "_watch_release", _nothing
    ),
    "a late report is believed": lambda patch: patch.setattr(
        Scheduler, "_request_of", lambda self, grant: self._live.get(grant.request_id)
    ),
    "a slot is given back twice": lambda patch: patch.setattr(Slots, "is_current", lambda self, grant: True),
    "nobody starts when a slot is free": lambda patch: patch.setattr(
        Scheduler, "_settle", lambda self, now_s: self._fire_deadlines(now_s)
    ),
    "turns are not passed on": lambda patch: patch.setattr(KeyLimit, "end", _nothing),
    "the last one is first": lambda patch: patch.setattr(
        "chatstream.scheduler.policies.FifoQueue.key", lambda self, request: -request.seq
    ),
    "tokens overtake each other": lambda patch: patch.setattr(EventLog, "take", _newest_first),
    "the end is told again": lambda patch: patch.setattr(EventLog, "finish", _always_finish),
    "a resumed stream skips an event": lambda patch: _wrap(patch, ResumableStreams, "attach", _attach_one_later),
    "who does not come back is kept for ever": lambda patch: patch.setattr(ResumableStreams, "_arm", _nothing),
    "a turn of a conversation is left open": lambda patch: patch.setattr(Conversations, "end", _leave_open),
    "a lost engine starts again what was begun": lambda patch: patch.setattr(Scheduler, "requeue", _always_requeue),
    "a drain admits": lambda patch: patch.setattr(Scheduler, "_check_intake", _nothing),
    "the line is longer than allowed": lambda patch: patch.setattr(Admission, "check_room", _nothing),
}
"""Ways to break the shell and the core. If the checks are worth anything, each is found within a few seeds."""

FOUND_BY = {
    "a reader that leaves is not noticed": 224,
    "nobody looks whether the client is still there": 224,
    "the timer is not set": 242,
    "generations that do not let go keep their slot": 242,
    "tokens overtake each other": 267,
    "a resumed stream skips an event": 273,
}
"""The first seeds that showed what dozens before them had not. They only save time: without them it takes longer."""


async def _wait_for_ever(stream: RequestStream, receive: object, scope: object) -> None:
    await asyncio.get_running_loop().create_future()


def _newest_first(self: EventLog, reader: RequestStream) -> Any:
    if self.retention is None and len(self._events) > 2:
        self._events.rotate(1)
    return _take(self, reader)


_take = EventLog.take


def _always_finish(self: EventLog, end: Any) -> None:
    self.end = end
    self._append(end)


def _attach_one_later(original: Callable[..., Any]) -> Callable[..., Any]:
    return lambda self, request_id, event_id=0, **details: original(
        self, request_id, min(event_id + 1, self._find(request_id).log.last_id), **details
    )


async def _leave_open(self: Conversations, turn: object, conversation: object) -> None:
    return None


def _always_requeue(self: Scheduler, grant: Any, now_s: float) -> bool:
    request = self._holder(grant)
    if request is not None:
        request.attempt, request.generated_tokens = 0, 0
    return _requeue(self, grant, now_s)


_requeue = Scheduler.requeue


@pytest.mark.parametrize("what", SABOTAGES)
def test_a_server_that_is_broken_on_purpose_is_found_out(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    SABOTAGES[what](monkeypatch)
    for seed in (FOUND_BY.get(what, 200), *range(200, 600)):
        try:
            run_world(seed)
        except (Exception, asyncio.CancelledError):
            return
    pytest.fail(f"400 runs were fine although {what}")


def test_a_failing_seed_is_shrunk_and_says_how_to_repeat_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A bug that needs one request and one kind of fault is reported with nothing else."""

    def check(self: World) -> None:
        assert not self.faults.hits["step raises"], "a bug"

    candidates = [seed for seed in range(300, 360) if {"step raises", "slow reader"} <= faults_of(seed)]
    seed = next(seed for seed in candidates if run_world(seed).faults.hits["step raises"])
    monkeypatch.setattr(World, "_check_counts", check)
    with pytest.raises(FailingSeed, match=rf"--seed {seed} --requests \d+ --faults 'step raises'$"):
        check_seed(seed)
