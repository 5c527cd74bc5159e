"""First come, first served."""

from __future__ import annotations

from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.request import LiveRequest


class FifoQueue(KeyedQueue):
    """Eligible requests start in the order of admission.

    Positions are exact: a new request is always last.
    """

    is_exact = True

    def key(self, request: LiveRequest) -> float:
        return float(request.seq)  # distinct keys are found faster than equal ones
