"""Each request in a long queue gets position updates in time, and none too often."""

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
def test_while_the_queue_moves_each_request_is_updated_every_one_to_two_seconds(num_waiting: int) -> None:
    """Ten times a second the first request disconnects and another joins: all positions keep changing."""
    gaps_s: list[float] = []

    async def read(stream: RequestStream) -> None:
        sent_s: float | None = None
        async for event in stream:
            now_s = asyncio.get_running_loop().time()
            if isinstance(event, Queued) and sent_s is not None:
                gaps_s.append(now_s - sent_s)
            sent_s = now_s

    async def run() -> None:
        worker = QueueWorker(Scheduler(SchedulerSettings(max_concurrency=1, max_queue_size=num_waiting)))
        worker.start()
        queue: deque[RequestStream] = deque()
        readers = []
        for n in range(num_waiting + 1 + 60):
            if n > num_waiting:
                queue.popleft().close()
                await asyncio.sleep(0.1)
            stream = worker.submit(Arrival(request_id=f"r{n}"), run_for_ever)
            readers.append(asyncio.create_task(read(stream)))
            if n > 0:  # the first request runs
                queue.append(stream)
        await worker.stop()
        await asyncio.gather(*readers)

    run_virtual(run())
    assert len(gaps_s) >= 2 * min(num_waiting, 50)
    assert max(gaps_s) <= 2.0
    assert min(gaps_s) >= 0.98
