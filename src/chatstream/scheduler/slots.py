"""Slots and grants.

A grant names the slot, its occupant, the attempt and the epoch: the number of times the slot was granted. Every report
about a running request carries its grant. A report with an outdated grant concerns an earlier occupant and is ignored,
so no late callback can free a slot twice or free the slot of another request.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grant:
    """One use of a slot, from the start or resumption of a request until it releases the slot."""

    slot: int
    request_id: str
    attempt: int
    """1 for the first start of this request."""
    epoch: int
    """1 for the first occupant of this slot."""


class Slots:
    """Assigns slot numbers, the lowest free number first. Knows no limit: the scheduler checks it before `acquire`."""

    def __init__(self) -> None:
        self._in_use: dict[int, Grant] = {}
        self._free: list[int] = []
        self._epochs: list[int] = []

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._in_use)

    def __iter__(self) -> Iterator[Grant]:
        return iter(self._in_use.values())

    def acquire(self, request_id: str, attempt: int) -> Grant:
        if not self._free:
            heapq.heappush(self._free, len(self._epochs))
            self._epochs.append(0)
        slot = heapq.heappop(self._free)
        self._epochs[slot] += 1
        grant = Grant(slot, request_id, attempt, self._epochs[slot])
        self._in_use[slot] = grant
        return grant

    def is_current(self, grant: Grant) -> bool:
        """False when the slot was released, or granted again since."""
        current = self._in_use.get(grant.slot)
        return current is grant or current == grant

    def release(self, grant: Grant) -> None:
        """Free the slot. The grant must be current."""
        assert self.is_current(grant), f"{grant} is not current"
        del self._in_use[grant.slot]
        heapq.heappush(self._free, grant.slot)
