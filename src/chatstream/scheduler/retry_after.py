"""When a refused client should come back."""

from __future__ import annotations

MIN_RETRY_AFTER_S = 1.0
MAX_RETRY_AFTER_S = 120.0


def retry_after_s(*, num_waiting: int, max_concurrency: int, mean_service_s: float) -> float:
    """The expected wait of a request that joined the full queue now, within 1 to 120 s.

    With c slots of mean service S, a slot becomes free every S / c seconds on average; the newcomer needs one for
    everybody ahead of it and one for itself. Never decreases with the backlog.
    """
    expected_s = (num_waiting + 1) * mean_service_s / max_concurrency
    return min(max(expected_s, MIN_RETRY_AFTER_S), MAX_RETRY_AFTER_S)
