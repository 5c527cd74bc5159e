"""From the engine's thread to the event loop: what was generated in one step wakes the loop once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeAlias

from chatstream.errors import ChatStreamError
from chatstream.types import TokenDelta

Item: TypeAlias = TokenDelta | ChatStreamError
"""What a stream yields, or the error that ends it."""


class Outbox:
    """Deltas on their way from the engine's thread to one `stream()` on the event loop.

    Each counter has one writer, so that neither thread needs a lock: the engine counts the tokens it sent, the loop
    those that were taken; the difference bounds what lies between them. Deltas that only tell how far a prompt has
    been read count nothing: they are few, and reading a prompt waits for no reader.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_undelivered: int, wake_engine: Callable[[], None]) -> None:
        self.loop = loop
        self.tokens_sent = 0
        self._tokens_taken = 0
        self._max_undelivered = max_undelivered
        self._wake_engine = wake_engine
        self._items: deque[Item] = deque()
        self._waiter: asyncio.Future[None] | None = None

    @property
    def is_full(self) -> bool:
        return self.tokens_sent - self._tokens_taken >= self._max_undelivered

    def put(self, item: Item) -> None:
        self._items.append(item)
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    async def get(self) -> Item:
        if self._items:
            # Behind the engine: catch up in turns with the other streams, a token each, as they were generated.
            await asyncio.sleep(0)
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, TokenDelta):
            # Counted first, looked at then: the engine's thread does the same the other way round, so that whenever
            # they do so at once, one of them sees what the other did.
            taken_before = self._tokens_taken
            self._tokens_taken = taken_before + item.num_tokens
            if self.tokens_sent - taken_before >= self._max_undelivered:
                self._wake_engine()
        return item


async def deltas_of(outbox: Outbox, *, leave: Callable[[], Awaitable[None]]) -> AsyncGenerator[TokenDelta, None]:
    """What an engine's `stream` yields: to the last delta, or the error that ends it.

    `leave` is awaited when the reader stops before the end.
    """
    has_ended = False
    try:
        while not has_ended:
            delta = await outbox.get()
            if isinstance(delta, ChatStreamError):
                has_ended = True
                raise delta
            has_ended = delta.finish_reason is not None
            yield delta
    finally:
        if not has_ended:
            await leave()


def hand_over(deliveries: Sequence[tuple[Outbox, Item]]) -> None:
    """One wake-up of the event loop for a whole step."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Outbox, Item]]] = {}
    for delivery in deliveries:
        by_loop.setdefault(delivery[0].loop, []).append(delivery)
    for loop, batch in by_loop.items():
        _call_on(loop, _put_all, batch)


def _put_all(batch: Sequence[tuple[Outbox, Item]]) -> None:
    for outbox, item in batch:
        outbox.put(item)


def resolver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> Callable[[Exception | None], None]:
    """A function any thread may call to end the future: with None, or with an exception."""

    def resolve(error: Exception | None) -> None:
        if future.done():
            return
        if error is None:
            future.set_result(None)
        else:
            future.set_exception(error)

    return lambda error: _call_on(loop, resolve, error)


def _call_on(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: object) -> None:
    try:
        loop.call_soon_threadsafe(function, *args)
    except RuntimeError:
        pass  # the loop is closed: nobody is left to tell
