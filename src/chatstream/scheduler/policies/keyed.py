"""One line, sorted by a key that a request has when it joins: what most policies are."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from chatstream.scheduler.policies.sorted_keys import Key, SortedKeys
from chatstream.scheduler.request import LiveRequest


class KeyedQueue:
    """A `WaitingQueue` in the order of `key(request)`, then of admission. A policy is a subclass with a key.

    The key of a request never changes, so ageing is free: `arrival time - a head start` grows as fast for everybody.
    Whoever was preempted goes back to the place it had, so a free slot resumes it before anybody who came later;
    a time slice goes to those who have not started yet first.
    """

    is_exact = False
    slice_tokens: int | None = None

    def __init__(self) -> None:
        self._members: dict[int, tuple[LiveRequest, Key]] = {}  # by seq
        self._line = SortedKeys()
        self._fresh = _Ready(lambda seq: seq in self._members and not self._members[seq][0].is_preempted)
        self._preempted = _Ready(lambda seq: seq in self._members and self._members[seq][0].is_preempted)

    def key(self, request: LiveRequest) -> float:
        """Smaller is sooner."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[LiveRequest]:
        return (self._members[seq][0] for seq in self._line.seqs)

    def push(self, request: LiveRequest, *, held: bool) -> None:
        key = (self.key(request), request.seq)
        self._members[request.seq] = request, key
        self._line.add(key)
        if request.is_preempted:
            self._preempted.add(key)
        elif not held:
            self._fresh.add(key)

    def unhold(self, request: LiveRequest) -> None:
        self._fresh.add(self._members[request.seq][1])

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        among = (self._fresh, self._preempted) if may_start_new else (self._preempted,)
        firsts = [first for ready in among if (first := ready.first) is not None]
        if not firsts:
            return None
        request, _ = self._members[min(firsts)[1]]
        self.withdraw(request)
        return request

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        first = (self._fresh.first if may_start_new else None) or self._preempted.first
        return self._members[first[1]][0] if first is not None else None

    def start(self, request: LiveRequest) -> None:
        self.withdraw(request)

    def withdraw(self, request: LiveRequest) -> None:
        _, key = self._members.pop(request.seq)
        self._line.remove(key)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        pass

    def end_run(self, request: LiveRequest) -> None:
        pass

    def position(self, request: LiveRequest) -> int:
        return self._line.position(self._members[request.seq][1])


class _Ready:
    """The first of those who may start: a heap of keys, where whoever has left stays until it surfaces.

    Nothing is to be done for those who leave; when most have left, `add` sweeps.
    """

    def __init__(self, is_member: Callable[[int], bool]) -> None:
        self._heap: list[Key] = []
        self._is_member = is_member
        self._num_swept = 0  # so many were left by the last sweep

    @property
    def first(self) -> Key | None:
        while self._heap and not self._is_member(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def add(self, key: Key) -> None:
        heapq.heappush(self._heap, key)
        if len(self._heap) > 2 * self._num_swept + 64:
            self._heap = [one for one in self._heap if self._is_member(one[1])]
            heapq.heapify(self._heap)
            self._num_swept = len(self._heap)
