"""M8: the cost of position updates in a long queue, per change of the queue.

Virtual time, no sockets, no model. Positions are sent in rounds, so time bounds the number of messages: the more often
the queue changes, the less each change costs. The baseline is a broadcast to all waiting requests at every change.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count

from chatstream.runtime import QueueWorker, RequestStream, RuntimeSettings
from chatstream.runtime.stream import EventLog
from chatstream.scheduler import Arrival, Scheduler, SchedulerSettings
from chatstream.testing import run_virtual
from chatstream.types import Queued, TokenDelta

CHANGES_PER_S = (10, 100, 1_000, 10_000)
NUM_BROADCASTS = 20
NEVER_S = 1e9


@dataclass(frozen=True, slots=True)
class UpdateCost:
    """The cost at one rate of changes."""

    changes_per_s: int | None
    """None for the broadcast, where the rate has no effect."""
    messages_per_change: float
    us_per_change: float
    """CPU time of the updates."""
    us_of_change: float
    """CPU time of the change alone: one request is withdrawn and one is admitted, without updates."""


@dataclass(frozen=True, slots=True)
class Cost:
    """The total cost of a series of changes."""

    cpu_s: float
    num_messages: int


def measure(num_waiting: int, changes_per_s: int, seconds: float) -> UpdateCost:
    """Return the cost of updates over `seconds` of virtual time: the difference to the same changes without updates."""
    num_changes = max(int(seconds * changes_per_s), 1)
    settings = RuntimeSettings()
    with_updates, without_updates = (
        run_virtual(_change(num_waiting, changes_per_s, num_changes, RuntimeSettings(position_interval_s=interval_s)))
        for interval_s in (settings.position_interval_s, NEVER_S)
    )
    return UpdateCost(
        changes_per_s,
        (with_updates.num_messages - without_updates.num_messages) / num_changes,
        1e6 * (with_updates.cpu_s - without_updates.cpu_s) / num_changes,
        1e6 * without_updates.cpu_s / num_changes,
    )


def measure_broadcast(num_waiting: int) -> UpdateCost:
    """Return the cost of the baseline."""
    return run_virtual(_broadcast(num_waiting))


class Queue:
    """One running and `num_waiting` waiting requests without readers."""

    def __init__(self, num_waiting: int, settings: RuntimeSettings) -> None:
        self.scheduler = Scheduler(SchedulerSettings(max_concurrency=1, max_queue_size=num_waiting + 1))
        self._worker = QueueWorker(self.scheduler, settings)
        self._worker.start()
        self._count = count()
        self.streams: deque[RequestStream] = deque()
        self._running = self.join()
        self.streams.extend(self.join() for _ in range(num_waiting))

    def join(self) -> RequestStream:
        return self._worker.submit(Arrival(request_id=f"r{next(self._count)}"), _run_for_ever)

    def move(self) -> None:
        """Withdraw the first request and admit another at the end, which changes every position."""
        self.streams.popleft().close()
        self.streams.append(self.join())

    async def end(self) -> None:
        await self._worker.stop()


async def _run_for_ever() -> AsyncGenerator[TokenDelta, None]:
    await asyncio.Event().wait()
    yield TokenDelta("")


async def _change(num_waiting: int, changes_per_s: int, num_changes: int, settings: RuntimeSettings) -> Cost:
    queue = Queue(num_waiting, settings)
    await asyncio.sleep(10.0)
    with counting_messages() as num_messages:
        begin_s = time.process_time()
        for _ in range(num_changes):
            queue.move()
            await asyncio.sleep(1.0 / changes_per_s)
        cost = Cost(time.process_time() - begin_s, num_messages())
    await queue.end()
    return cost


async def _broadcast(num_waiting: int) -> UpdateCost:
    queue = Queue(num_waiting, RuntimeSettings(position_interval_s=NEVER_S))
    await asyncio.sleep(10.0)
    change_s = update_s = 0.0
    for _ in range(NUM_BROADCASTS):
        begin_s = time.process_time()
        queue.move()
        moved_s = time.process_time()
        for stream in queue.streams:
            position = queue.scheduler.position(stream.request_id)
            assert position is not None
            stream.log.show_position(Queued(stream.request_id, position))
        change_s += moved_s - begin_s
        update_s += time.process_time() - moved_s
    num_messages = len(queue.streams)
    await queue.end()
    return UpdateCost(None, num_messages, 1e6 * update_s / NUM_BROADCASTS, 1e6 * change_s / NUM_BROADCASTS)


@contextmanager
def counting_messages() -> Iterator[Callable[[], int]]:
    """Yield a function that returns the number of positions sent in the block."""
    shown = 0
    show_position = EventLog.show_position

    def counted(log: EventLog, queued: Queued) -> None:
        nonlocal shown
        shown += 1
        show_position(log, queued)

    EventLog.show_position = counted  # type: ignore[method-assign, assignment]
    try:
        yield lambda: shown
    finally:
        EventLog.show_position = show_position  # type: ignore[method-assign]
