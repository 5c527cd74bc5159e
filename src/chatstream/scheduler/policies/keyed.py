"""A queue sorted by a key that is fixed when a request is pushed: the base class of most policies."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator

from chatstream.scheduler.policies.sorted_keys import Key, SortedKeys
from chatstream.scheduler.request import LiveRequest


class KeyedQueue:
    """A `WaitingQueue` in the order of `key(request)`, then of admission. A subclass defines `key`.

    The key of a request must not change. Ageing needs no updates: with a key of admission time minus a head start,
    all requests age equally.
    A preempted request returns to its old position, so a free slot resumes it before later requests. At the end of a
    time slice, new requests come before preempted ones.
    """

    is_exact = False
    slice_tokens: int | None = None

    def __init__(self) -> None:
        self._members: dict[int, tuple[LiveRequest, Key]] = {}  # by seq
        self._order = SortedKeys()
        self._new = _EligibleKeys(lambda seq: seq in self._members and not self._members[seq][0].is_preempted)
        self._preempted = _EligibleKeys(lambda seq: seq in self._members and self._members[seq][0].is_preempted)

    def key(self, request: LiveRequest) -> float:
        """The sort key; the request with the smallest key starts first."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._members)

    def __iter__(self) -> Iterator[LiveRequest]:
        return (self._members[seq][0] for seq in self._order.seqs)

    def push(self, request: LiveRequest, *, held: bool) -> None:
        key = (self.key(request), request.seq)
        self._members[request.seq] = request, key
        self._order.add(key)
        if request.is_preempted:
            self._preempted.add(key)
        elif not held:
            self._new.add(key)

    def unhold(self, request: LiveRequest) -> None:
        self._new.add(self._members[request.seq][1])

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        heaps = (self._new, self._preempted) if may_start_new else (self._preempted,)
        firsts = [first for heap in heaps if (first := heap.first) is not None]
        if not firsts:
            return None
        request, _ = self._members[min(firsts)[1]]
        self.withdraw(request)
        return request

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        first = (self._new.first if may_start_new else None) or self._preempted.first
        return self._members[first[1]][0] if first is not None else None

    def start(self, request: LiveRequest) -> None:
        self.withdraw(request)

    def withdraw(self, request: LiveRequest) -> None:
        _, key = self._members.pop(request.seq)
        self._order.remove(key)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        pass

    def end_run(self, request: LiveRequest) -> None:
        pass

    def position(self, request: LiveRequest) -> int:
        return self._order.position(self._members[request.seq][1])


class _EligibleKeys:
    """The smallest key of the eligible requests: a heap with lazy deletion.

    A key stays in the heap after its request has left the queue, until it reaches the top. `add` removes such keys when
    they are the majority.
    """

    def __init__(self, is_member: Callable[[int], bool]) -> None:
        self._heap: list[Key] = []
        self._is_member = is_member
        self._num_swept = 0  # size of the heap after the last sweep

    @property
    def first(self) -> Key | None:
        while self._heap and not self._is_member(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def add(self, key: Key) -> None:
        heapq.heappush(self._heap, key)
        if len(self._heap) > 2 * self._num_swept + 64:
            self._heap = [known for known in self._heap if self._is_member(known[1])]
            heapq.heapify(self._heap)
            self._num_swept = len(self._heap)
