"""How soon those who wait go away by themselves."""

from __future__ import annotations


class Patience:
    """As a rate: so many for each second that somebody waits, however long it has waited before."""

    MEMORY = 200
    """Forgets half of what it has seen whenever it has seen so many."""

    def __init__(self) -> None:
        self._seen = 0.0
        self._left = 0.0
        self._waited_s = 0.0

    def add(self, waited_s: float, *, has_left: bool) -> None:
        if self._seen >= self.MEMORY:
            self._seen, self._left, self._waited_s = self._seen / 2, self._left / 2, self._waited_s / 2
        self._seen += 1
        self._left += has_left
        self._waited_s += waited_s

    def hazard(self) -> float:
        """Per second; 0 before anybody has left."""
        return self._left / self._waited_s if self._waited_s > 0 else 0.0
