"""The engine thread: loads a model in this process, then runs commands and steps until it is stopped.

    run commands -> work.run_step() -> deltas to the event loop (handover.py) -> repeat

Knows no model. Heavy work never runs on the event loop, but in two named threads: the engine thread loads the model and
runs the steps; a second thread encodes prompts at the same time.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Generic, Protocol, TypeVar

from chatstream.engines.base import EngineHealth
from chatstream.engines.thread.handover import DeltaBuffer, resolver
from chatstream.errors import ChatStreamError, ConfigError, EngineUnavailable

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT")
ModelT_contra = TypeVar("ModelT_contra", contravariant=True)
ResultT = TypeVar("ResultT")


class Work(Protocol[ModelT_contra]):
    """What an engine does in the engine thread. All methods are called in that thread."""

    survives_failure: bool
    """Whether the model is usable after `run_step` raised. False: the engine stays unavailable until it is stopped and
    started again; a child process (engines/process) is replaced."""

    def set_model(self, model: ModelT_contra) -> None:
        """Called once with the loaded model, before the first `run_step`."""

    def run_step(self) -> bool:
        """Run one step for all sequences. False: there is nothing to do until the next command."""

    def end_all(self, error: ChatStreamError) -> None:
        """End every stream with this error."""

    def close(self) -> None:
        """Release the model and all memory."""


class EngineThread(Generic[ModelT]):
    """The engine thread, as the event loop sees it. All methods belong to the event loop; `put` is thread-safe."""

    STOP_TIMEOUT_S = 30.0
    """Longest time that `stop` waits for the running step or load. The thread is a daemon: it ends with the process."""

    def __init__(self, model_name: str, load: Callable[[], ModelT], work: Work[ModelT]) -> None:
        self._model_name = model_name
        self._load = load
        self._work = work
        self.model: ModelT | None = None
        self.detail = "not started"
        """Why the model is not available, for `health`."""
        self._thread: threading.Thread | None = None
        self._loaded: asyncio.Future[None] | None = None
        """Set by `start`; done when the model is loaded."""
        self._encoder: ThreadPoolExecutor | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._buffers: weakref.WeakSet[DeltaBuffer] = weakref.WeakSet()
        """Buffers of all open streams, so that `stop` can end the streams when the thread hangs."""
        self._executions: set[asyncio.Future[None]] = set()
        """Pending calls of `execute`."""
        self._is_stopping = False
        self._accepts_commands = False
        """The thread still runs commands. Set to False before the last commands are run, so that none is missed."""

    def health(self) -> EngineHealth:
        is_alive = self._thread is not None and self._thread.is_alive()
        is_ready = self.model is not None and is_alive and not self._is_stopping
        return EngineHealth(is_ready, "" if is_ready else self.detail)

    def ready_model(self) -> ModelT:
        """The loaded model. Raises `EngineUnavailable` if there is none."""
        if self.model is None or not self.health().is_ready:
            raise self._unavailable()
        return self.model

    async def start(self) -> None:
        """Load the model. Raises `ConfigError` with a message of one line when that fails."""
        loop = asyncio.get_running_loop()
        if self._loaded is None:
            if self._thread is not None and self._thread.is_alive():
                raise ConfigError(f"{self._model_name} is still stopping: its last step or load has not ended")
            self.detail = "loading"
            self._is_stopping = False
            self._commands = queue.SimpleQueue()
            self._loaded = loop.create_future()
            self._loaded.add_done_callback(self._on_loaded)
            self._encoder = ThreadPoolExecutor(max_workers=1, thread_name_prefix="chatstream-encode")
            self._thread = threading.Thread(
                target=self._run, args=(resolver(loop, self._loaded),), name="chatstream-engine", daemon=True
            )
            self._thread.start()
        # Concurrent callers wait for the same load, and the cancellation of one caller does not end it.
        await asyncio.shield(self._loaded)

    def _on_loaded(self, loaded: asyncio.Future[None]) -> None:
        error = loaded.exception()
        if error is not None:
            self.detail = f"could not load: {error}"
            self._loaded = self._thread = None

    async def stop(self) -> None:
        """End all streams with `EngineUnavailable` and release the model. Idempotent."""
        thread = self._thread
        if thread is None:
            return
        self.detail, self._is_stopping, self._loaded = "stopped", True, None
        self.put(lambda: None)
        await asyncio.to_thread(thread.join, self.STOP_TIMEOUT_S)
        if thread.is_alive():
            logger.error("a step of %s did not end within %.0f s; abandoning it", self._model_name, self.STOP_TIMEOUT_S)
            self._abandon_thread()
        if self._encoder is not None:
            self._encoder.shutdown(wait=False)

    def _abandon_thread(self) -> None:
        """End the open streams and pending commands on behalf of a thread that hangs."""
        self._accepts_commands = False
        for buffer in list(self._buffers):
            buffer.put(self._unavailable())
        for execution in list(self._executions):
            if not execution.done():
                execution.set_result(None)

    def open(self, buffer: DeltaBuffer, add: Callable[[], None]) -> None:
        """Open a stream: queue the command `add`. The stream's last delta or its error will arrive in `buffer`.

        Raises `EngineUnavailable`.
        """
        self._buffers.add(buffer)
        self.put(add)
        if not self._accepts_commands:
            raise self._unavailable()

    async def encode(self, function: Callable[[], ResultT]) -> ResultT:
        """Run the function in the encoder thread, while the engine computes, and return its result."""
        assert self._encoder is not None
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function)

    def put(self, command: Callable[[], None]) -> None:
        """Queue a command for the engine thread, which runs it before the next step, and wake the thread."""
        self._commands.put(command)

    async def execute(self, command: Callable[[Callable[[], None]], None]) -> None:
        """Run the command in the engine thread. The command receives a callback; return once it has been called.

        Returns at once if the thread no longer accepts commands.
        """
        loop = asyncio.get_running_loop()
        execution: asyncio.Future[None] = loop.create_future()
        resolve = resolver(loop, execution)
        self._executions.add(execution)
        execution.add_done_callback(self._executions.discard)
        self.put(lambda: command(lambda: resolve(None)))
        if self._accepts_commands:
            await execution

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(f"the model is not available: {self.detail}")

    # --- in the thread ------------------------------------------------------------------------------------------

    def _run(self, report_loaded: Callable[[Exception | None], None]) -> None:
        try:
            model = self._load()
            self._work.set_model(model)
        except ConfigError as error:
            report_loaded(error)
            return
        except BaseException as error:  # libraries written in Rust panic with one
            logger.debug("loading %s failed", self._model_name, exc_info=error)
            report_loaded(ConfigError(f"cannot load {self._model_name}: {error}"))
            return
        self.model, self._accepts_commands = model, True
        report_loaded(None)
        is_idle = True
        while not self._is_stopping:
            try:
                self._run_commands(may_wait=is_idle)
                is_idle = self._is_stopping or not self._work.run_step()
            except BaseException:
                # A bug in ChatStream, or a panic in a library. No stream may hang: all end, and new requests work.
                logger.exception("a step of %s failed", self._model_name)
                if not self._work.survives_failure:
                    self.detail = "a step failed"
                    break
                self._work.end_all(EngineUnavailable("the engine failed"))
        # Before the streams end, because a client may retry at once and must find no model.
        self.model, self._accepts_commands = None, False
        self._run_commands(may_wait=False)
        self._work.end_all(self._unavailable())
        self._work.close()

    def _run_commands(self, *, may_wait: bool) -> None:
        try:
            self._commands.get(block=may_wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass
