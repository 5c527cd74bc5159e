"""A mean that follows what it measures."""

from __future__ import annotations


class RecentMean:
    """An exponentially weighted mean: the newest value counts for a tenth."""

    WEIGHT_OF_NEWEST = 0.1

    def __init__(self) -> None:
        self._mean: float | None = None

    @property
    def value(self) -> float | None:
        """None before the first value."""
        return self._mean

    def add(self, value: float) -> None:
        self._mean = value if self._mean is None else self._mean + self.WEIGHT_OF_NEWEST * (value - self._mean)
