"""Which waiting requests may start: limits per conversation (1) and per client (`max_running_per_client`)."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

from chatstream.scheduler.request import Arrival, LiveRequest


class Eligibility:
    """A request is eligible when it is the first of its conversation and its client is within its limit.

    A request that is not eligible is held: it keeps its position, and requests behind it may start first.
    """

    def __init__(self, max_running_per_client: int | None) -> None:
        self._of_conversations = KeyLimit(1)
        self._of_clients = KeyLimit(max_running_per_client) if max_running_per_client is not None else None

    def __len__(self) -> int:
        """Number of conversations and clients with live requests."""
        return len(self._of_conversations) + (len(self._of_clients) if self._of_clients is not None else 0)

    @property
    def num_held(self) -> int:
        """Number of waiting requests that are not eligible."""
        return self._of_conversations.num_held + (self._of_clients.num_held if self._of_clients is not None else 0)

    def would_be_eligible(self, arrival: Arrival) -> bool:
        return (arrival.conversation is None or self._of_conversations.has_room(arrival.conversation)) and (
            self._of_clients is None or self._of_clients.has_room(arrival.client)
        )

    def add(self, request: LiveRequest) -> bool:
        """Add a request. True when it is eligible at once. The caller must call `end` when the request has ended."""
        conversation = request.arrival.conversation
        if conversation is not None and not self._of_conversations.add(conversation, request):
            return False
        return self._add_to_client(request)

    def is_eligible(self, request: LiveRequest) -> bool:
        return self.is_first_of_conversation(request) and (
            self._of_clients is None or self._of_clients.is_eligible(request.client, request)
        )

    def is_first_of_conversation(self, request: LiveRequest) -> bool:
        conversation = request.arrival.conversation
        return conversation is None or self._of_conversations.is_eligible(conversation, request)

    def end(self, request: LiveRequest) -> list[LiveRequest]:
        """Remove a request that has ended. Returns the requests that become eligible."""
        eligible = []
        conversation = request.arrival.conversation
        if conversation is not None:
            successor = self._of_conversations.end(conversation, request)
            if successor is not None and self._add_to_client(successor):
                eligible.append(successor)
        if self._of_clients is not None:
            successor = self._of_clients.end(request.client, request)
            if successor is not None:
                eligible.append(successor)
        return eligible

    def _add_to_client(self, request: LiveRequest) -> bool:
        return self._of_clients is None or self._of_clients.add(request.client, request)


class KeyLimit:
    """At most `limit` requests of each key are eligible; the others become eligible in order of admission.

    An eligible request stays eligible until it ends. A key without requests has no record.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._eligible: dict[Hashable, set[int]] = {}  # seqs
        self._held: dict[Hashable, list[int]] = {}  # seqs, sorted
        self._held_requests: dict[tuple[Hashable, int], LiveRequest] = {}

    def __len__(self) -> int:
        """Number of keys with live requests."""
        return len(self._eligible)

    @property
    def num_held(self) -> int:
        return len(self._held_requests)

    def has_room(self, key: Hashable) -> bool:
        """True when a request added now would be eligible at once."""
        return len(self._eligible.get(key, ())) < self._limit

    def is_eligible(self, key: Hashable, request: LiveRequest) -> bool:
        return request.seq in self._eligible.get(key, ())

    def add(self, key: Hashable, request: LiveRequest) -> bool:
        """Add a request. True when it is eligible at once."""
        is_eligible = self.has_room(key)
        if is_eligible:
            self._eligible.setdefault(key, set()).add(request.seq)
        else:
            insort(self._held.setdefault(key, []), request.seq)
            self._held_requests[key, request.seq] = request
        return is_eligible

    def end(self, key: Hashable, request: LiveRequest) -> LiveRequest | None:
        """Remove a request. Returns the one that becomes eligible, if any. Ignores a request that was never added."""
        eligible = self._eligible.get(key, set())
        if request.seq in eligible:
            eligible.remove(request.seq)
            successor = self._pop_first_held(key)
            if successor is not None:
                eligible.add(successor.seq)
            elif not eligible:
                del self._eligible[key]
            return successor
        if self._held_requests.pop((key, request.seq), None) is not None:
            seqs = self._held[key]
            del seqs[bisect_left(seqs, request.seq)]
            if not seqs:
                del self._held[key]
        return None

    def _pop_first_held(self, key: Hashable) -> LiveRequest | None:
        seqs = self._held.get(key)
        if not seqs:
            return None
        seq = seqs.pop(0)
        if not seqs:
            del self._held[key]
        return self._held_requests.pop((key, seq))
