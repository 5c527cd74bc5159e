"""Requests that belong together take turns: who of those in line may start."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

from chatstream.scheduler.request import Arrival, LiveRequest


class Eligibility:
    """A request may start when it is the first of its conversation, and then among the first of its client.

    The others keep their places in line, and those behind them may pass.
    """

    def __init__(self, max_running_per_client: int | None) -> None:
        self._of_conversations = KeyLimit(1)
        self._of_clients = KeyLimit(max_running_per_client) if max_running_per_client is not None else None

    def __len__(self) -> int:
        """Conversations and clients of whom anything is kept."""
        return len(self._of_conversations) + (len(self._of_clients) if self._of_clients is not None else 0)

    def would_be_eligible(self, arrival: Arrival) -> bool:
        """It would have its turn at once."""
        return (arrival.conversation is None or self._of_conversations.has_room(arrival.conversation)) and (
            self._of_clients is None or self._of_clients.has_room(arrival.client)
        )

    def add(self, request: LiveRequest) -> bool:
        """True when it has its turn at once. The caller must `leave` when it ends."""
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
        """Those who have their turn because of that."""
        with_turn = []
        conversation = request.arrival.conversation
        if conversation is not None:
            successor = self._of_conversations.end(conversation, request)
            if successor is not None and self._add_to_client(successor):
                with_turn.append(successor)
        if self._of_clients is not None:
            successor = self._of_clients.end(request.client, request)
            if successor is not None:
                with_turn.append(successor)
        return with_turn

    def _add_to_client(self, request: LiveRequest) -> bool:
        return self._of_clients is None or self._of_clients.add(request.client, request)


class KeyLimit:
    """Of the requests with the same key, at most `limit` have their turn; the others get theirs in order of admission.

    A request has its turn from then on until it leaves. Nothing is kept of a key without members.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._with_turn: dict[Hashable, set[int]] = {}
        self._without: dict[Hashable, list[int]] = {}  # seqs, sorted
        self._requests: dict[tuple[Hashable, int], LiveRequest] = {}  # those without a turn

    def __len__(self) -> int:
        """Keys with members."""
        return len(self._with_turn)

    def has_room(self, key: Hashable) -> bool:
        """Who joined now would have its turn at once."""
        return len(self._with_turn.get(key, ())) < self._limit

    def is_eligible(self, key: Hashable, request: LiveRequest) -> bool:
        return request.seq in self._with_turn.get(key, ())

    def add(self, key: Hashable, request: LiveRequest) -> bool:
        """True when it has its turn at once."""
        is_eligible = self.has_room(key)
        if is_eligible:
            self._with_turn.setdefault(key, set()).add(request.seq)
        else:
            insort(self._without.setdefault(key, []), request.seq)
            self._requests[key, request.seq] = request
        return is_eligible

    def end(self, key: Hashable, request: LiveRequest) -> LiveRequest | None:
        """The one who has its turn because of that, if anybody. Harmless for those who never joined."""
        holders = self._with_turn.get(key, set())
        if request.seq in holders:
            holders.remove(request.seq)
            successor = self._first_without(key)
            if successor is not None:
                holders.add(successor.seq)
            elif not holders:
                del self._with_turn[key]
            return successor
        if self._requests.pop((key, request.seq), None) is not None:
            seqs = self._without[key]
            del seqs[bisect_left(seqs, request.seq)]
            if not seqs:
                del self._without[key]
        return None

    def _first_without(self, key: Hashable) -> LiveRequest | None:
        seqs = self._without.get(key)
        if not seqs:
            return None
        seq = seqs.pop(0)
        if not seqs:
            del self._without[key]
        return self._requests.pop((key, seq))
