"""Check a policy against the protocol in `chatstream.scheduler.policies.base`."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Callable, Iterable
from random import Random
from types import FunctionType, ModuleType

from chatstream.scheduler import Arrival, LiveRequest, WaitingQueue
from chatstream.scheduler.states import Trigger

NUM_CALLS_SHOWN = 10
"""The message of a failed check lists up to this many calls before it."""


def check_policy(
    make_queue: Callable[[], WaitingQueue], *, num_queues: int = 50, num_clients: int = 4000, seed: int = 0
) -> None:
    """Drive queues as the scheduler does, with random steps, and compare them with a plain list of requests.

    `make_queue` returns a new, empty queue. The same `seed` gives the same steps. The last queue serves
    2 * `num_clients` requests of different clients, to check that its memory is bounded; for a policy that keeps the
    state of more than 1000 idle clients, `num_clients` must be at least four times that number.
    Not checked: which eligible request is first, and the running time of the methods.
    Raises `AssertionError` with the broken rule and the last calls.
    """
    rng = Random(seed)
    for _ in range(num_queues):
        _Driver(make_queue(), rng, num_clients=4).run(30)
    _check_memory(make_queue(), rng, num_clients)


def _check_memory(queue: WaitingQueue, rng: Random, num_clients: int) -> None:
    driver = _Driver(queue, rng)
    driver.run(num_clients)
    num_before = _num_objects(queue)
    driver.run(num_clients)
    num_grown = _num_objects(queue) - num_before
    # A leak is at least one object for each client; the margin is for queues that clean up late.
    assert num_grown < num_clients / 4, (
        f"memory does not grow with past clients: {num_grown} objects more after {num_clients} more clients"
    )


def _num_objects(root: object) -> int:
    """Number of objects reachable from `root`, without types, functions and modules."""
    seen: set[int] = set()
    found = [root]
    while found:
        one = found.pop()
        if id(one) not in seen and not isinstance(one, type | FunctionType | ModuleType):
            seen.add(id(one))
            found += gc.get_referents(one)
            if isinstance(one, dict):
                found += one  # CPython's `get_referents` skips keys that are strings
    return len(seen)


class _Driver:
    """Calls a queue as the scheduler does, and keeps lists of the requests that wait, are held, and run."""

    def __init__(self, queue: WaitingQueue, rng: Random, num_clients: int | None = None) -> None:
        """`num_clients`: number of clients that send the requests; None: a new client for each request."""
        self._queue = queue
        self._rng = rng
        self._num_clients = num_clients
        self._max_waiting = rng.randint(1, 20)
        self._waiting: list[LiveRequest] = []
        self._held: list[LiveRequest] = []
        self._running: list[LiveRequest] = []
        self._positions: dict[LiveRequest, int] = {}
        self._num_returned = 0  # since `_positions` was updated
        self._num_arrived = 0
        self._now_s = 0.0
        self._calls: deque[str] = deque(maxlen=NUM_CALLS_SHOWN)

    def run(self, num_requests: int) -> None:
        """Push `num_requests` requests and continue until all have ended."""
        for _ in range(2):  # they started under another policy: the queue has never seen them
            self._waiting.append(unknown := self._new_request())
            self._start(unknown)
        steps = {self._arrive: 4, self._unhold: 2, self._take: 4, self._preempt: 2}
        steps |= {self._charge: 6, self._end: 2, self._fail: 1, self._withdraw: 1}
        num_in_all = self._num_arrived + num_requests
        while self._num_arrived < num_in_all:
            self._do(*self._rng.choices([*steps], [*steps.values()]))
        self._do(self._end_all)

    def _do(self, step: Callable[[], None]) -> None:
        try:
            step()
            self._check_queue()
        except Exception as error:
            rule = str(error) if isinstance(error, AssertionError) else f"no method raises: {error!r}"
            raise AssertionError(f"{rule}; after {', '.join(self._calls)}") from error

    def _check_queue(self) -> None:
        members = list(self._queue)
        expected = sorted(self._waiting, key=lambda request: request.seq)
        assert sorted(members, key=lambda request: request.seq) == expected, (
            f"the queue contains exactly the waiting requests ({_names(expected)}): {_names(members)}"
        )
        assert len(self._queue) == len(members), (
            f"len is the number of waiting requests, {len(members)}: {len(self._queue)}"
        )
        positions = {request: self._queue.position(request) for request in members}
        assert [*positions.values()] == [*range(1, len(members) + 1)], (
            f"positions are 1, 2, 3 … in the order of iteration: {[*positions.values()]}"
        )
        if self._queue.is_exact:  # a position may only grow by the requests that returned to their old positions
            before, allowed = self._positions, self._num_returned
            grown = [one for one in members if positions[one] > before.get(one, positions[one]) + allowed]
            assert not grown, f"an exact position never grows: {_names(grown)}"
        self._positions, self._num_returned = positions, 0

    # --- steps ----------------------------------------------------------------------------------------------------

    def _arrive(self) -> None:
        if len(self._waiting) < self._max_waiting:
            self._push(self._new_request(), held=self._rng.random() < 0.3)

    def _unhold(self) -> None:
        if self._held:
            request = self._rng.choice(self._held)
            self._held.remove(request)
            self._calls.append(f"unhold({request.request_id})")
            self._queue.unhold(request)

    def _take(self) -> None:
        may_start_new = self._may_start_new()
        self._calls.append(f"take(may_start_new={may_start_new})")
        request = self._queue.take(may_start_new=may_start_new)
        if request is not None:
            self._check_eligible(request, may_start_new)
            self._start(request)
        else:
            eligible = [one for one in self._waiting if one not in self._held and (may_start_new or one.is_preempted)]
            assert not eligible, f"take returns a request when one is eligible: {_names(eligible)}"

    def _preempt(self) -> None:
        if not self._running:
            return
        running = self._rng.choice(self._running)
        self._successor(running)  # its slice is over
        if self._rng.random() < 0.4:
            return  # as when no request has waited long enough
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
            if request.generated_tokens or self._rng.random() < 0.7:  # prompt tokens come before the answer
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
        """The engine fails before the first token of a request."""
        if untouched := [request for request in self._running if not request.generated_tokens]:
            request = self._rng.choice(untouched)
            self._running.remove(request)
            request.move(Trigger.REQUEUE)
            self._end_run(request)
            self._push(request, held=False)

    def _withdraw(self) -> None:
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

    def _end_all(self) -> None:
        while self._held:
            self._unhold()
        while self._waiting:
            self._take()
        self._take()  # on an empty queue
        while self._running:
            self._end()

    # --- parts of steps -------------------------------------------------------------------------------------------

    def _new_request(self) -> LiveRequest:
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
        may_start_new = self._may_start_new()
        before = list(self._queue)
        self._calls.append(f"successor({running.request_id}, may_start_new={may_start_new})")
        successor = self._queue.successor(running, may_start_new=may_start_new)
        if successor is not None:
            self._check_eligible(successor, may_start_new)
        assert list(self._queue) == before, "successor does not change the queue"
        return successor

    def _check_eligible(self, request: LiveRequest, may_start_new: bool) -> None:
        self._calls[-1] += f" = {request.request_id}"
        assert request in self._waiting, f"only a waiting request starts: {request.request_id}"
        assert request not in self._held, f"a held request does not start: {request.request_id}"
        assert may_start_new or request.is_preempted, (
            f"without may_start_new only a preempted request starts: {request.request_id}"
        )

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

    def _may_start_new(self) -> bool:
        return self._rng.random() < 0.7


def _names(requests: Iterable[LiveRequest]) -> str:
    return ", ".join(request.request_id for request in requests) or "none"
