"""When a refused client should come back."""

from __future__ import annotations

from collections.abc import Sequence

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 120.0


class ServiceTime:
    """A running mean of how long a generation holds its slot, in seconds, weighted to the recent ones."""

    WEIGHT_OF_NEWEST = 0.1

    def __init__(self) -> None:
        self._mean_s: float | None = None

    @property
    def has_basis(self) -> bool:
        """At least one generation has ended."""
        return self._mean_s is not None

    def add(self, held_s: float) -> None:
        if self._mean_s is None:
            self._mean_s = held_s
        else:
            self._mean_s += self.WEIGHT_OF_NEWEST * (held_s - self._mean_s)

    def mean_s(self, ages_s: Sequence[float]) -> float:
        """Before the first one has ended: those that run are taken to be half way through."""
        if self._mean_s is not None:
            return self._mean_s
        return 2 * sum(ages_s) / len(ages_s) if ages_s else MIN_RETRY_AFTER_S


def retry_after_s(*, num_waiting: int, max_concurrency: int, mean_service_s: float) -> float:
    """The expected wait of a request that joined the full queue now, within 1 to 120 s.

    With c slots of mean service S, a slot becomes free every S / c seconds on average; the newcomer needs one for
    everybody ahead of it and one for itself. Never decreases with the backlog.
    """
    expected_s = (num_waiting + 1) * mean_service_s / max_concurrency
    return min(max(expected_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
