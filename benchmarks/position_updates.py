"""M8: what it costs that everybody in a long line is told their place, for each time that the line moves.

No sockets and no model, virtual time. Places are told in rounds, so that the number of messages is bounded by time and
not by what happens: the more often the line moves, the less each move costs. The baseline tells everybody at once, each
time, as a broadcast does.
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
class Telling:
    """At one rate at which the line moves."""

    changes_per_s: int | None
    """None: a broadcast, for which it does not matter."""
    messages_per_change: float
    us_per_change: float
    """CPU time for telling."""
    us_of_change: float
    """CPU time of the change itself, one leaves and one joins, when nobody is told."""


@dataclass(frozen=True, slots=True)
class Cost:
    """Of some changes, all together."""

    cpu_s: float
    num_messages: int


def measure(num_waiting: int, changes_per_s: int, seconds: float) -> Telling:
    """What telling adds to the same changes without it, in so many virtual seconds."""
    num_changes = max(int(seconds * changes_per_s), 1)
    settings = RuntimeSettings()
    told, untold = (
        run_virtual(_change(num_waiting, changes_per_s, num_changes, RuntimeSettings(position_interval_s=interval_s)))
        for interval_s in (settings.position_interval_s, NEVER_S)
    )
    return Telling(
        changes_per_s,
        (told.num_messages - untold.num_messages) / num_changes,
        1e6 * (told.cpu_s - untold.cpu_s) / num_changes,
        1e6 * untold.cpu_s / num_changes,
    )


def measure_broadcast(num_waiting: int) -> Telling:
    """The baseline."""
    return run_virtual(_broadcast(num_waiting))


class Line:
    """One runs and the others wait; nobody reads."""

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
        """The first one leaves and another joins at the end: everybody's place has changed."""
        self.streams.popleft().close()
        self.streams.append(self.join())

    async def end(self) -> None:
        await self._worker.stop()


async def _run_for_ever() -> AsyncGenerator[TokenDelta, None]:
    await asyncio.Event().wait()
    yield TokenDelta("")


async def _change(num_waiting: int, changes_per_s: int, num_changes: int, settings: RuntimeSettings) -> Cost:
    line = Line(num_waiting, settings)
    await asyncio.sleep(10.0)
    with counting_messages() as num_messages:
        begin_s = time.process_time()
        for _ in range(num_changes):
            line.move()
            await asyncio.sleep(1.0 / changes_per_s)
        cost = Cost(time.process_time() - begin_s, num_messages())
    await line.end()
    return cost


async def _broadcast(num_waiting: int) -> Telling:
    line = Line(num_waiting, RuntimeSettings(position_interval_s=NEVER_S))
    await asyncio.sleep(10.0)
    change_s = telling_s = 0.0
    for _ in range(NUM_BROADCASTS):
        begin_s = time.process_time()
        line.move()
        moved_s = time.process_time()
        for stream in line.streams:
            position = line.scheduler.position(stream.request_id)
            assert position is not None
            stream.log.show_position(Queued(stream.request_id, position))
        change_s += moved_s - begin_s
        telling_s += time.process_time() - moved_s
    num_messages = len(line.streams)
    await line.end()
    return Telling(None, num_messages, 1e6 * telling_s / NUM_BROADCASTS, 1e6 * change_s / NUM_BROADCASTS)


@contextmanager
def counting_messages() -> Iterator[Callable[[], int]]:
    """How many places have been shown so far in the block."""
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
