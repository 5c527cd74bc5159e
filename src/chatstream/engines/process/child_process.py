"""One child process from its start to its end, seen from the parent. Each child has an object of its own."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import signal
import socket
import subprocess
import sys
import weakref
from collections.abc import AsyncGenerator, Callable
from typing import TypeAlias

from chatstream.engines.base import Engine, EngineStats
from chatstream.engines.process import channel
from chatstream.engines.process.environment import for_computing
from chatstream.errors import ChatStreamError, EngineUnavailable
from chatstream.types import GenerationRequest, PreparedPrompt, PromptInput, SamplingParams, TokenDelta

Recipe: TypeAlias = Callable[[], Engine]

logger = logging.getLogger(__name__)

CHILD_MODULE = "chatstream.engines.process.child"
STDERR_FD = 2
HEARTBEAT_S = 1.0
LOADING_TIMEOUT_FACTOR = 10
"""Multiplies the heartbeat timeout while the child loads: imports and libraries hold the interpreter's lock."""
REAP_TIMEOUT_S = 30.0
"""Timeout for a killed process to end: the kernel first reclaims its memory."""


class ChildProcess:
    """The caller of `load` must await `kill` at the end, whatever happens."""

    def __init__(self, recipe: bytes, *, heartbeat_timeout_s: float, on_gone: Callable[[], object]) -> None:
        """`on_gone` is called as soon as the child can serve no more calls, before the open calls end."""
        self._recipe = recipe
        self._heartbeat_s = min(HEARTBEAT_S, heartbeat_timeout_s / 4)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._on_gone = on_gone
        self._numbers = itertools.count()
        self._calls: dict[int, _Call] = {}
        self._process: subprocess.Popen[bytes] | None = None
        self._channel: channel.Channel | None = None
        self._gone = asyncio.Event()
        self._why_gone = ""
        self._has_received = False
        self._has_loaded = False
        self._watchdog: asyncio.Task[None] | None = None
        self.detail = ""
        """Detail of the child's last health report, such as the progress of loading."""
        self.stats: EngineStats | None = None
        """From the child's last heartbeat."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def why_gone(self) -> str:
        """Reason for the end, available after `kill`: the exit status, unless the parent ended the child."""
        return self._why_gone or f"its process {_describe_exit(self._process.returncode if self._process else None)}"

    async def load(self) -> channel.Loaded:
        """Start the child. Raises what the engine's `start` raised, or `EngineUnavailable` if the process ended during
        loading."""
        connection, self._process = _spawn()
        # Kills the child if the loop is closed without `kill`, or if the interpreter exits.
        self._reap_at_exit = weakref.finalize(self, _kill_and_reap, self._process)
        self._watchdog = asyncio.create_task(self._run_watchdog(self._process))
        self._channel = channel.Channel(connection, self._receive, self._on_lost)
        await self._channel.open()
        call = self._call(lambda number: channel.Load(number, self._recipe, self._heartbeat_s, _log_levels()))
        loaded = await call.wait_result()
        assert isinstance(loaded, channel.Loaded)
        self._has_loaded = True
        return loaded

    async def wait_gone(self) -> None:
        """Return when the child has died, or was killed because it hung."""
        await self._gone.wait()

    async def _run_watchdog(self, process: subprocess.Popen[bytes]) -> None:
        """Watch the child until it is gone. Kill it when the heartbeat timeout passes without a message from it."""
        num_missed = 0
        while not self._gone.is_set():
            self._has_received = False
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._gone.wait()
            except TimeoutError:
                # Count intervals instead of measuring time: a parent that was suspended for a minute (Ctrl-Z) has read
                # no heartbeats for a minute.
                num_missed = 0 if self._has_received else num_missed + 1
                timeout_s = self._heartbeat_timeout_s * (1 if self._has_loaded else LOADING_TIMEOUT_FACTOR)
                if process.poll() is not None:
                    self._mark_gone("")  # a process that the child started keeps the connection open
                elif num_missed * self._heartbeat_s >= timeout_s:
                    self._mark_gone(f"no heartbeat for {timeout_s:g} s")

    async def stop(self, timeout_s: float) -> None:
        """Ask the engine to stop and wait for at most `timeout_s`, then kill the child. Open generations end with
        `EngineUnavailable`."""
        self._why_gone = "it was stopped"
        self._send(channel.Stop())
        try:
            async with asyncio.timeout(timeout_s):
                await self._gone.wait()
        except TimeoutError:
            logger.warning("the engine did not stop within %g s and was killed", timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """Kill the process and return when it has ended. Idempotent, and allowed before `load`."""
        self._mark_gone("it was stopped")
        if self._channel is not None:
            self._channel.abort()
        if self._process is not None and self._process.poll() is None:
            try:
                await asyncio.to_thread(self._process.wait, REAP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.error(
                    "process %d was killed but has not ended after %g s; not waiting any longer",
                    self._process.pid,
                    REAP_TIMEOUT_S,
                )

    # --- engine calls -------------------------------------------------------------------------------------------

    async def prepare(self, prompt: PromptInput, sampling: SamplingParams, may_drop_history: bool) -> PreparedPrompt:
        arguments = channel.pack((prompt, sampling, may_drop_history), "prompt")
        call = self._call(lambda number: channel.Prepare(number, arguments))
        try:
            prepared = await call.wait_result()
        finally:
            self._close(call)
        assert isinstance(prepared, PreparedPrompt)
        return prepared

    async def stream(self, request: GenerationRequest, *, is_preempted: bool) -> AsyncGenerator[TokenDelta, None]:
        packed = channel.pack(request, "token_mask")  # the other fields were pickled before, in `prepare`
        call = self._call(lambda number: channel.Open(number, request.request_id, packed, is_preempted))
        num_unacknowledged = 0
        try:
            while (delta := await call.next_delta()) is not None:
                num_unacknowledged += 1
                if num_unacknowledged == channel.MAX_UNREAD // 2:
                    self._send(channel.Acknowledge(request.request_id, num_unacknowledged))
                    num_unacknowledged = 0
                yield delta
        finally:
            self._close(call)
            await call.ended.wait()  # the child has released the generation's resources

    async def preempt(self, request_id: str) -> None:
        await self._call(lambda number: channel.Preempt(number, request_id)).wait_result()

    def resume(self, request_id: str) -> None:
        self._send(channel.Resume(request_id))

    # --- calls --------------------------------------------------------------------------------------------------

    def _call(self, make_command: Callable[[int], channel.Command]) -> _Call:
        call = _Call(next(self._numbers))
        if self._gone.is_set():
            call.end(self._unavailable())
        else:
            self._send(make_command(call.number))
            self._calls[call.number] = call
        return call

    def _close(self, call: _Call) -> None:
        if not call.ended.is_set():
            self._send(channel.Close(call.number))

    def _send(self, command: channel.Command) -> None:
        assert self._channel is not None
        self._channel.send(command)

    # --- reports of the child -----------------------------------------------------------------------------------

    def _receive(self, report: channel.Report) -> None:
        self._has_received = True
        if isinstance(report, channel.Log):
            logging.getLogger(report.name).log(report.level, "%s", report.text)
        elif not self._gone.is_set():
            self._handle(report)

    def _handle(self, report: channel.Delta | channel.Ended | channel.Heartbeat) -> None:
        match report:
            case channel.Delta(number, delta):
                self._calls[number].put(delta)
            case channel.Ended(number, result):
                self._calls.pop(number).end(result)
            case channel.Heartbeat(health, stats):
                self.detail, self.stats = health.detail, stats
                if self._has_loaded and not health.is_ready and not self._why_gone:
                    self._mark_gone(health.detail or "it is no longer ready")

    def _on_lost(self, error: Exception | None) -> None:
        self._mark_gone(f"its message could not be read: {error}" if error else "")

    def _mark_gone(self, reason: str) -> None:
        """Kill the child and end all open calls with `EngineUnavailable`. Idempotent; the first reason counts."""
        if self._gone.is_set():
            return
        self._why_gone = self._why_gone or reason
        self._gone.set()
        if self._process is not None:
            self._process.kill()
        self._on_gone()
        calls, self._calls = self._calls, {}
        for call in calls.values():
            call.end(self._unavailable())

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(f"the engine is gone: {self._why_gone or 'its process has died'}")


class _Call:
    """A command whose `Ended` has not arrived."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ended = asyncio.Event()
        self._result: object = None
        self._deltas: asyncio.Queue[TokenDelta | None] = asyncio.Queue()
        """None marks the end. `MAX_UNREAD` bounds its length."""

    def put(self, delta: TokenDelta) -> None:
        self._deltas.put_nowait(delta)

    def end(self, result: object) -> None:
        self._result = result
        self.ended.set()
        self._deltas.put_nowait(None)

    async def next_delta(self) -> TokenDelta | None:
        """The next delta, or None at the end. Raises the error that ended the generation."""
        if not self._deltas.empty():
            # Deltas are buffered: yield to the loop, so that all streams catch up, one delta each per tick.
            await asyncio.sleep(0)
        delta = await self._deltas.get()
        if delta is None:
            await self.wait_result()
        return delta

    async def wait_result(self) -> object:
        """Raises the result if it is a `ChatStreamError`."""
        await self.ended.wait()
        if isinstance(self._result, ChatStreamError):
            raise self._result
        return self._result


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """Start the child. Returns the parent's end of the connection, and the process.

    `multiprocessing` is not used: it would run the main module of the embedding program a second time, and start a
    third process, its resource tracker.
    """
    parent_end, child_end = socket.socketpair()
    try:
        program = f"import sys; sys.path[:] = {sys.path!r}; from {CHILD_MODULE} import main; main(int(sys.argv[1]))"
        process = subprocess.Popen(
            [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-c", program, str(child_end.fileno())],
            env=os.environ | for_computing(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=STDERR_FD,  # the parent's stdout carries the output of its command
            pass_fds=[child_end.fileno()],
            process_group=0,  # Ctrl-C reaches the parent only, from the start on
        )
    except BaseException:
        parent_end.close()
        raise
    finally:
        child_end.close()
    return parent_end, process


def _kill_and_reap(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _log_levels() -> dict[str, int]:
    return {name: logging.getLogger(name).getEffectiveLevel() for name in ("", "chatstream")}


def _describe_exit(returncode: int | None) -> str:
    if returncode == -signal.SIGKILL:
        return "was killed by SIGKILL, which the kernel sends when memory runs out"
    if returncode is not None and returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"
