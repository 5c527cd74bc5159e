"""When a refused client should come back."""

from __future__ import annotations

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 120.0
CLOSED_RETRY_AFTER_S = 10.0
"""At least, when nobody is taken: nobody knows for how long."""


def expected_wait_s(*, num_waiting: int, max_concurrency: int, mean_service_s: float) -> float:
    """Of a request that joined the line now, for as long as the estimates have no basis.

    With c slots of mean service S, a slot becomes free every S / c seconds on average; the newcomer needs one for
    everybody ahead of it and one for itself. Never decreases with the backlog.
    """
    return (num_waiting + 1) * mean_service_s / max_concurrency


def clamped(wait_s: float) -> float:
    return min(max(wait_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
