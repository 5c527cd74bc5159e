"""Slots as records.

A grant names the slot, its occupant, the attempt and how often the slot was given away (its epoch). Whoever reports
about a running request shows the grant; when it is not the one on record, the report is about somebody who has
already left, and is ignored. So no late callback can free a slot twice or free another request's slot.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Grant:
    """The right to generate, from the start of a request until its end."""

    slot: int
    request_id: str
    attempt: int
    """1 for the first start of this request."""
    epoch: int
    """1 for the first occupant of this slot."""


class Slots:
    """Hands out slot numbers, the lowest free one first. Knows no limit: the scheduler asks only when one is free."""

    def __init__(self) -> None:
        self._held: dict[int, Grant] = {}
        self._free: list[int] = []
        self._epochs: list[int] = []

    def __len__(self) -> int:
        """Slots in use."""
        return len(self._held)

    def __iter__(self) -> Iterator[Grant]:
        return iter(self._held.values())

    def acquire(self, request_id: str, attempt: int) -> Grant:
        if not self._free:
            heapq.heappush(self._free, len(self._epochs))
            self._epochs.append(0)
        slot = heapq.heappop(self._free)
        self._epochs[slot] += 1
        grant = Grant(slot, request_id, attempt, self._epochs[slot])
        self._held[slot] = grant
        return grant

    def is_current(self, grant: Grant) -> bool:
        """False when the slot has been given back or to somebody else since."""
        held = self._held.get(grant.slot)
        return held is grant or held == grant

    def release(self, grant: Grant) -> None:
        """The slot is free again. The grant must be current."""
        assert self.is_current(grant), f"{grant} does not hold its slot"
        del self._held[grant.slot]
        heapq.heappush(self._free, grant.slot)
