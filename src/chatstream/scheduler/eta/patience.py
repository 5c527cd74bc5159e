"""The rate at which waiting requests are cancelled."""

from __future__ import annotations


class Patience:
    """A constant hazard: cancellations per second of waiting, independent of the time already waited."""

    MEMORY = 200
    """All counts are halved each time this number of requests has been seen."""

    def __init__(self) -> None:
        self._seen = 0.0
        self._cancelled = 0.0
        self._waited_s = 0.0

    def add(self, waited_s: float, *, is_cancelled: bool) -> None:
        """Add a request that has left the queue after `waited_s`, cancelled or started."""
        if self._seen >= self.MEMORY:
            self._seen, self._cancelled, self._waited_s = self._seen / 2, self._cancelled / 2, self._waited_s / 2
        self._seen += 1
        self._cancelled += is_cancelled
        self._waited_s += waited_s

    def hazard(self) -> float:
        """Cancellations per second of waiting; 0 before the first one."""
        return self._cancelled / self._waited_s if self._waited_s > 0 else 0.0
