"""The code of the child process: it creates the engine and carries out the parent's commands. It knows no policy."""

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
"""Added to the parent's niceness, so that the kernel prefers the process that answers clients over threads that always
compute. On 2 cores with 16 streams a health check took 2.2 to 2.7 ms instead of 3.3 to 6.1, at the same number of
tokens a second."""
NUM_IDLE_TICKS = 10
"""Ticks of the event loop without a new delta after which a preempted generation has no delta left to send."""


def main(connection_fd: int) -> None:
    """Entry point of the child process. Never returns: the process ends with the connection."""
    # A service manager such as systemd may signal all processes of the server. The parent then drains, and needs this
    # process until it has.
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
        self._channel = channel.Channel(connection, self._execute, lambda _: _end_process())
        self._engine: Engine | None = None
        self._calls: dict[int, asyncio.Task[Any]] = {}
        self._windows: dict[str, _Window] = {}
        """Flow control of the open generations, by request id."""
        self._background: list[asyncio.Task[None]] = []

    async def serve(self) -> None:
        await self._channel.open()
        await asyncio.Event().wait()

    # --- commands -----------------------------------------------------------------------------------------------
    # Every call of the engine starts in a later tick of the event loop, in the order of the commands.

    def _execute(self, command: channel.Command) -> None:
        match command:
            case channel.Load(call, recipe, heartbeat_s, log_levels):
                self._start_call(call, self._load(recipe, heartbeat_s, log_levels))
            case channel.Prepare(call, arguments):
                self._start_call(call, self._prepare(arguments))
            case channel.Open(call, request_id, request, is_preempted):
                self._windows[request_id] = window = _Window(is_preempted)
                generating = self._start_call(call, self._generate(call, request, window))
                generating.add_done_callback(lambda _: self._windows.pop(request_id, None))
            case channel.Acknowledge(request_id, num_deltas):
                if request_id in self._windows:
                    self._windows[request_id].acknowledge(num_deltas)
            case channel.Preempt(call, request_id):
                self._set_preempted(request_id, True)
                self._start_call(call, self._preempt(request_id))
            case channel.Resume(request_id):
                self._set_preempted(request_id, False)
                asyncio.get_running_loop().call_soon(self._preemptible.resume, request_id)
            case channel.Close(call):
                if call in self._calls:
                    self._calls[call].cancel()
            case channel.Stop():
                self._background.append(asyncio.create_task(self._stop()))

    def _start_call(self, call: int, work: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self._calls[call] = asyncio.create_task(work)
        task.add_done_callback(lambda _: self._end_call(call, task))
        return task

    def _end_call(self, call: int, task: asyncio.Task[Any]) -> None:
        del self._calls[call]
        error = EngineError("the engine cancelled itself") if task.cancelled() else task.exception()
        if isinstance(error, EngineUnavailable) and self._engine is not None:
            # Report the health first: if this engine has failed, a retried request must not reach it again.
            self._send(channel.Heartbeat(self._engine.health(), stats_of(self._engine)))
        try:
            self._send(channel.Ended(call, task.result() if error is None else _as_chatstream_error(error)))
        except Exception as send_error:
            self._send(channel.Ended(call, _as_chatstream_error(send_error)))

    async def _load(self, recipe: bytes, heartbeat_s: float, log_levels: dict[str, int]) -> channel.Loaded:
        self._forward_logs(log_levels)
        engine: Engine = pickle.loads(recipe)()
        self._background.append(asyncio.create_task(self._send_heartbeats(engine, heartbeat_s)))
        await engine.start()
        self._engine = engine
        # The loaded model stays; the garbage collector need not scan it between two steps.
        gc.collect()
        gc.freeze()
        return channel.Loaded(engine.capacity, engine.default_sampling)

    async def _prepare(self, arguments: bytes) -> PreparedPrompt:
        prompt, sampling, may_drop_history = channel.unpack(arguments, "prompt")
        return await self._ready_engine.prepare(prompt, sampling, may_drop_history=may_drop_history)

    async def _generate(self, call: int, packed: bytes, window: _Window) -> None:
        request: GenerationRequest = channel.unpack(packed, "token_mask")
        await window.wait_until_resumed()
        async with aclosing(self._ready_engine.stream(request)) as deltas:
            async for delta in deltas:
                self._send(channel.Delta(call, delta))
                window.num_sent += 1
                if delta.finish_reason is None:
                    await window.wait_for_capacity()

    async def _preempt(self, request_id: str) -> None:
        """Ends when the deltas generated before have been sent, so that the parent can read them without waiting."""
        await self._preemptible.preempt(request_id)
        num_idle, num_sent = 0, -1
        while num_idle < NUM_IDLE_TICKS and (window := self._windows.get(request_id)):
            num_idle = num_idle + 1 if window.num_sent == num_sent else 0
            num_sent = window.num_sent
            await asyncio.sleep(0)

    def _set_preempted(self, request_id: str, is_preempted: bool) -> None:
        if request_id in self._windows:
            self._windows[request_id].set_preempted(is_preempted)

    async def _stop(self) -> None:
        try:
            await self._ready_engine.stop()
        except BaseException:  # libraries written in Rust panic with one
            logger.exception("the engine's stop failed")
            await asyncio.sleep(0)  # the log record is sent in this tick
        self._channel.close()

    # --- reports ------------------------------------------------------------------------------------------------

    def _send(self, report: channel.Report) -> None:
        self._channel.send(report)

    async def _send_heartbeats(self, engine: Engine, heartbeat_s: float) -> None:
        while True:
            self._send(channel.Heartbeat(engine.health(), stats_of(engine)))
            await asyncio.sleep(heartbeat_s)
            if os.getppid() != self._parent_pid:
                _end_process()  # another process forked from the parent keeps the parent's end of the connection open

    def _forward_logs(self, levels: dict[str, int]) -> None:
        for name, level in levels.items():
            logging.getLogger(name).setLevel(level)
        logging.getLogger().addHandler(_LogToParent(self._channel))

    @property
    def _ready_engine(self) -> Engine:
        assert self._engine is not None, "the parent sends no such command before Loaded"
        return self._engine

    @property
    def _preemptible(self) -> Preemptible:
        return cast(Preemptible, self._ready_engine)


class _Window:
    """Flow control of one generation: the number of deltas sent and not yet acknowledged by the parent's reader."""

    def __init__(self, is_preempted: bool) -> None:
        self.num_sent = 0
        self._num_acknowledged = 0
        self._is_preempted = is_preempted
        self._changed = asyncio.Event()

    def acknowledge(self, num_deltas: int) -> None:
        self._num_acknowledged += num_deltas
        self._changed.set()

    def set_preempted(self, is_preempted: bool) -> None:
        self._is_preempted = is_preempted
        self._changed.set()

    async def wait_until_resumed(self) -> None:
        while self._is_preempted:
            await self._wait_change()

    async def wait_for_capacity(self) -> None:
        """Wait until fewer than `MAX_UNREAD` deltas are unacknowledged. Does not wait while preempted: the engine makes
        no more deltas, and those it has made must become readable."""
        while self.num_sent - self._num_acknowledged >= channel.MAX_UNREAD and not self._is_preempted:
            await self._wait_change()

    async def _wait_change(self) -> None:
        self._changed.clear()
        await self._changed.wait()


class _LogToParent(logging.Handler):
    """Forward log records to the parent, whose logging configuration applies. May be called in any thread."""

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
        if not self._parent.is_congested:  # dropped otherwise, so that unread records do not accumulate
            self._parent.send(log)


def _end_process() -> None:
    """End at once: without a parent there are no clients. Skips interpreter shutdown, which a running step or a
    library's exit handler could delay."""
    sys.stderr.flush()
    os._exit(0)


def _as_chatstream_error(error: BaseException) -> ChatStreamError:
    """Convert an error to one that the parent can unpickle: a class of `chatstream.errors`, without attributes that
    other code has added."""
    if not isinstance(error, ChatStreamError):
        logger.error("the engine failed", exc_info=error)
        return EngineError(f"the engine failed: {type(error).__name__}")
    known: type[ChatStreamError] = next(c for c in type(error).__mro__ if c.__module__ == ChatStreamError.__module__)
    return known(error.message, param=error.param, retry_after_s=error.retry_after_s)
