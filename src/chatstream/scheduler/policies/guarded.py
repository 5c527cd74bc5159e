"""Replaces a failing policy from outside the package by first come, first served."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from chatstream.scheduler.policies.base import WaitingQueue
from chatstream.scheduler.policies.fcfs import FifoQueue
from chatstream.scheduler.request import LiveRequest


class PolicyFailed(Exception):
    """The policy returned a request that is not eligible, or none although one is, or lost count of its requests."""


class GuardedQueue:
    """Delegates to a policy, and keeps its own record of the waiting requests.

    At the first exception, or the first result that breaks the protocol (`PolicyFailed`), a `FifoQueue` with all
    waiting requests replaces the policy. `on_failure` is called once, with the error.
    """

    def __init__(self, queue: WaitingQueue, on_failure: Callable[[Exception], object]) -> None:
        self._queue = queue
        self._on_failure = on_failure
        self._members: dict[int, LiveRequest] = {}  # by seq
        self._held: set[int] = set()
        self._preempted: set[int] = set()

    @property
    def is_exact(self) -> bool:
        return self._queue.is_exact

    @property
    def slice_tokens(self) -> int | None:
        return self._queue.slice_tokens

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[LiveRequest]:
        try:
            members = list(self._queue)
            if len(members) != len(self._members):
                raise PolicyFailed(f"{len(self._members)} requests wait, but it has {len(members)}")
        except Exception as error:
            self._fall_back(error)
            members = list(self._queue)
        return iter(members)

    def push(self, request: LiveRequest, *, held: bool) -> None:
        self._members[request.seq] = request
        if request.is_preempted:
            self._preempted.add(request.seq)
        elif held:
            self._held.add(request.seq)
        try:
            self._queue.push(request, held=held)
        except Exception as error:
            self._fall_back(error)

    def unhold(self, request: LiveRequest) -> None:
        self._held.discard(request.seq)
        try:
            self._queue.unhold(request)
        except Exception as error:
            self._fall_back(error)

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        try:
            request = self._queue.take(may_start_new=may_start_new)
            self._check(request, may_start_new)
            if request is None and self._num_eligible(may_start_new):
                raise PolicyFailed("take returned no request although one is eligible")
        except Exception as error:
            self._fall_back(error)
            request = self._queue.take(may_start_new=may_start_new)
        if request is not None:
            self._remove(request)
        return request

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        try:
            request = self._queue.successor(running, may_start_new=may_start_new)
            self._check(request, may_start_new)
        except Exception as error:
            self._fall_back(error)
            request = self._queue.successor(running, may_start_new=may_start_new)
        return request

    def start(self, request: LiveRequest) -> None:
        self._remove(request)
        try:
            self._queue.start(request)
        except Exception as error:
            self._fall_back(error)

    def withdraw(self, request: LiveRequest) -> None:
        self._remove(request)
        try:
            self._queue.withdraw(request)
        except Exception as error:
            self._fall_back(error)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        try:
            self._queue.charge(request, prompt_tokens=prompt_tokens, tokens=tokens)
        except Exception as error:
            self._fall_back(error)

    def end_run(self, request: LiveRequest) -> None:
        try:
            self._queue.end_run(request)
        except Exception as error:
            self._fall_back(error)

    def position(self, request: LiveRequest) -> int:
        try:
            return self._queue.position(request)
        except Exception as error:
            self._fall_back(error)
            return self._queue.position(request)

    def _check(self, request: LiveRequest | None, may_start_new: bool) -> None:
        if request is None or request.seq in self._preempted:
            return
        if request.seq not in self._members or request.seq in self._held or not may_start_new:
            raise PolicyFailed(f"it returned {request.request_id}, which is not eligible")

    def _num_eligible(self, may_start_new: bool) -> int:
        return len(self._members) - len(self._held) if may_start_new else len(self._preempted)

    def _remove(self, request: LiveRequest) -> None:
        del self._members[request.seq]
        self._held.discard(request.seq)
        self._preempted.discard(request.seq)

    def _fall_back(self, error: Exception) -> None:
        self._queue = FifoQueue()
        for request in self._members.values():
            self._queue.push(request, held=request.seq in self._held)
        self._on_failure(error)
