"""Who is next. One class a policy, behind one protocol; the scheduler knows only the protocol.

To add a policy: write a class with these methods, and give it a name in `QUEUES`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from typing import Protocol

from chatstream.scheduler.line import Line
from chatstream.scheduler.request import LiveRequest


class WaitingQueue(Protocol):
    """The requests that wait, and the order in which they start.

    A request may be pushed as *held*: it has its place in line and counts for everybody's position, but must not be
    taken until `unhold` (it waits for an earlier request of its own conversation). No method may scan the queue.
    """

    def push(self, request: LiveRequest, *, held: bool) -> None:
        """A request joins, or comes back with the `seq` it had."""

    def unhold(self, request: LiveRequest) -> None:
        """A held request may be taken from now on."""

    def take(self) -> LiveRequest | None:
        """Remove and return the request that starts next; None when nobody may start."""

    def discard(self, request: LiveRequest) -> None:
        """A waiting request, held or not, leaves without starting."""

    def position(self, request: LiveRequest) -> int:
        """1 for the next. Counts everybody ahead, the held ones too."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[LiveRequest]:
        """In the order of their positions. This one may be slow; it is for people who look at the queue."""


class FifoQueue:
    """First come, first served; strictly.

    Start order is the order of admission (of those that may start), and a position never increases, because nobody
    can come in front. `push` and `take` are O(log n), `discard` and `position` too: whoever leaves stays in the heap
    as a dead entry until it surfaces, or until dead ones are the majority.
    """

    def __init__(self) -> None:
        self._waiting: dict[int, LiveRequest] = {}
        self._line = Line()
        self._ready: list[int] = []  # heap of seqs; one that is not in `_waiting` any more is dead

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[LiveRequest]:
        return (self._waiting[seq] for seq in sorted(self._waiting))

    def push(self, request: LiveRequest, *, held: bool) -> None:
        self._waiting[request.seq] = request
        self._line.add(request.seq)
        if not held:
            heapq.heappush(self._ready, request.seq)

    def unhold(self, request: LiveRequest) -> None:
        heapq.heappush(self._ready, request.seq)

    def take(self) -> LiveRequest | None:
        while self._ready:
            request = self._waiting.get(heapq.heappop(self._ready))
            if request is not None:
                self._remove(request)
                return request
        return None

    def discard(self, request: LiveRequest) -> None:
        self._remove(request)
        if len(self._ready) > 2 * len(self._waiting) + 64:
            self._ready = [seq for seq in self._ready if seq in self._waiting]
            heapq.heapify(self._ready)

    def position(self, request: LiveRequest) -> int:
        return self._line.place(request.seq)

    def _remove(self, request: LiveRequest) -> None:
        del self._waiting[request.seq]
        self._line.remove(request.seq)


QUEUES: dict[str, Callable[[], WaitingQueue]] = {"fcfs": FifoQueue}
"""Policies by the name an operator gives (`--policy`)."""
