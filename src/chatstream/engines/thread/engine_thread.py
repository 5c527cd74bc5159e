"""The thread of an engine that computes in this process: it loads a model, then works for streams on the event loop.

    commands in -> work.turn() -> what was made out (handover.py) -> again

Knows no model. Everything heavy (loading, tokenising, forward passes) runs in two named threads, never on the event
loop: the engine's own, and one that encodes prompts while the other computes.
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
from chatstream.engines.thread.handover import Outbox, resolver
from chatstream.errors import ChatStreamError, ConfigError, EngineUnavailable

logger = logging.getLogger(__name__)

ModelT = TypeVar("ModelT")
ModelT_contra = TypeVar("ModelT_contra", contravariant=True)
ResultT = TypeVar("ResultT")


class Work(Protocol[ModelT_contra]):
    """What an engine does in its thread. All methods are called there."""

    survives_failure: bool
    """After a `turn` that raised, the model is as good as before. Otherwise the engine is gone, until it is stopped and
    started again: a process of its own is replaced (engines/process)."""

    def begin(self, model: ModelT_contra) -> None:
        """The model is there."""

    def turn(self) -> bool:
        """One step, for everybody. False: there was nothing to do, and there will not be until there is a command."""

    def end_all(self, error: ChatStreamError) -> None:
        """Every stream ends with this."""

    def close(self) -> None:
        """Give back what is left: the model is let go of."""


class EngineThread(Generic[ModelT]):
    """See above. All is for the event loop, `put` for any thread."""

    STOP_TIMEOUT_S = 30.0
    """How long `stop` waits for a step or load that does not end; the thread is a daemon and dies with the process."""

    def __init__(self, model_name: str, load: Callable[[], ModelT], work: Work[ModelT]) -> None:
        self._model_name = model_name
        self._load = load
        self._work = work
        self.model: ModelT | None = None
        self.detail = "not started"
        """Why there is no model."""
        self._thread: threading.Thread | None = None
        self._loaded: asyncio.Future[None] | None = None
        """Set by the first start; done when the model is there."""
        self._encoder: ThreadPoolExecutor | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._outboxes: weakref.WeakSet[Outbox] = weakref.WeakSet()
        """Of the streams, for the case that the thread can tell them nothing any more."""
        self._waiting: set[asyncio.Future[None]] = set()
        """For a command to be obeyed."""
        self._is_stopping = False
        self._obeys = False
        """Commands are still read. Set to False before the last ones are taken, so that none is left unread."""

    def health(self) -> EngineHealth:
        is_alive = self._thread is not None and self._thread.is_alive()
        is_ready = self.model is not None and is_alive and not self._is_stopping
        return EngineHealth(is_ready, "" if is_ready else self.detail)

    def ready_model(self) -> ModelT:
        """Raises `EngineUnavailable`."""
        if self.model is None or not self.health().is_ready:
            raise self._unavailable()
        return self.model

    async def start(self) -> None:
        """Raises `ConfigError` with one clear line when the model cannot be loaded."""
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
        # Whoever asks meanwhile waits for the same load, and whoever gives up waiting does not end it.
        await asyncio.shield(self._loaded)

    def _on_loaded(self, loaded: asyncio.Future[None]) -> None:
        error = loaded.exception()
        if error is not None:
            self.detail = f"could not load: {error}"
            self._loaded = self._thread = None

    async def stop(self) -> None:
        """Idempotent."""
        thread = self._thread
        if thread is None:
            return
        self.detail, self._is_stopping, self._loaded = "stopped", True, None
        self.put(lambda: None)
        await asyncio.to_thread(thread.join, self.STOP_TIMEOUT_S)
        if thread.is_alive():
            logger.error("%s did not finish its step within %.0f s; left behind", self._model_name, self.STOP_TIMEOUT_S)
            self._leave_behind()
        if self._encoder is not None:
            self._encoder.shutdown(wait=False)

    def _leave_behind(self) -> None:
        """In place of the thread, which would tell them."""
        self._obeys = False
        for outbox in list(self._outboxes):
            outbox.put(self._unavailable())
        for obeyed in list(self._waiting):
            if not obeyed.done():
                obeyed.set_result(None)

    def open(self, outbox: Outbox, begin: Callable[[], None]) -> None:
        """A stream begins: `begin` is put, and an end will be put into its outbox. Raises `EngineUnavailable`."""
        self._outboxes.add(outbox)
        self.put(begin)
        if not self._obeys:
            raise self._unavailable()

    async def encode(self, function: Callable[[], ResultT]) -> ResultT:
        """The result of something that takes a while, computed while the engine goes on."""
        assert self._encoder is not None
        return await asyncio.get_running_loop().run_in_executor(self._encoder, function)

    def put(self, command: Callable[[], None]) -> None:
        """It will be obeyed between two steps, and wakes the thread when it sleeps."""
        self._commands.put(command)

    async def wait_executed(self, command: Callable[[Callable[[], None]], None]) -> None:
        """Returns when the command has called what it is given; at once where nobody obeys any more."""
        loop = asyncio.get_running_loop()
        obeyed: asyncio.Future[None] = loop.create_future()
        resolve = resolver(loop, obeyed)
        self._waiting.add(obeyed)
        obeyed.add_done_callback(self._waiting.discard)
        self.put(lambda: command(lambda: resolve(None)))
        if self._obeys:
            await obeyed

    def _unavailable(self) -> EngineUnavailable:
        return EngineUnavailable(f"the model is not available: {self.detail}")

    # --- in the thread ------------------------------------------------------------------------------------------

    def _run(self, report_loaded: Callable[[Exception | None], None]) -> None:
        try:
            model = self._load()
            self._work.begin(model)
        except ConfigError as error:
            report_loaded(error)
            return
        except BaseException as error:  # libraries written in Rust panic with one
            logger.debug("loading %s failed", self._model_name, exc_info=error)
            report_loaded(ConfigError(f"cannot load {self._model_name}: {error}"))
            return
        self.model, self._obeys = model, True
        report_loaded(None)
        is_idle = True
        while not self._is_stopping:
            try:
                self._obey_commands(may_wait=is_idle)
                is_idle = self._is_stopping or not self._work.turn()
            except BaseException:
                # A bug of ours, or a panic of a library. Nobody may hang because of it: everybody is told, and the
                # next request works.
                logger.exception("a step of %s failed", self._model_name)
                if not self._work.survives_failure:
                    self.detail = "a step failed"
                    break
                self._work.end_all(EngineUnavailable("the engine failed"))
        # Before anybody is told: who comes back at once must find no model.
        self.model, self._obeys = None, False
        self._obey_commands(may_wait=False)
        self._work.end_all(self._unavailable())
        self._work.close()

    def _obey_commands(self, *, may_wait: bool) -> None:
        try:
            self._commands.get(block=may_wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass
