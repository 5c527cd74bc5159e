"""When a rejected client should try again."""

from __future__ import annotations

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 120.0
CLOSED_RETRY_AFTER_S = 10.0
"""Minimum while the scheduler is paused or drains: the duration is unknown."""


def expected_wait_s(*, num_waiting: int, max_concurrency: int, mean_service_s: float) -> float:
    """The expected wait of a request that arrived now, while the estimates have no basis.

    With c slots and mean service time S, a slot becomes free every S / c seconds on average. The new request needs one
    for each request ahead and one for itself. The result never decreases with the backlog.
    """
    return (num_waiting + 1) * mean_service_s / max_concurrency


def clamped(wait_s: float) -> float:
    return min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
