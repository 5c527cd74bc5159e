"""Classes with ageing: the urgent ones first, and nobody for ever last."""

from __future__ import annotations

from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.policies.sorted_keys import Key
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

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        """Time slices are shared within a class; a lower one takes over only when it has aged enough to be first."""
        fresh = self._member(self._fresh.first) if may_start_new else None
        preempted = self._member(self._preempted.first)
        if fresh is not None and preempted is not None and not self._may_pass(fresh, preempted):
            fresh, preempted = preempted, fresh
        for candidate in (fresh, preempted):
            if candidate is not None and self._may_pass(candidate, running):
                return candidate
        return None

    def _may_pass(self, candidate: LiveRequest, begun: LiveRequest) -> bool:
        return candidate.priority >= begun.priority or self.key(candidate) < self.key(begun)

    def _member(self, key: Key | None) -> LiveRequest | None:
        return self._members[key[1]][0] if key is not None else None
