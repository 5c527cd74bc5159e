"""Requests that belong together take turns."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Hashable

from chatstream.scheduler.request import LiveRequest


class Turns:
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

    def is_free(self, key: Hashable) -> bool:
        """Who joined now would have its turn at once."""
        return len(self._with_turn.get(key, ())) < self._limit

    def has_turn(self, key: Hashable, request: LiveRequest) -> bool:
        return request.seq in self._with_turn.get(key, ())

    def join(self, key: Hashable, request: LiveRequest) -> bool:
        """True when it has its turn at once."""
        has_turn = self.is_free(key)
        if has_turn:
            self._with_turn.setdefault(key, set()).add(request.seq)
        else:
            insort(self._without.setdefault(key, []), request.seq)
            self._requests[key, request.seq] = request
        return has_turn

    def leave(self, key: Hashable, request: LiveRequest) -> LiveRequest | None:
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
