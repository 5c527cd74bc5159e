"""First come, first served; strictly."""

from __future__ import annotations

from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.request import LiveRequest


class FifoQueue(KeyedQueue):
    """Start order is the order of admission (of those that may start).

    A position never increases, because nobody can come in front.
    """

    is_exact = True

    def key(self, request: LiveRequest) -> float:
        return float(request.seq)  # equal keys would do, but take longer to find
