"""Which API key may act on which request. Without keys the request id is enough, because it cannot be guessed."""

from __future__ import annotations

from collections.abc import Callable

from cachetools import TTLCache

REMEMBERED_S = 60.0
"""An ended request stays known for this long, so that a second cancel is harmless."""
MAX_REMEMBERED = 10_000


class RequestOwners:
    """The owners of live requests and of requests that ended recently."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock` is called inside the event loop; seconds."""
        self._live: dict[str, str] = {}
        self._ended: TTLCache[str, str] = TTLCache(MAX_REMEMBERED, REMEMBERED_S, timer=clock)

    def __len__(self) -> int:
        """Number of live requests."""
        return len(self._live)

    def add(self, request_id: str, owner: str) -> None:
        """Add a live request. Call it before the request can end. `owner` is empty if the server has no keys."""
        self._live[request_id] = owner

    def forget(self, request_id: str) -> None:
        """Remove a rejected request."""
        del self._live[request_id]

    def end(self, request_id: str) -> None:
        owner = self._live.pop(request_id, None)
        if owner is not None:
            self._ended[request_id] = owner

    def is_known(self, request_id: str) -> bool:
        """Whether the request is live or ended less than `REMEMBERED_S` ago."""
        return request_id in self._live or request_id in self._ended

    def is_owner(self, request_id: str, owner: str) -> bool:
        """Whether `owner` owns the request; False for an unknown request."""
        return self._live.get(request_id, self._ended.get(request_id)) == owner

    def may_cancel(self, request_id: str, owner: str, *, is_admin: bool) -> bool:
        """Its owner may cancel a request, and an operator any request that is known."""
        return self.is_known(request_id) if is_admin else self.is_owner(request_id, owner)
