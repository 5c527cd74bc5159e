"""A running mean of recent values."""

from __future__ import annotations


class RecentMean:
    """The mean of the first `WINDOW` values; from then on each new value has weight 1 / `WINDOW`."""

    WINDOW = 50

    def __init__(self) -> None:
        self._mean = 0.0
        self._num = 0

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self._mean if self._num else None

    def add(self, value: float) -> None:
        self._num = min(self._num + 1, self.WINDOW)
        self._mean += (value - self._mean) / self._num

    def drawn_to(self, prior: float, weight: float) -> float:
        """The mean with a prior that counts as `weight` values (shrinkage)."""
        return (self._num * self._mean + weight * prior) / (self._num + weight)
