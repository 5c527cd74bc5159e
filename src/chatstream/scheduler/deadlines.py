"""A heap of timeouts."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import NamedTuple


class Deadline(NamedTuple):
    """A callback for a point in time, skipped when it has become obsolete by then. Sorted by the first two fields."""

    at_s: float
    number: int
    is_obsolete: Callable[[], bool]
    fire: Callable[[float], None]
    """Called with `now_s`, which may be later than `at_s`."""


class Deadlines:
    """A heap of deadlines with lazy deletion: an obsolete deadline is removed when it reaches the top.

    `num_live` bounds the obsolete entries: above 4 x `num_live` + 64 entries all of them are removed.
    """

    def __init__(self) -> None:
        self._heap: list[Deadline] = []
        self._count = 0

    def __len__(self) -> int:
        return len(self._heap)

    def add(
        self, at_s: float, *, is_obsolete: Callable[[], bool], fire: Callable[[float], None], num_live: int
    ) -> None:
        self._count += 1
        heapq.heappush(self._heap, Deadline(at_s, self._count, is_obsolete, fire))
        if len(self._heap) > 4 * num_live + 64:
            self._heap = [deadline for deadline in self._heap if not deadline.is_obsolete()]
            heapq.heapify(self._heap)

    def next_s(self) -> float | None:
        while self._heap and self._heap[0].is_obsolete():
            heapq.heappop(self._heap)
        return self._heap[0].at_s if self._heap else None

    def pop_due(self, now_s: float) -> Deadline | None:
        """Remove and return the earliest deadline that is due; None when none is."""
        at_s = self.next_s()
        return heapq.heappop(self._heap) if at_s is not None and at_s <= now_s else None
