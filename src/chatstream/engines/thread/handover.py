"""Deltas from the engine thread to the event loop. All deltas of one step wake the event loop once."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeAlias

from chatstream.errors import ChatStreamError
from chatstream.types import TokenDelta

Item: TypeAlias = TokenDelta | ChatStreamError
"""An element of a stream, or the error that ends it."""


class DeltaBuffer:
    """A bounded, lock-free buffer of deltas: from the engine thread to one `stream()` on the event loop.

    Each counter has one writer: the engine thread counts the tokens sent, the event loop the tokens taken. Their
    difference is the number of buffered tokens. A delta that only reports prefill progress has no tokens and does not
    count: such deltas are few, and a prefill does not wait for its reader.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, max_undelivered: int, wake_engine: Callable[[], None]) -> None:
        """`max_undelivered` bounds the buffered tokens. `wake_engine` is called when a full buffer has room again."""
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
            # The reader lags behind. Yield to the event loop, so that lagging streams catch up one token at a time.
            await asyncio.sleep(0)
        while not self._items:
            self._waiter = self.loop.create_future()
            await self._waiter
        item = self._items.popleft()
        if isinstance(item, TokenDelta):
            # Store, then load; the engine thread does the mirror image. At least one side sees the other's write, so
            # no wake-up is lost.
            taken_before = self._tokens_taken
            self._tokens_taken = taken_before + item.num_tokens
            if self.tokens_sent - taken_before >= self._max_undelivered:
                self._wake_engine()
        return item


async def deltas_of(
    buffer: DeltaBuffer, *, on_abandoned: Callable[[], Awaitable[None]]
) -> AsyncGenerator[TokenDelta, None]:
    """Yield the deltas of one stream up to the last one, or raise the error that ends the stream.

    `on_abandoned` is awaited when the reader stops before the end.
    """
    has_ended = False
    try:
        while not has_ended:
            delta = await buffer.get()
            if isinstance(delta, ChatStreamError):
                has_ended = True
                raise delta
            has_ended = delta.finish_reason is not None
            yield delta
    finally:
        if not has_ended:
            await on_abandoned()


def hand_over(deliveries: Sequence[tuple[DeltaBuffer, Item]]) -> None:
    """Put each item into its buffer, on the event loop of the buffer. Wakes each event loop once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[DeltaBuffer, Item]]] = {}
    for delivery in deliveries:
        by_loop.setdefault(delivery[0].loop, []).append(delivery)
    for loop, batch in by_loop.items():
        _call_on(loop, _put_all, batch)


def _put_all(batch: Sequence[tuple[DeltaBuffer, Item]]) -> None:
    for buffer, item in batch:
        buffer.put(item)


def resolver(loop: asyncio.AbstractEventLoop, future: asyncio.Future[None]) -> Callable[[Exception | None], None]:
    """A thread-safe function that completes the future: with a result for None, else with the exception."""

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
        pass  # the loop is closed, and its streams with it
