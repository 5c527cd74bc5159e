"""Which API key may act on which request. Without keys, the id of a request, which cannot be guessed, is enough."""

from __future__ import annotations

from collections.abc import Callable

from cachetools import TTLCache

REMEMBERED_S = 60.0
"""For this long after its end a request is still known, so that cancelling it twice is harmless."""
MAX_REMEMBERED = 10_000


class RequestOwners:
    """The owners of the live requests, and of those that ended a short time ago."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is called inside the event loop; seconds."""
        self._live: dict[str, str] = {}
        self._ended: TTLCache[str, str] = TTLCache(MAX_REMEMBERED, REMEMBERED_S, timer=clock)

    def __len__(self) -> int:
        """Live requests."""
        return len(self._live)

    def add(self, request_id: str, owner: str) -> None:
        """Call it before the request can end. `owner` is empty where there are no keys."""
        self._live[request_id] = owner

    def forget(self, request_id: str) -> None:
        """The request was rejected: it never existed."""
        del self._live[request_id]

    def end(self, request_id: str) -> None:
        owner = self._live.pop(request_id, None)
        if owner is not None:
            self._ended[request_id] = owner

    def knows(self, request_id: str) -> bool:
        """The request is live, or ended less than `REMEMBERED_S` ago."""
        return request_id in self._live or request_id in self._ended

    def is_owner(self, request_id: str, owner: str) -> bool:
        """False also for an unknown request."""
        return self._live.get(request_id, self._ended.get(request_id)) == owner
