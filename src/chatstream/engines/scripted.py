"""The base class of engines without a model: state, preemption, and a clock per generation instead of computation."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

from chatstream.engines.base import Capacity, EngineHealth, EngineStats
from chatstream.errors import EngineUnavailable
from chatstream.types import SamplingParams


class ScriptedEngine:
    """An `Engine` that can preempt, without `prepare` and `stream`, which a subclass adds.

    `stream` of the subclass runs inside `_generating` and waits on the clock that `_generating` yields.
    """

    def __init__(self, model_name: str) -> None:
        self._model_name = model_name
        self._is_started = False
        self._generations: dict[str, Clock] = {}

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        return Capacity(can_preempt=True)

    @property
    def default_sampling(self) -> SamplingParams:
        return SamplingParams()

    async def start(self) -> None:
        self._is_started = True

    async def stop(self) -> None:
        self._is_started = False
        for clock in self._generations.values():
            clock.stop()

    def health(self) -> EngineHealth:
        return EngineHealth(self._is_started, "" if self._is_started else "not started")

    def stats(self) -> EngineStats:
        return EngineStats(num_slots=len(self._generations))

    async def preempt(self, request_id: str) -> None:
        if request_id in self._generations:
            self._generations[request_id].preempt()

    def resume(self, request_id: str) -> None:
        if request_id in self._generations:
            self._generations[request_id].resume()

    @contextmanager
    def _generating(self, request_id: str) -> Iterator[Clock]:
        """Inside this context `request_id` can be preempted and counts as a slot in use."""
        self._generations[request_id] = clock = Clock()
        try:
            yield clock
        finally:
            self._generations.pop(request_id, None)


class Clock:
    """The time of one generation, in seconds. It does not advance while the generation is preempted."""

    def __init__(self) -> None:
        self.is_preempted = False
        self._is_stopped = False
        self._preempted_at_s = 0.0
        self._preempted_s = 0.0
        """Total time spent preempted, up to the last `resume`."""
        self._sleep: asyncio.Future[None] | None = None

    def time_s(self) -> float:
        now_s = self._preempted_at_s if self.is_preempted else asyncio.get_running_loop().time()
        return now_s - self._preempted_s

    def preempt(self) -> None:
        if not self.is_preempted and not self._is_stopped:
            self._preempted_at_s = asyncio.get_running_loop().time()
            self.is_preempted = True
            self._wake()

    def resume(self) -> None:
        if self.is_preempted:
            self._preempted_s += asyncio.get_running_loop().time() - self._preempted_at_s
            self.is_preempted = False
            self._wake()

    def stop(self) -> None:
        self._is_stopped = True
        self._wake()

    async def wait_until(self, due_s: float) -> None:
        """Return when this clock reads `due_s`, at least one tick of the event loop later.

        Raises `EngineUnavailable` if the engine stops.
        """
        loop = asyncio.get_running_loop()
        while not self._is_stopped:
            self._sleep = loop.create_future()
            timer = None if self.is_preempted else loop.call_later(due_s - self.time_s(), self._wake)
            try:
                await self._sleep
            finally:
                if timer is not None:
                    timer.cancel()
            is_due = not self.is_preempted and due_s - self.time_s() < 1e-9  # rounding
            if is_due and not self._is_stopped:
                return
        raise EngineUnavailable("the engine was stopped")

    def _wake(self) -> None:
        if self._sleep is not None and not self._sleep.done():
            self._sleep.set_result(None)
