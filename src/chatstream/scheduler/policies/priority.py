"""Priority classes with ageing: urgent requests first, without starvation."""

from __future__ import annotations

from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.policies.sorted_keys import Key
from chatstream.scheduler.request import LiveRequest


class PriorityQueue(KeyedQueue):
    """One class of priority is worth `ageing_s` seconds of waiting.

    The key is admission time - priority * `ageing_s`. A request of priority p is passed only by requests of a priority
    q > p that arrive less than (q - p) * `ageing_s` after it.
    """

    def __init__(self, ageing_s: float) -> None:
        super().__init__()
        self._ageing_s = ageing_s

    def key(self, request: LiveRequest) -> float:
        return request.admitted_s - request.priority * self._ageing_s

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        """Time slices rotate within a class; a request of a lower class needs a smaller key to take over."""
        new = self._member(self._new.first) if may_start_new else None
        preempted = self._member(self._preempted.first)
        if new is not None and preempted is not None and not self._may_pass(new, preempted):
            new, preempted = preempted, new
        for candidate in (new, preempted):
            if candidate is not None and self._may_pass(candidate, running):
                return candidate
        return None

    def _may_pass(self, candidate: LiveRequest, started: LiveRequest) -> bool:
        return candidate.priority >= started.priority or self.key(candidate) < self.key(started)

    def _member(self, key: Key | None) -> LiveRequest | None:
        return self._members[key[1]][0] if key is not None else None
