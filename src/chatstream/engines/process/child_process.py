"""One child process from its start to its end, seen from the parent. A new one is another object."""

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

CHILD = "chatstream.engines.process.child"
STDERR_FD = 2
HEARTBEAT_S = 1.0
LOADING_PATIENCE = 10
"""While it loads, it may be silent for so many times as long: imports and libraries hold the interpreter's lock."""
REAP_TIMEOUT_S = 30.0
"""A killed process is gone when the kernel has taken its memory back."""


class ChildProcess:
    """Whoever calls `load` awaits `kill` at the end, whatever happens."""

    def __init__(self, recipe: bytes, *, heartbeat_timeout_s: float, on_gone: Callable[[], object]) -> None:
        """`on_gone` is called as soon as it can do nothing more, before those who wait for an answer hear of it."""
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
        self._has_spoken = False
        self._has_loaded = False
        self._watching: asyncio.Task[None] | None = None
        self.detail = ""
        """What it says of its health while it loads: how far it is."""
        self.stats: EngineStats | None = None
        """As of its last heartbeat."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def why_gone(self) -> str:
        """After `kill`. By its exit status, when nobody here ended it."""
        return self._why_gone or f"its process {_in_words(self._process.returncode if self._process else None)}"

    async def load(self) -> channel.Loaded:
        """Start it. Raises what the engine's start raised, or `EngineUnavailable` when the process ended meanwhile."""
        connection, self._process = _spawn()
        # Nobody may be left behind by a loop that was closed without `kill`, or by an interpreter that ends.
        self._reap_at_exit = weakref.finalize(self, _kill_and_reap, self._process)
        self._watching = asyncio.create_task(self._watch(self._process))
        self._channel = channel.Channel(connection, self._hear, self._on_lost)
        await self._channel.open()
        call = self._call(lambda number: channel.Load(number, self._recipe, self._heartbeat_s, _log_levels()))
        loaded = await call.wait_result()
        assert isinstance(loaded, channel.Loaded)
        self._has_loaded = True
        return loaded

    async def wait_gone(self) -> None:
        """It has died, or hung and was ended for that."""
        await self._gone.wait()

    async def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Until it is gone. Ends it when it gives no sign of life for too long."""
        num_silent = 0
        while not self._gone.is_set():
            self._has_spoken = False
            try:
                async with asyncio.timeout(self._heartbeat_s):
                    await self._gone.wait()
            except TimeoutError:
                # Counted, not measured: a parent that stood still for a minute (Ctrl-Z) has not listened for a minute.
                num_silent = 0 if self._has_spoken else num_silent + 1
                timeout_s = self._heartbeat_timeout_s * (1 if self._has_loaded else LOADING_PATIENCE)
                if process.poll() is not None:
                    self._lose("")  # one of its own children holds the connection open
                elif num_silent * self._heartbeat_s >= timeout_s:
                    self._lose(f"it gave no sign of life for {timeout_s:g} s")

    async def stop(self, timeout_s: float) -> None:
        """Let it give everything back, for so long. Open generations end with `EngineUnavailable`."""
        self._why_gone = "it was stopped"
        self._say(channel.Stop())
        try:
            async with asyncio.timeout(timeout_s):
                await self._gone.wait()
        except TimeoutError:
            logger.warning("the engine did not stop within %g s and is killed", timeout_s)
        await self.kill()

    async def kill(self) -> None:
        """Returns when the process is gone. Harmless twice, and before `load`."""
        self._lose("it was stopped")
        if self._channel is not None:
            self._channel.abort()
        if self._process is not None and self._process.poll() is None:
            try:
                await asyncio.to_thread(self._process.wait, REAP_TIMEOUT_S)
            except subprocess.TimeoutExpired:
                logger.error("process %d does not end although it was killed; left behind", self._process.pid)

    # --- what an engine does ------------------------------------------------------------------------------------

    async def prepare(self, prompt: PromptInput, sampling: SamplingParams, may_drop_history: bool) -> PreparedPrompt:
        asked = channel.pack((prompt, sampling, may_drop_history), "prompt")
        call = self._call(lambda number: channel.Prepare(number, asked))
        try:
            prepared = await call.wait_result()
        finally:
            self._close(call)
        assert isinstance(prepared, PreparedPrompt)
        return prepared

    async def stream(self, request: GenerationRequest, *, is_preempted: bool) -> AsyncGenerator[TokenDelta, None]:
        packed = channel.pack(request, "token_mask")  # what else is in it has crossed as a prompt before
        call = self._call(lambda number: channel.Open(number, request.request_id, packed, is_preempted))
        num_taken = 0
        try:
            while (delta := await call.next_delta()) is not None:
                num_taken += 1
                if num_taken == channel.MAX_UNREAD // 2:
                    self._say(channel.Taken(request.request_id, num_taken))
                    num_taken = 0
                yield delta
        finally:
            self._close(call)
            await call.ended.wait()  # then the child has given back what it held

    async def preempt(self, request_id: str) -> None:
        await self._call(lambda number: channel.Preempt(number, request_id)).wait_result()

    def resume(self, request_id: str) -> None:
        self._say(channel.Resume(request_id))

    # --- calls --------------------------------------------------------------------------------------------------

    def _call(self, order: Callable[[int], channel.Order]) -> _Call:
        call = _Call(next(self._numbers))
        if self._gone.is_set():
            call.end(self._unavailable())
        else:
            self._say(order(call.number))
            self._calls[call.number] = call
        return call

    def _close(self, call: _Call) -> None:
        if not call.ended.is_set():
            self._say(channel.Close(call.number))

    def _say(self, order: channel.Order) -> None:
        assert self._channel is not None
        self._channel.send(order)

    # --- what the child says ------------------------------------------------------------------------------------

    def _hear(self, report: channel.Report) -> None:
        self._has_spoken = True
        if isinstance(report, channel.Log):
            logging.getLogger(report.name).log(report.level, "%s", report.text)
        elif not self._gone.is_set():
            self._act_on(report)

    def _act_on(self, report: channel.Delta | channel.Ended | channel.Heartbeat) -> None:
        match report:
            case channel.Delta(number, delta):
                self._calls[number].put(delta)
            case channel.Ended(number, result):
                self._calls.pop(number).end(result)
            case channel.Heartbeat(health, stats):
                self.detail, self.stats = health.detail, stats
                if self._has_loaded and not health.is_ready and not self._why_gone:
                    self._lose(health.detail or "it is not ready any more")

    def _on_lost(self, error: Exception | None) -> None:
        self._lose(f"what it said could not be read: {error}" if error else "")

    def _lose(self, why: str) -> None:
        """It can do nothing more for anybody, and must not go on alone."""
        if self._gone.is_set():
            return
        self._why_gone = self._why_gone or why
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
    """What the child was asked and has not ended yet."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.ended = asyncio.Event()
        self._result: object = None
        self._deltas: asyncio.Queue[TokenDelta | None] = asyncio.Queue()
        """At its end None. Bounded by `MAX_UNREAD`."""

    def put(self, delta: TokenDelta) -> None:
        self._deltas.put_nowait(delta)

    def end(self, result: object) -> None:
        self._result = result
        self.ended.set()
        self._deltas.put_nowait(None)

    async def next_delta(self) -> TokenDelta | None:
        """None at the end. Raises the error that ended it."""
        if not self._deltas.empty():
            # Behind the engine: catch up in turns with the other streams, a token each, as they were generated.
            await asyncio.sleep(0)
        delta = await self._deltas.get()
        if delta is None:
            await self.wait_result()
        return delta

    async def wait_result(self) -> object:
        await self.ended.wait()
        if isinstance(self._result, ChatStreamError):
            raise self._result
        return self._result


def _spawn() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    """A Python with our end of a connection to it.

    Not by `multiprocessing`: that would run the main module of whoever embeds us a second time, and start a third
    process that minds resources nobody shares.
    """
    ours, its = socket.socketpair()
    try:
        program = f"import sys; sys.path[:] = {sys.path!r}; from {CHILD} import main; main(int(sys.argv[1]))"
        process = subprocess.Popen(
            [sys.executable, *(f"-W{option}" for option in sys.warnoptions), "-c", program, str(its.fileno())],
            env=os.environ | for_computing(os.environ),
            stdin=subprocess.DEVNULL,
            stdout=STDERR_FD,  # ours is for those who read what the command prints
            pass_fds=[its.fileno()],
            process_group=0,  # Ctrl-C is for the parent, from the first moment on
        )
    except BaseException:
        ours.close()
        raise
    finally:
        its.close()
    return ours, process


def _kill_and_reap(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def _log_levels() -> dict[str, int]:
    return {name: logging.getLogger(name).getEffectiveLevel() for name in ("", "chatstream")}


def _in_words(returncode: int | None) -> str:
    if returncode == -signal.SIGKILL:
        return "was killed by SIGKILL, as the kernel does when memory runs out"
    if returncode is not None and returncode < 0:
        return f"was ended by {signal.Signals(-returncode).name}"
    return f"ended with status {returncode}"
