"""Classes with ageing: the urgent ones first, and nobody for ever last."""

from __future__ import annotations

from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.request import LiveRequest


class PriorityQueue(KeyedQueue):
    """One class of priority is worth `ageing_s` seconds of waiting.

    The key is arrival time - priority * `ageing_s`. So a request of priority p is passed only by requests of a
    priority q > p that come within (q - p) * `ageing_s` after it, and never by any that comes later.
    """

    def __init__(self, ageing_s: float) -> None:
        super().__init__()
        self._ageing_s = ageing_s

    def key(self, request: LiveRequest) -> float:
        return request.admitted_s - request.priority * self._ageing_s
