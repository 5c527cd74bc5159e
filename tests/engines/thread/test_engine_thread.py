"""The engine thread under failures: steps and loads that hang or fail, and streams opened meanwhile."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import asynccontextmanager

import pytest

from chatstream.engines.base import EngineHealth
from chatstream.engines.thread.engine_thread import EngineThread
from chatstream.engines.thread.handover import DeltaBuffer, deltas_of, hand_over
from chatstream.errors import ChatStreamError, ConfigError, EngineUnavailable
from chatstream.types import TokenDelta
from tests.engines.batching.scripted import until

pytestmark = pytest.mark.anyio


class Steps:
    """A `Work` without a model. Each step of open streams waits at `gate`, then raises `failure` if it is set."""

    def __init__(self, *, survives_failure: bool = True) -> None:
        self.survives_failure = survives_failure
        self.gate = threading.Event()
        self.num_steps_begun = 0
        self.failure: BaseException | None = None
        self.set_model_failure: BaseException | None = None
        self.buffers: list[DeltaBuffer] = []
        self.is_closed = False

    def set_model(self, model: str) -> None:
        if self.set_model_failure is not None:
            raise self.set_model_failure

    def run_step(self) -> bool:
        if not self.buffers:
            return False
        self.num_steps_begun += 1
        self.gate.wait()
        failure, self.failure = self.failure, None
        if failure is not None:
            raise failure
        hand_over([(buffer, TokenDelta("x", 1)) for buffer in self.buffers])
        return True

    def end_all(self, error: ChatStreamError) -> None:
        buffers, self.buffers = self.buffers, []
        hand_over([(buffer, error) for buffer in buffers])

    def close(self) -> None:
        self.is_closed = True


class Bench:
    def __init__(self, work: Steps) -> None:
        self.work = work
        self.may_load = threading.Event()
        self.may_load.set()
        self.num_loads = 0
        self.thread = EngineThread("thing", self._load, work)
        self.thread.STOP_TIMEOUT_S = 0.05

    def _load(self) -> str:
        self.num_loads += 1
        self.may_load.wait()
        return "weights"

    async def stream(self) -> AsyncGenerator[TokenDelta, None]:
        self.thread.ready_model()
        buffer = DeltaBuffer(asyncio.get_running_loop(), 2**20, lambda: None)
        self.thread.open(buffer, lambda: self.work.buffers.append(buffer))
        async for delta in deltas_of(
            buffer, on_abandoned=lambda: self.thread.execute(lambda report_done: report_done())
        ):
            yield delta


@asynccontextmanager
async def use(work: Steps) -> AsyncIterator[Bench]:
    bench = Bench(work)
    try:
        async with asyncio.timeout(20):  # a hang is a failure
            yield bench
    finally:
        work.gate.set()
        bench.may_load.set()
        bench.thread.STOP_TIMEOUT_S = 20.0
        await bench.thread.stop()


async def test_an_error_in_set_model_is_a_config_error_of_start() -> None:
    work = Steps()
    work.set_model_failure = ValueError("no room for the pool")
    async with use(work) as bench:
        with pytest.raises(ConfigError, match="cannot load thing: no room for the pool"):
            await bench.thread.start()
        assert not bench.thread.health().is_ready


async def test_stop_ends_the_streams_of_a_step_that_hangs() -> None:
    async with use(Steps()) as bench:
        await bench.thread.start()
        reading = asyncio.create_task(anext(bench.stream()))
        await until(lambda: bench.work.num_steps_begun)
        executing = asyncio.create_task(bench.thread.execute(lambda report_done: report_done()))
        await bench.thread.stop()
        with pytest.raises(EngineUnavailable, match="stopped"):
            await reading
        await executing
        await bench.thread.execute(lambda report_done: report_done())  # returns at once


async def test_start_is_refused_while_a_step_hangs_and_works_once_it_has_ended() -> None:
    async with use(Steps()) as bench:
        await bench.thread.start()
        reading = asyncio.create_task(anext(bench.stream()))
        await until(lambda: bench.work.num_steps_begun)
        await asyncio.gather(bench.thread.stop(), bench.thread.stop())
        with pytest.raises(ConfigError, match="thing is still stopping: its last step or load has not ended"):
            await bench.thread.start()
        assert bench.thread.health() == EngineHealth(False, "stopped")
        bench.work.gate.set()
        await until(lambda: bench.work.is_closed and bench.thread.model is None)
        await asyncio.gather(reading, return_exceptions=True)
        await bench.thread.stop()
        await bench.thread.start()
        assert (await anext(bench.stream())).text == "x"


async def test_a_model_loaded_after_stop_timed_out_is_released() -> None:
    async with use(Steps()) as bench:
        bench.may_load.clear()
        starting = asyncio.create_task(bench.thread.start())
        await until(lambda: bench.num_loads)
        await bench.thread.stop()
        bench.may_load.set()
        await starting
        await until(lambda: bench.work.is_closed)
        bench.thread.STOP_TIMEOUT_S = 20.0
        await bench.thread.stop()
        assert bench.thread.model is None
        with pytest.raises(EngineUnavailable, match="stopped"):
            bench.thread.ready_model()


@pytest.mark.parametrize("survives", [True, False])
async def test_a_stream_opened_during_a_failing_step_is_served_or_ends(survives: bool) -> None:
    work = Steps(survives_failure=survives)
    async with use(work) as bench:
        await bench.thread.start()
        first = asyncio.create_task(anext(bench.stream()))
        await until(lambda: work.num_steps_begun)
        work.failure = RuntimeError("Internal error")
        second = asyncio.create_task(anext(bench.stream()))
        await asyncio.sleep(0)
        work.gate.set()
        with pytest.raises(EngineUnavailable):
            await first
        if survives:
            assert (await second).text == "x"
        else:
            with pytest.raises(EngineUnavailable, match="a step failed"):
                await second
        assert bench.thread.health() == (EngineHealth(True) if survives else EngineHealth(False, "a step failed"))


async def test_open_raises_when_the_thread_has_ended() -> None:
    work = Steps(survives_failure=False)
    async with use(work) as bench:
        await bench.thread.start()
        work.failure = RuntimeError("Internal error")
        work.gate.set()
        with pytest.raises(EngineUnavailable):
            await anext(bench.stream())
        await until(lambda: work.is_closed)
        with pytest.raises(EngineUnavailable, match="a step failed"):  # the thread ended after `ready_model`
            bench.thread.open(DeltaBuffer(asyncio.get_running_loop(), 1, lambda: None), lambda: None)
