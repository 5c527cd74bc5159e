"""An engine in a child process, as its users see it: waits for the child, and starts another one when it is gone."""

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

MIN_PAUSE_S, MAX_PAUSE_S = 0.5, 30.0
"""Before it is loaded again: the first time at once, then after the shorter one, which doubles up to the longer one."""
STABLE_S = 60.0
"""Who was ready for so long has not died of what the one before it died of."""


class ProcessEngine:
    """An `Engine` that can preempt if the one in the child can. Its event loop is the one that called `start`."""

    def __init__(
        self,
        recipe: Recipe,
        *,
        heartbeat_timeout_s: float = 30.0,
        reload_timeout_s: float = 120.0,
        stop_timeout_s: float = 10.0,
    ) -> None:
        """`recipe` makes the engine, in the child; here too, to know its name, so it must load nothing.

        It crosses by name: a function of a module, or a `functools.partial` of one with plain arguments.
        `heartbeat_timeout_s`: a child that is silent for so long is killed; while it loads, for ten times as long.
        `reload_timeout_s`: a request that got its slot while the engine is away waits so long for it.
        `stop_timeout_s`: time to give back what it holds.

        Raises `ConfigError` for a recipe that cannot cross, and what making the engine raises.
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
        """While it is ready."""
        self._loading: ChildProcess | None = None
        """While it is not yet."""
        self._settled: asyncio.Event
        """There is a child, or nobody makes one."""
        self._started: asyncio.Future[None]
        self._supervising: asyncio.Task[None] | None = None
        """Since `start`: there is a child, or there will be one."""
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
        """Of the child that is ready."""
        return self._child.pid if self._child else None

    def health(self) -> EngineHealth:
        if self._child is not None:
            return EngineHealth(is_ready=True)
        told = self._loading.detail if self._loading else ""
        if told and not self._started.done():
            return EngineHealth(False, told)
        return EngineHealth(False, f"{self._detail}; {told}" if told else self._detail)

    def stats(self) -> EngineStats | None:
        """What the child has said last, at most a second ago. A new child counts from 0."""
        return self._child.stats if self._child else None

    async def start(self) -> None:
        if self._supervising is None:
            self._detail, self._is_stopping = "loading", False
            self._settled = asyncio.Event()
            self._started = asyncio.get_running_loop().create_future()
            self._started.add_done_callback(lambda started: started.exception())  # it may be that nobody waits any more
            self._supervising = asyncio.create_task(self._supervise(), name="chatstream-supervise-engine")
            self._supervising.add_done_callback(self._on_unsupervised)  # a task that never began has no `finally`
        # Whoever asks meanwhile waits for the same load, and whoever gives up waiting does not end it.
        await asyncio.shield(self._started)

    async def stop(self) -> None:
        supervising = self._supervising
        if supervising is None:
            return
        if self._is_stopping:  # somebody else is about it
            await asyncio.wait([supervising])
            return
        self._detail, self._is_stopping = "stopped", True
        try:
            if self._child is not None:
                await self._child.stop(self._stop_timeout_s)
        finally:  # for whoever gives up waiting, too
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
                pass  # it is gone, and computes nothing for anybody

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

    def _on_unsupervised(self, supervising: asyncio.Task[None]) -> None:
        self._supervising = None
        self._settled.set()
        if not self._started.done():
            self._started.set_exception(EngineUnavailable("the engine was stopped"))

    async def _supervise(self) -> None:
        """One after the other, for as long as one is wanted, if the first one can be loaded."""
        loop = asyncio.get_running_loop()
        pause_s = 0.0
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
                why = f"{self._model_name} failed: {child.why_gone}"
            else:
                cannot_load = self._as_config_error(failure, child)
                why = cannot_load.message
                if not self._started.done():
                    self._detail = f"could not load: {why}"
                    self._started.set_exception(cannot_load)
                    return
            if loop.time() - ready_at_s >= STABLE_S:
                pause_s = 0.0
            self._detail = f"{why}; it is being loaded again"
            logger.error("%s; it is loaded again in %g s", why, pause_s)
            await asyncio.sleep(pause_s)
            pause_s = min(MAX_PAUSE_S, max(MIN_PAUSE_S, 2 * pause_s))

    async def _load(self, child: ChildProcess) -> None:
        begun_s = asyncio.get_running_loop().time()
        self._loading = child
        num_before = self.capacity.max_concurrency
        try:
            self._loaded = await child.load()
        finally:
            self._loading = None
        self._child = child
        self._settled.set()
        if self._started.done():
            loading_s = asyncio.get_running_loop().time() - begun_s
            logger.warning("%s is ready again after %.1f s", self._model_name, loading_s)
            num_now = self.capacity.max_concurrency
            if num_now is not None and num_now < (num_before or 0):
                logger.warning(
                    "it holds %d at a time now, %d before: under a higher limit some would have a slot and wait in it",
                    num_now,
                    num_before,
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
            case EngineUnavailable():  # it died
                return ConfigError(f"cannot load {self._model_name}: {child.why_gone}")
            case _:
                return ConfigError(f"cannot load {self._model_name}: {error}")


def _pickled(recipe: Recipe) -> bytes:
    """Raises `ConfigError` when the child could not make an engine of it."""
    function = recipe.func if isinstance(recipe, partial) else recipe
    if getattr(function, "__module__", None) == "__main__":
        raise ConfigError("an engine for another process must be made by a function of a module, not of the script")
    try:
        return pickle.dumps(recipe)
    except Exception as error:
        raise ConfigError(f"this engine cannot be made in another process: {error}") from error
