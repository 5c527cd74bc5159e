"""A worker with a fake engine and a checked event log, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Coroutine
from dataclasses import replace
from functools import partial, wraps
from typing import Any

from chatstream.runtime import End, QueueWorker, RequestStream, RuntimeSettings
from chatstream.scheduler import Arrival, Scheduler, SchedulerSettings
from chatstream.scheduler import events as ev
from chatstream.testing import FakeEngine, History, run_virtual
from chatstream.types import Done, Failed, GenerationRequest, PreparedPrompt, StreamEvent


def in_virtual_time(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a coroutine test in virtual time."""

    @wraps(test)
    def run(*args: object, **kwargs: object) -> None:
        run_virtual(test(*args, **kwargs))

    return run


class Harness:
    """The stack between a client and an engine. `check_nothing_is_left` checks for leaks."""

    def __init__(
        self,
        engine: FakeEngine | None = None,
        *,
        is_started: bool = True,
        can_preempt: bool = False,
        runtime: RuntimeSettings | None = None,
        observers: tuple[Callable[[ev.Event], None], ...] = (),
        **settings: object,
    ) -> None:
        self.engine = engine or FakeEngine(step_s=0.1)
        self.settings = replace(SchedulerSettings(), **settings)  # type: ignore[arg-type]
        self.history = History(
            self.settings.first_concurrency,
            int(self.settings.max_queue_size),
            is_fcfs=self.settings.policy == "fcfs",
            has_slices=can_preempt,
        )
        self.log: list[ev.Event] = []
        self.scheduler = Scheduler(self.settings)
        self.worker = QueueWorker(self.scheduler, runtime)
        for observer in (self._observe, *observers):
            self.worker.observe(observer)
        self.ends: dict[str, list[End]] = {}
        if is_started:
            self.worker.start(preemptible=self.engine if can_preempt else None)

    def submit(
        self, request_id: str, *, on_end: Callable[[End], object] | None = None, **details: object
    ) -> RequestStream:
        """`on_end` is called after the harness has recorded the end."""
        request = GenerationRequest(request_id, PreparedPrompt())

        def record_end(end: End) -> None:
            self.ends.setdefault(request_id, []).append(end)
            if on_end is not None:
                on_end(end)

        return self.worker.submit(
            Arrival(request_id=request_id, **details),  # type: ignore[arg-type]
            partial(self.engine.stream, request),
            on_end=record_end,
        )

    async def check_nothing_is_left(self) -> None:
        """No slot, queued request, record or task is left; each request has one end; the event log is valid."""
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        stats = self.worker.stats()
        assert (stats.running, stats.waiting) == (0, 0)
        assert not self.engine.active
        assert not any(self.worker.records().values()), self.worker.records()
        assert len(asyncio.all_tasks()) == 1, asyncio.all_tasks()
        self.history.check_complete()
        assert all(len(ends) == 1 for ends in self.ends.values())
        assert set(self.ends) == set(self.history.ended)

    def _observe(self, event: ev.Event) -> None:
        self.history.feed([event])
        self.log.append(event)


async def read(stream: RequestStream) -> list[StreamEvent]:
    """All events until the end. Checks that exactly one last event ends the stream."""
    events = [event async for event in stream]
    assert isinstance(events[-1], Done | Failed)
    assert not any(isinstance(event, Done | Failed) for event in events[:-1])
    return events


def kinds(events: list[StreamEvent]) -> list[str]:
    return [event.type for event in events]


def text(events: list[StreamEvent]) -> str:
    return "".join(event.text for event in events if event.type == "token")


async def eventually(condition: Callable[[], bool] | Callable[[], Awaitable[bool]]) -> None:
    """Run the event loop until the condition holds."""
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0)
    raise AssertionError("the condition never became true")
