"""One line, sorted by a key that a request has when it joins: what most policies are."""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from chatstream.scheduler.line import Key, Line
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
        self._waiting: dict[int, LiveRequest] = {}
        self._keys: dict[int, Key] = {}
        self._line = Line()
        self._fresh = _Ready()  # may start, never has
        self._preempted = _Ready()

    def key(self, request: LiveRequest) -> float:
        """Smaller is sooner."""
        raise NotImplementedError

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[LiveRequest]:
        return (self._waiting[seq] for _, seq in self._line.keys)

    def push(self, request: LiveRequest, *, held: bool) -> None:
        key = (self.key(request), request.seq)
        self._waiting[request.seq] = request
        self._keys[request.seq] = key
        self._line.add(key)
        if request.is_preempted:
            self._preempted.add(key)
        elif not held:
            self._fresh.add(key)

    def unhold(self, request: LiveRequest) -> None:
        self._fresh.add(self._keys[request.seq])

    def take(self, *, may_grow: bool = True) -> LiveRequest | None:
        among = (self._fresh, self._preempted) if may_grow else (self._preempted,)
        firsts = [ready.first for ready in among if ready.first is not None]
        if not firsts:
            return None
        request = self._waiting[min(firsts)[1]]
        self.discard(request)
        return request

    def successor(self, running: LiveRequest, *, may_grow: bool) -> LiveRequest | None:
        first = (self._fresh.first if may_grow else None) or self._preempted.first
        return self._waiting[first[1]] if first is not None else None

    def start(self, request: LiveRequest) -> None:
        self.discard(request)

    def discard(self, request: LiveRequest) -> None:
        key = self._keys.pop(request.seq)
        del self._waiting[request.seq]
        self._line.remove(key)
        self._fresh.discard(key)
        self._preempted.discard(key)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        pass

    def leave(self, request: LiveRequest) -> None:
        pass

    def position(self, request: LiveRequest) -> int:
        return self._line.place(self._keys[request.seq])


class _Ready:
    """Those who may start: a heap of keys, where whoever has left stays until it surfaces or most have left."""

    def __init__(self) -> None:
        self._heap: list[Key] = []
        self._members: set[int] = set()

    @property
    def first(self) -> Key | None:
        while self._heap and self._heap[0][1] not in self._members:
            heapq.heappop(self._heap)
        return self._heap[0] if self._heap else None

    def add(self, key: Key) -> None:
        heapq.heappush(self._heap, key)
        self._members.add(key[1])

    def discard(self, key: Key) -> None:
        """Harmless for those who are no members."""
        self._members.discard(key[1])
        if len(self._heap) > 2 * len(self._members) + 64:
            self._heap = [one for one in self._heap if one[1] in self._members]
            heapq.heapify(self._heap)
