"""Checks any policy against the contract in `chatstream.scheduler.policies.base`."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable
from random import Random
from types import FunctionType, ModuleType

from chatstream.scheduler import Arrival, LiveRequest, WaitingQueue
from chatstream.scheduler.states import Trigger

NUM_CALLS_TOLD = 10
"""An error tells of so many calls before it."""


def check_policy(
    make_queue: Callable[[], WaitingQueue], *, num_queues: int = 50, num_clients: int = 4000, seed: int = 0
) -> None:
    """Let requests come, start, be preempted, fail, come back and leave in random order, beside a plain list of them.

    `make_queue` makes an empty queue, a fresh one each time; the same `seed` makes the same steps. A policy may
    remember clients that have left, but only so many: when more than 1000, `num_clients` must be four times as many.
    Not checked: whether the order is a good one, and whether a method scans the line.
    Raises `AssertionError` saying which promise is broken, and after which calls.
    """
    rng = Random(seed)
    for _ in range(num_queues):
        _Crowd(make_queue(), rng, num_clients=4).come_and_go(30)
    _check_forgetting(make_queue(), rng, num_clients)


def _check_forgetting(queue: WaitingQueue, rng: Random, num_clients: int) -> None:
    crowd = _Crowd(queue, rng)
    crowd.come_and_go(num_clients)
    num_before = _num_objects(queue)
    crowd.come_and_go(num_clients)
    num_grown = _num_objects(queue) - num_before
    # Who keeps anything of those who ended keeps an object or more of each; a queue may also tidy up late.
    assert num_grown < num_clients / 4, (
        f"clients that came and went are forgotten: {num_clients} left {num_grown} objects behind"
    )


def _num_objects(root: object) -> int:
    """Objects that `root` keeps alive, without code."""
    seen: set[int] = set()
    found = [root]
    while found:
        one = found.pop()
        if id(one) not in seen and not isinstance(one, type | FunctionType | ModuleType):
            seen.add(id(one))
            found += gc.get_referents(one)
            if isinstance(one, dict):
                found += one  # CPython's collector passes over keys that are strings
    return len(seen)


class _Crowd:
    """Those who wait and run, as they should be. Does to them and to the queue what the scheduler does."""

    def __init__(self, queue: WaitingQueue, rng: Random, num_clients: int | None = None) -> None:
        """`num_clients`: None: each request is of another one."""
        self._queue = queue
        self._rng = rng
        self._num_clients = num_clients
        self._max_waiting = rng.randint(1, 20)
        self._waiting: list[LiveRequest] = []
        self._held: list[LiveRequest] = []
        self._running: list[LiveRequest] = []
        self._places: dict[LiveRequest, int] = {}
        self._num_returned = 0  # since the places were looked at
        self._num_arrived = 0
        self._now_s = 0.0
        self._calls: deque[str] = deque(maxlen=NUM_CALLS_TOLD)

    def come_and_go(self, num_requests: int) -> None:
        """So many arrive; returns when all have left."""
        for _ in range(2):  # the policy was chosen while they ran: the queue has never seen them
            self._waiting.append(stranger := self._newcomer())
            self._start(stranger)
        steps = {self._arrive: 4, self._unhold: 2, self._take: 4, self._preempt: 2}
        steps |= {self._charge: 6, self._end: 2, self._fail: 1, self._discard: 1}
        num_in_all = self._num_arrived + num_requests
        while self._num_arrived < num_in_all:
            self._do(*self._rng.choices([*steps], [*steps.values()]))
        self._do(self._let_all_go)

    def _do(self, step: Callable[[], None]) -> None:
        try:
            step()
            self._check_line()
        except Exception as error:
            promise = str(error) if isinstance(error, AssertionError) else f"no call raises: {error!r}"
            raise AssertionError(f"{promise}; after {', '.join(self._calls)}") from error

    def _check_line(self) -> None:
        line = list(self._queue)
        expected = sorted(self._waiting, key=lambda request: request.seq)
        assert sorted(line, key=lambda request: request.seq) == expected, (
            f"those in line are those who wait ({_names(expected)}): {_names(line)}"
        )
        assert len(self._queue) == len(line), f"len counts everybody in line, {len(line)}: {len(self._queue)}"
        places = {request: self._queue.position(request) for request in line}
        assert [*places.values()] == [*range(1, len(line) + 1)], (
            f"positions are 1, 2, 3 … in the order of iteration: {[*places.values()]}"
        )
        if self._queue.is_exact:  # only those who come back to the place that they had may be in front again
            grown = [one for one in line if places[one] > self._places.get(one, places[one]) + self._num_returned]
            assert not grown, f"an exact position never grows: of {_names(grown)}"
        self._places, self._num_returned = places, 0

    # --- steps ----------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        if len(self._waiting) < self._max_waiting:
            self._push(self._newcomer(), held=self._rng.random() < 0.3)

    def _unhold(self) -> None:
        if self._held:
            request = self._rng.choice(self._held)
            self._held.remove(request)
            self._calls.append(f"unhold({request.request_id})")
            self._queue.unhold(request)

    def _take(self) -> None:
        may_start_new = self._may_grow()
        self._calls.append(f"take(may_start_new={may_start_new})")
        request = self._queue.take(may_start_new=may_start_new)
        if request is not None:
            self._check_may_start(request, may_start_new)
            self._start(request)
        else:
            free = [one for one in self._waiting if one not in self._held and (may_start_new or one.is_preempted)]
            assert not free, f"take returns somebody when somebody may start: {_names(free)}"

    def _preempt(self) -> None:
        if not self._running:
            return
        running = self._rng.choice(self._running)
        self._successor(running)  # its slice is over
        if self._rng.random() < 0.4:
            return  # … but nobody has waited long enough
        running.move(Trigger.PREEMPT)
        successor = self._successor(running)  # its engine has preempted it
        running.move(Trigger.PREEMPTED)
        self._running.remove(running)
        self._push(running, held=False)
        if successor is not None:
            self._calls.append(f"start({successor.request_id})")
            self._queue.start(successor)
            self._start(successor)

    def _charge(self) -> None:
        if self._running:
            request = self._rng.choice(self._running)
            prompt_tokens, tokens = self._rng.randrange(200), 0
            if request.generated_tokens or self._rng.random() < 0.7:  # a prompt is read before the answer
                prompt_tokens, tokens = 0, self._rng.randrange(1, 50)
            request.generated_tokens += tokens
            request.slice_tokens += tokens
            self._calls.append(f"charge({request.request_id}, {prompt_tokens=}, {tokens=})")
            self._queue.charge(request, prompt_tokens=prompt_tokens, tokens=tokens)

    def _end(self) -> None:
        if self._running:
            request = self._rng.choice(self._running)
            self._running.remove(request)
            if self._rng.random() < 0.2:
                self._abort(request)
            self._end_run(request)
            request.move(Trigger.END)

    def _fail(self) -> None:
        """An engine fails before the first token."""
        if untouched := [request for request in self._running if not request.generated_tokens]:
            request = self._rng.choice(untouched)
            self._running.remove(request)
            request.move(Trigger.REQUEUE)
            self._end_run(request)
            self._push(request, held=False)

    def _discard(self) -> None:
        if self._waiting:
            request = self._rng.choice(self._waiting)
            self._waiting.remove(request)
            if request in self._held:
                self._held.remove(request)
            self._calls.append(f"withdraw({request.request_id})")
            self._queue.withdraw(request)
            if request.is_preempted:
                self._abort(request)
                self._end_run(request)
            request.move(Trigger.END)

    def _let_all_go(self) -> None:
        while self._held:
            self._unhold()
        while self._waiting:
            self._take()
        self._take()  # once more: nobody is left
        while self._running:
            self._end()

    # --- what steps are made of -----------------------------------------------------------------------------------

    def _newcomer(self) -> LiveRequest:
        seq, rng = self._num_arrived, self._rng
        self._num_arrived += 1
        self._now_s += rng.random()
        arrival = Arrival(
            request_id=f"r{seq}",
            client=f"client {seq if self._num_clients is None else rng.randrange(self._num_clients)}",
            priority=rng.randint(-2, 2),
            prompt_tokens=rng.randrange(500),
            max_new_tokens=rng.choice((None, 10, 100)),
        )
        return LiveRequest(arrival, seq, self._now_s)

    def _push(self, request: LiveRequest, *, held: bool) -> None:
        self._waiting.append(request)
        self._num_returned += request.attempt > 0
        if held:
            self._held.append(request)
        self._calls.append(f"push({request.request_id}, {held=}{', is_preempted' * request.is_preempted})")
        self._queue.push(request, held=held)

    def _successor(self, running: LiveRequest) -> LiveRequest | None:
        may_start_new = self._may_grow()
        before = list(self._queue)
        self._calls.append(f"successor({running.request_id}, may_start_new={may_start_new})")
        successor = self._queue.successor(running, may_start_new=may_start_new)
        if successor is not None:
            self._check_may_start(successor, may_start_new)
        assert list(self._queue) == before, "successor only looks"
        return successor

    def _check_may_start(self, request: LiveRequest, may_start_new: bool) -> None:
        self._calls[-1] += f" = {request.request_id}"
        assert request in self._waiting, f"nobody starts who does not wait: {request.request_id}"
        assert request not in self._held, f"nobody starts who is held: {request.request_id}"
        assert may_start_new or request.is_preempted, f"only preempted requests may start: {request.request_id}"

    def _start(self, request: LiveRequest) -> None:
        self._waiting.remove(request)
        self._running.append(request)
        if not request.is_preempted:
            request.attempt += 1
            request.started_s = self._now_s
        request.slice_tokens = 0
        request.move(Trigger.START)

    def _abort(self, request: LiveRequest) -> None:
        request.move(Trigger.ABORT)
        request.abort_by = "client"

    def _end_run(self, request: LiveRequest) -> None:
        self._calls.append(f"end_run({request.request_id})")
        self._queue.end_run(request)

    def _may_grow(self) -> bool:
        return self._rng.random() < 0.7


def _names(requests: Iterable[LiveRequest]) -> str:
    return ", ".join(request.request_id for request in requests) or "nobody"
