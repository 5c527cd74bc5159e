"""`ProcessEngine`: waits for the child process, and starts another one when it dies."""

from __future__ import annotations

import asyncio
import logging
import math
import pickle
from collections.abc import AsyncGenerator
from contextlib import aclosing
from functools import partial

from chatstream.engines.base import Capacity, EngineHealth, EngineStats
from chatstream.engines.process.channel import Loaded
from chatstream.engines.process.child_process import ChildProcess, Recipe
from chatstream.errors import ChatStreamError, ConfigError, EngineUnavailable
from chatstream.types import GenerationRequest, PreparedPrompt, PromptInput, SamplingParams, TokenDelta

logger = logging.getLogger(__name__)

MIN_BACKOFF_S, MAX_BACKOFF_S = 0.5, 30.0
"""Delay before a reload: none for the first one, then the minimum, doubled each time up to the maximum."""
STABLE_S = 60.0
"""A child that stayed up this long resets the restart back-off."""


class ProcessEngine:
    """Runs an `Engine` in a child process; preempts if that engine can. Belongs to the event loop that called
    `start`."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        heartbeat_timeout_s: float = 30.0,
        reload_timeout_s: float = 120.0,
        stop_timeout_s: float = 10.0,
    ) -> None:
        """`recipe` creates the engine in the child. It is also called here, to learn the engine's name, so it must load
        nothing. It is pickled by name: a module-level function, or a `functools.partial` of one with plain arguments.

        `heartbeat_timeout_s`: a child without a heartbeat for this long is killed; ten times as long while it loads.
        `reload_timeout_s`: a request that gets its slot during a reload waits at most this long for the engine.
        `stop_timeout_s`: time for the engine to stop before the child is killed.

        Raises `ConfigError` for a recipe that cannot be pickled, and what creating the engine raises.
        """
        self._recipe = _pickled(recipe)
        prototype = recipe()
        self._model_name = prototype.model_name
        self._loaded = Loaded(prototype.capacity, prototype.default_sampling)
        self._heartbeat_timeout_s = heartbeat_timeout_s
        self._reload_timeout_s = reload_timeout_s
        self._stop_timeout_s = stop_timeout_s
        self._detail = "not started"
        self._is_stopping = False
        self._child: ChildProcess | None = None
        """Set while the child is ready."""
        self._loading: ChildProcess | None = None
        """Set while a child loads."""
        self._settled: asyncio.Event
        """Set when a child is ready, and when supervision has ended."""
        self._started: asyncio.Future[None]
        self._supervising: asyncio.Task[None] | None = None
        """Runs from `start` until `stop` or a failed first load."""
        self._open: set[str] = set()
        self._preempted: set[str] = set()

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        return self._loaded.capacity

    @property
    def default_sampling(self) -> SamplingParams:
        return self._loaded.default_sampling

    @property
    def pid(self) -> int | None:
        """Process id of the ready child."""
        return self._child.pid if self._child else None

    def health(self) -> EngineHealth:
        if self._child is not None:
            return EngineHealth(is_ready=True)
        progress = self._loading.detail if self._loading else ""
        if progress and not self._started.done():
            return EngineHealth(False, progress)
        return EngineHealth(False, f"{self._detail}; {progress}" if progress else self._detail)

    def stats(self) -> EngineStats | None:
        """The child's last statistics, at most a second old. The counters of a new child start at 0."""
        return self._child.stats if self._child else None

    async def start(self) -> None:
        if self._supervising is None:
            self._detail, self._is_stopping = "loading", False
            self._settled = asyncio.Event()
            self._started = asyncio.get_running_loop().create_future()
            self._started.add_done_callback(lambda started: started.exception())  # perhaps no caller waits for it
            self._supervising = asyncio.create_task(self._supervise(), name="chatstream-supervise-engine")
            self._supervising.add_done_callback(
                self._on_supervision_ended
            )  # a task that never ran executes no `finally`
        # Concurrent callers wait for the same load; cancelling one of them does not end it.
        await asyncio.shield(self._started)

    async def stop(self) -> None:
        supervising = self._supervising
        if supervising is None:
            return
        if self._is_stopping:  # another call of `stop` is in progress
            await asyncio.wait([supervising])
            return
        self._detail, self._is_stopping = "stopped", True
        try:
            if self._child is not None:
                await self._child.stop(self._stop_timeout_s)
        finally:  # also if the caller is cancelled
            supervising.cancel()
            await asyncio.wait([supervising])

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        child = await self._ready_child()
        return await child.prepare(prompt, sampling, may_drop_history)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        request_id = request.request_id
        self._open.add(request_id)
        try:
            child = await self._ready_child()
            async with aclosing(child.stream(request, is_preempted=request_id in self._preempted)) as deltas:
                async for delta in deltas:
                    yield delta
        finally:
            self._open.discard(request_id)
            self._preempted.discard(request_id)

    async def preempt(self, request_id: str) -> None:
        if request_id not in self._open:
            return
        self._preempted.add(request_id)
        if self._child is not None:
            try:
                await self._child.preempt(request_id)
            except ChatStreamError:
                pass  # the child is gone and computes nothing

    def resume(self, request_id: str) -> None:
        self._preempted.discard(request_id)
        if self._child is not None:
            self._child.resume(request_id)

    async def _ready_child(self) -> ChildProcess:
        try:
            async with asyncio.timeout(self._reload_timeout_s):
                while self._child is None and self._supervising is not None:
                    await self._settled.wait()
        except TimeoutError:
            pass
        if self._child is None:
            raise EngineUnavailable(f"the model is not available: {self._detail}")
        return self._child

    # --- supervision --------------------------------------------------------------------------------------------

    def _on_supervision_ended(self, supervising: asyncio.Task[None]) -> None:
        self._supervising = None
        self._settled.set()
        if not self._started.done():
            self._started.set_exception(EngineUnavailable("the engine was stopped"))

    async def _supervise(self) -> None:
        """Run one child after the other until `stop`. Ends if the first load fails."""
        loop = asyncio.get_running_loop()
        backoff_s = 0.0
        while True:
            child = ChildProcess(self._recipe, heartbeat_timeout_s=self._heartbeat_timeout_s, on_gone=self._on_gone)
            ready_at_s = math.inf
            failure: Exception | None = None
            try:
                await self._load(child)
                ready_at_s = loop.time()
                await child.wait_gone()
            except Exception as error:
                failure = error
            finally:
                await child.kill()
            if self._is_stopping:
                return
            if failure is None:
                reason = f"{self._model_name} failed: {child.why_gone}"
            else:
                cannot_load = self._as_config_error(failure, child)
                reason = cannot_load.message
                if not self._started.done():
                    self._detail = f"could not load: {reason}"
                    self._started.set_exception(cannot_load)
                    return
            if loop.time() - ready_at_s >= STABLE_S:
                backoff_s = 0.0
            self._detail = f"{reason}; it is being loaded again"
            logger.error("%s; reloading in %g s", reason, backoff_s)
            await asyncio.sleep(backoff_s)
            backoff_s = min(MAX_BACKOFF_S, max(MIN_BACKOFF_S, 2 * backoff_s))

    async def _load(self, child: ChildProcess) -> None:
        started_s = asyncio.get_running_loop().time()
        self._loading = child
        old_limit = self.capacity.max_concurrency
        try:
            self._loaded = await child.load()
        finally:
            self._loading = None
        self._child = child
        self._settled.set()
        if self._started.done():
            loading_s = asyncio.get_running_loop().time() - started_s
            logger.warning("%s is ready again after %.1f s", self._model_name, loading_s)
            new_limit = self.capacity.max_concurrency
            if new_limit is not None and new_limit < (old_limit or 0):
                logger.warning(
                    "the reloaded engine runs at most %d sequences (was %d); lower max_concurrency",
                    new_limit,
                    old_limit,
                )
        else:
            self._started.set_result(None)

    def _on_gone(self) -> None:
        if self._child is not None and not self._is_stopping:
            self._detail = f"{self._model_name} failed; it is being loaded again"
        self._child = None
        self._settled.clear()

    def _as_config_error(self, error: Exception, child: ChildProcess) -> ConfigError:
        match error:
            case ConfigError():
                return error
            case EngineUnavailable():  # the child died
                return ConfigError(f"cannot load {self._model_name}: {child.why_gone}")
            case _:
                return ConfigError(f"cannot load {self._model_name}: {error}")


def _pickled(recipe: Recipe) -> bytes:
    """Pickle the recipe. Raises `ConfigError` if the child could not unpickle it."""
    function = recipe.func if isinstance(recipe, partial) else recipe
    if getattr(function, "__module__", None) == "__main__":
        raise ConfigError(
            "an engine in a child process must be created by a function of an importable module, not of the main script"
        )
    try:
        return pickle.dumps(recipe)
    except Exception as error:
        raise ConfigError(f"this engine cannot be created in a child process: {error}") from error
