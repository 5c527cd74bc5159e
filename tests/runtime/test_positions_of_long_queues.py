"""Everybody in a long line hears of their place in time, and nobody too often."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator

import pytest

from chatstream.runtime import QueueWorker, RequestStream
from chatstream.scheduler import Arrival, Scheduler, SchedulerSettings
from chatstream.testing import run_virtual
from chatstream.types import Queued, TokenDelta


async def run_for_ever() -> AsyncGenerator[TokenDelta, None]:
    await asyncio.Event().wait()
    yield TokenDelta("")


@pytest.mark.parametrize("num_waiting", [100, 900, 1_100, 3_000, 6_000])
def test_while_the_line_moves_each_is_told_at_least_every_two_seconds_and_at_most_every_one(num_waiting: int) -> None:
    """Ten times a second the first one leaves and another joins: everybody's place changes all the time."""
    gaps_s: list[float] = []

    async def read(stream: RequestStream) -> None:
        told_s: float | None = None
        async for event in stream:
            now_s = asyncio.get_running_loop().time()
            if isinstance(event, Queued) and told_s is not None:
                gaps_s.append(now_s - told_s)
            told_s = now_s

    async def run() -> None:
        worker = QueueWorker(Scheduler(SchedulerSettings(max_concurrency=1, max_queue_size=num_waiting)))
        worker.start()
        line: deque[RequestStream] = deque()
        readers = []
        for n in range(num_waiting + 1 + 60):
            if n > num_waiting:
                line.popleft().close()
                await asyncio.sleep(0.1)
            stream = worker.submit(Arrival(request_id=f"r{n}"), run_for_ever)
            readers.append(asyncio.create_task(read(stream)))
            if n > 0:  # the first one runs
                line.append(stream)
        await worker.stop()
        await asyncio.gather(*readers)

    run_virtual(run())
    assert len(gaps_s) >= 2 * min(num_waiting, 50)
    assert max(gaps_s) <= 2.0
    assert min(gaps_s) >= 0.98
