"""The child's side: makes the engine that it is told to, and does for it what the parent asks. Knows no policy."""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import logging
import os
import pickle
import signal
import socket
import sys
from collections.abc import Coroutine
from contextlib import aclosing
from typing import Any, cast

from chatstream.engines.base import Engine, Preemptible, stats_of
from chatstream.engines.process import channel
from chatstream.errors import ChatStreamError, EngineError, EngineUnavailable
from chatstream.types import GenerationRequest, PreparedPrompt

logger = logging.getLogger(__name__)

NICENESS = 5
"""Above the parent's: its threads never rest, and the kernel lets whoever answers clients go first. On 2 cores with 16
streams the answer to a question for health took 2.2 to 2.7 ms instead of 3.3 to 6.1, at the same tokens a second."""
IDLE_TURNS = 10
"""Of the event loop; a generation that brings nothing in so many has nothing that can be read without waiting."""


def main(connection_fd: int) -> None:
    """All of the child. Never returns: the process ends with the connection."""
    # Whoever ends the server may tell all of its processes, as systemd does. It drains then, and needs this one.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    faulthandler.enable()
    os.nice(NICENESS)
    asyncio.run(_serve(socket.socket(fileno=connection_fd)))


async def _serve(connection: socket.socket) -> None:
    await _Child(connection).serve()


class _Child:
    def __init__(self, connection: socket.socket) -> None:
        self._parent_pid = os.getppid()
        self._channel = channel.Channel(connection, self._obey, lambda _: _end_process())
        self._engine: Engine | None = None
        self._calls: dict[int, asyncio.Task[Any]] = {}
        self._readers: dict[str, _Reader] = {}
        """Of the generations that are open, by their request."""
        self._background: list[asyncio.Task[None]] = []

    async def serve(self) -> None:
        await self._channel.open()
        await asyncio.Event().wait()

    # --- orders -------------------------------------------------------------------------------------------------
    # All that reaches the engine begins in a later turn of the event loop, in the order in which it was said.

    def _obey(self, order: channel.Order) -> None:
        match order:
            case channel.Load(call, recipe, heartbeat_s, log_levels):
                self._begin(call, self._load(recipe, heartbeat_s, log_levels))
            case channel.Prepare(call, asked):
                self._begin(call, self._prepare(asked))
            case channel.Open(call, request_id, request, is_preempted):
                self._readers[request_id] = reader = _Reader(is_preempted)
                generating = self._begin(call, self._generate(call, request, reader))
                generating.add_done_callback(lambda _: self._readers.pop(request_id, None))
            case channel.Taken(request_id, num_deltas):
                if request_id in self._readers:
                    self._readers[request_id].take(num_deltas)
            case channel.Preempt(call, request_id):
                self._set_preempted(request_id, True)
                self._begin(call, self._preempt(request_id))
            case channel.Resume(request_id):
                self._set_preempted(request_id, False)
                asyncio.get_running_loop().call_soon(self._preemptible.resume, request_id)
            case channel.Close(call):
                if call in self._calls:
                    self._calls[call].cancel()
            case channel.Stop():
                self._background.append(asyncio.create_task(self._stop()))

    def _begin(self, call: int, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._calls[call] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._end(call, task))
        return task

    def _end(self, call: int, task: asyncio.Task[Any]) -> None:
        del self._calls[call]
        error = EngineError("the engine cancelled itself") if task.cancelled() else task.exception()
        if isinstance(error, EngineUnavailable) and self._engine is not None:
            # Before: if this engine is of no use any more, who is tried again must not come back to it.
            self._say(channel.Heartbeat(self._engine.health(), stats_of(self._engine)))
        try:
            self._say(channel.Ended(call, task.result() if error is None else _as_ours(error)))
        except Exception as unspeakable:
            self._say(channel.Ended(call, _as_ours(unspeakable)))

    async def _load(self, recipe: bytes, heartbeat_s: float, log_levels: dict[str, int]) -> channel.Loaded:
        self._forward_logs(log_levels)
        engine: Engine = pickle.loads(recipe)()
        self._background.append(asyncio.create_task(self._beat(engine, heartbeat_s)))
        await engine.start()
        self._engine = engine
        # What has been loaded stays: Python's collector need not look at it again between two steps.
        gc.collect()
        gc.freeze()
        return channel.Loaded(engine.capacity, engine.default_sampling)

    async def _prepare(self, asked: bytes) -> PreparedPrompt:
        prompt, sampling, may_drop_history = channel.unpack(asked, "prompt")
        return await self._ready_engine.prepare(prompt, sampling, may_drop_history=may_drop_history)

    async def _generate(self, call: int, packed: bytes, reader: _Reader) -> None:
        request: GenerationRequest = channel.unpack(packed, "token_mask")
        await reader.wait_resumed()
        async with aclosing(self._ready_engine.stream(request)) as deltas:
            async for delta in deltas:
                self._say(channel.Delta(call, delta))
                reader.num_sent += 1
                if delta.finish_reason is None:
                    await reader.wait_room()

    async def _preempt(self, request_id: str) -> None:
        """What was generated before must be on its way, too: then it can be read without waiting."""
        await self._preemptible.preempt(request_id)
        num_idle, num_sent = 0, -1
        while num_idle < IDLE_TURNS and (reader := self._readers.get(request_id)):
            num_idle = num_idle + 1 if reader.num_sent == num_sent else 0
            num_sent = reader.num_sent
            await asyncio.sleep(0)

    def _set_preempted(self, request_id: str, is_preempted: bool) -> None:
        if request_id in self._readers:
            self._readers[request_id].set_preempted(is_preempted)

    async def _stop(self) -> None:
        try:
            await self._ready_engine.stop()
        except BaseException:  # libraries written in Rust panic with one
            logger.exception("the engine did not stop as it should")
            await asyncio.sleep(0)  # then that has been said
        self._channel.close()

    # --- reports ------------------------------------------------------------------------------------------------

    def _say(self, report: channel.Report) -> None:
        self._channel.send(report)

    async def _beat(self, engine: Engine, heartbeat_s: float) -> None:
        while True:
            self._say(channel.Heartbeat(engine.health(), stats_of(engine)))
            await asyncio.sleep(heartbeat_s)
            if os.getppid() != self._parent_pid:
                _end_process()  # somebody who was forked from the parent holds its end of the connection open

    def _forward_logs(self, levels: dict[str, int]) -> None:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger().addHandler(_LogToParent(self._channel))

    @property
    def _ready_engine(self) -> Engine:
        assert self._engine is not None, "the parent waits for Loaded"
        return self._engine

    @property
    def _preemptible(self) -> Preemptible:
        return cast(Preemptible, self._ready_engine)


class _Reader:
    """The parent's reader of one generation, as far as the child knows of it."""

    def __init__(self, is_preempted: bool) -> None:
        self.num_sent = 0
        self._num_taken = 0
        self._is_preempted = is_preempted
        self._changed = asyncio.Event()

    def take(self, num_deltas: int) -> None:
        self._num_taken += num_deltas
        self._changed.set()

    def set_preempted(self, is_preempted: bool) -> None:
        self._is_preempted = is_preempted
        self._changed.set()

    async def wait_resumed(self) -> None:
        while self._is_preempted:
            await self._wait_change()

    async def wait_room(self) -> None:
        """While it is preempted there always is: the engine makes no more, and what it has made must be readable."""
        while self.num_sent - self._num_taken >= channel.MAX_UNREAD and not self._is_preempted:
            await self._wait_change()

    async def _wait_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _LogToParent(logging.Handler):
    """The parent's settings decide what becomes of a record. May be called in any thread."""

    def __init__(self, parent: channel.Channel) -> None:
        super().__init__()
        self._parent = parent
        self._loop = asyncio.get_running_loop()

    def emit(self, record: logging.LogRecord) -> None:
        try:
            log = channel.Log(record.name, record.levelno, self.format(record))
            self._loop.call_soon_threadsafe(self._send, log)
        except Exception:
            self.handleError(record)

    def _send(self, log: channel.Log) -> None:
        if not self._parent.is_congested:  # else it is lost: what nobody reads must not grow
            self._parent.send(log)


def _end_process() -> None:
    """No parent, nobody to generate for. Not gently: a step in progress or a library's farewell could hold it up."""
    sys.stderr.flush()
    os._exit(0)


def _as_ours(error: BaseException) -> ChatStreamError:
    """An error that the parent can read: of our tree, without what foreign code has put into it."""
    if not isinstance(error, ChatStreamError):
        logger.error("the engine failed", exc_info=error)
        return EngineError(f"the engine failed: {type(error).__name__}")
    ours: type[ChatStreamError] = next(c for c in type(error).__mro__ if c.__module__ == ChatStreamError.__module__)
    return ours(error.message, param=error.param, retry_after_s=error.retry_after_s)
