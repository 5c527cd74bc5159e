"""An engine over `Pipeline`: one thread, one token for everybody a step.

    commands -> pipeline.step() -> detokenise, stop strings -> one hand-over to the event loop -> again

The library plans each step by itself: nobody can be left out of one. So a reader who does not keep up does not pause
its generation; what lies undelivered is bounded by the length of its answer. And a generation cannot be parked.
"""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chatstream.engines.answer import Answer
from chatstream.engines.base import Capacity, EngineHealth, EngineStats
from chatstream.engines.handover import Item, Outbox, hand_over, resolver
from chatstream.engines.model import NextToken
from chatstream.engines.prompt_fitting import fit_prompt
from chatstream.errors import (
    ChatStreamError,
    ConfigError,
    EngineError,
    EngineUnavailable,
    InvalidRequest,
    PromptTooLong,
    UnsupportedParameter,
)
from chatstream.types import GenerationRequest, PreparedPrompt, PromptInput, SamplingParams, TokenDelta

if TYPE_CHECKING:
    from chatstream.engines.openvino.loader import Loaded
    from chatstream.engines.openvino.pipeline import Generation

logger = logging.getLogger(__name__)

LOOP_TURN_S = 0.0005
"""Between two steps, which both keep Python's lock: in this time the event loop wakes up, and what it then does it does
to its end. Without it, tokens would be read one step late."""


class OpenVINOEngine:
    """An `Engine` (base.py) for exported models. It belongs in a process of its own, because of Python's lock."""

    STOP_TIMEOUT_S = 30.0
    """How long `stop` waits for a step that does not end; the thread is a daemon and dies with the process."""

    def __init__(self, model_name: str, load: Callable[[], Loaded]) -> None:
        """`load` runs in the engine's thread, at `start` and after the pipeline has failed."""
        self._model_name = model_name
        self._load = load
        self._model: Loaded | None = None
        self._detail = "not started"
        self._thread: threading.Thread | None = None
        self._loaded: asyncio.Future[None] | None = None
        """Set by the first start; done when the model is there."""
        self._encoder: ThreadPoolExecutor | None = None
        self._commands: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._is_stopping = False
        self._obeys = False
        """Commands are still read. Set to False before the last ones are taken, so that none is left unread."""
        # Owned by the engine's thread.
        self._newcomers: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._prompt_tokens = 0
        self._leavers: list[Callable[[], None]] = []
        """Their memory is free after the next step; then these are called."""

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        model = self._model
        if model is None:
            return Capacity()
        return Capacity(model.max_concurrency, model.context_len, speed_key=model.speed_key)

    @property
    def default_sampling(self) -> SamplingParams:
        if self._model is None:
            return SamplingParams()
        # Long enough for an answer, short enough that a conversation still fits beside it.
        return replace(self._model.default_sampling, max_new_tokens=max(1, min(1024, self._model.context_len // 4)))

    def health(self) -> EngineHealth:
        is_ready = self._model is not None and self._thread is not None and self._thread.is_alive()
        return EngineHealth(is_ready, "" if is_ready else self._detail)

    def stats(self) -> EngineStats:
        """Without what the library keeps of earlier prompts: it does not say."""
        return EngineStats(num_slots=len(self._running), prompt_tokens=self._prompt_tokens)

    async def start(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loaded is None:
            self._detail = "loading"
            self._is_stopping = False
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
            self._detail = f"could not load: {error}"
            self._loaded = self._thread = None

    async def stop(self) -> None:
        thread, self._thread, self._loaded = self._thread, None, None
        if thread is None:
            return
        self._detail = "stopped"
        self._commands.put(self._stop)
        await asyncio.to_thread(thread.join, self.STOP_TIMEOUT_S)
        if thread.is_alive():
            logger.error("%s did not finish its step within %.0f s; left behind", self._model_name, self.STOP_TIMEOUT_S)
        if self._encoder is not None:
            self._encoder.shutdown(wait=False)
        self._model = None

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        model = self._ready_model()
        _refuse_unsupported(sampling)
        assert self._encoder is not None
        fit = partial(
            fit_prompt,
            model.codec,
            prompt,
            context_len=model.context_len,
            wanted=sampling.max_new_tokens or 1,
            may_drop_history=may_drop_history,
        )
        return await asyncio.get_running_loop().run_in_executor(self._encoder, fit)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        model = self._ready_model()
        _check(request, model)
        outbox = Outbox(asyncio.get_running_loop(), model.context_len, lambda: None)
        sequence = _Sequence(request, model, outbox)
        self._commands.put(lambda: self._newcomers.append(sequence))
        has_ended = False
        try:
            while not has_ended:
                delta = await outbox.get()
                if isinstance(delta, ChatStreamError):
                    has_ended = True
                    raise delta
                has_ended = delta.finish_reason is not None
                yield delta
        finally:
            if not has_ended:
                await self._wait_left(sequence)

    def _ready_model(self) -> Loaded:
        if not self.health().is_ready or self._model is None:
            raise EngineUnavailable(f"the model is not available: {self._detail}")
        return self._model

    async def _wait_left(self, sequence: _Sequence) -> None:
        """Returns when the sequence is computed no more and its memory is free: at most two steps later."""
        loop = asyncio.get_running_loop()
        has_left: asyncio.Future[None] = loop.create_future()
        tell = partial(resolver(loop, has_left), None)
        self._commands.put(lambda: self._drop(sequence, tell))
        if self._obeys:
            await has_left

    # --- the engine's thread ----------------------------------------------------------------------------------

    def _run(self, report_loaded: Callable[[Exception | None], None]) -> None:
        try:
            self._model = self._load()
        except ConfigError as error:
            report_loaded(error)
            return
        except BaseException as error:  # libraries written in Rust panic with one
            logger.debug("loading %s failed", self._model_name, exc_info=error)
            report_loaded(ConfigError(f"cannot load {self._model_name}: {error}"))
            return
        self._obeys = True
        report_loaded(None)
        while not self._is_stopping and self._model is not None:
            try:
                self._obey_commands(may_wait=not self._has_work)
                if not self._is_stopping:
                    self._take_step(self._model)
                continue
            except BaseException:
                logger.exception("a step of %s failed", self._model_name)
            self._begin_anew()
        self._obeys = False
        self._obey_commands(may_wait=False)
        self._end_all(EngineUnavailable("the engine was stopped"))
        self._let_go()

    def _stop(self) -> None:
        self._is_stopping = True

    @property
    def _has_work(self) -> bool:
        return bool(self._newcomers or self._running or self._leavers)

    def _obey_commands(self, *, may_wait: bool) -> None:
        try:
            self._commands.get(block=may_wait)()
            while True:
                self._commands.get_nowait()()
        except queue.Empty:
            pass

    def _take_step(self, model: Loaded) -> None:
        # Who is added while a leaver still holds memory might find none, and the library ends everybody's request then.
        if not self._leavers:
            self._admit(model)
        if model.pipeline.has_requests:
            model.pipeline.step()
        leavers, self._leavers = self._leavers, []
        deliveries: list[tuple[Outbox, Item]] = []
        for sequence in list(self._running):
            deliveries += ((sequence.outbox, item) for item in self._news(sequence))
        hand_over(deliveries)
        for tell in leavers:
            tell()
        time.sleep(LOOP_TURN_S)

    def _admit(self, model: Loaded) -> None:
        while self._newcomers and len(self._running) < model.max_concurrency:
            sequence = self._newcomers.pop(0)
            try:
                sequence.open()
            except Exception as error:
                logger.exception("request %s could not be added", sequence.request.request_id)
                hand_over([(sequence.outbox, EngineError(f"the model refused the request: {error}"))])
            else:
                self._running.append(sequence)

    def _news(self, sequence: _Sequence) -> Iterable[Item]:
        """What the step has brought one sequence, which is dropped with its last delta."""
        try:
            for delta in sequence.advance():
                self._prompt_tokens += delta.num_prompt_tokens
                yield delta
                if delta.finish_reason is not None:
                    self._drop(sequence)
                    return
        except Exception as error:
            logger.warning("request %s failed", sequence.request.request_id, exc_info=error)
            self._drop(sequence)
            yield EngineError(f"the model failed: {error}")

    def _drop(self, sequence: _Sequence, tell: Callable[[], None] = lambda: None) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            if sequence.leave():
                self._leavers.append(tell)
                return
        elif sequence in self._newcomers:
            self._newcomers.remove(sequence)
        tell()

    def _begin_anew(self) -> None:
        """The library is in an unknown state: everybody is told, and the next requests get a fresh pipeline."""
        self._detail = "loading again after a failed step"
        self._model = None
        self._end_all(EngineUnavailable("the engine failed"))
        try:
            self._model = self._load()
        except BaseException as error:
            logger.exception("%s could not be loaded again", self._model_name)
            self._detail = f"could not be loaded again: {error}"

    def _let_go(self) -> None:
        """Of the pipeline, here and not on the event loop: it gives back gigabytes."""
        model, self._model = self._model, None
        if model is not None and model.pipeline.has_requests:
            try:
                model.pipeline.step()  # which those who were cancelled wait for
            except Exception:
                logger.exception("the last step of %s failed", self._model_name)

    def _end_all(self, error: ChatStreamError) -> None:
        sequences, self._running, self._newcomers = self._running + self._newcomers, [], []
        leavers, self._leavers = self._leavers, []
        for sequence in sequences:
            sequence.leave()
        hand_over([(sequence.outbox, error) for sequence in sequences])
        for tell in leavers:
            tell()


class _Sequence:
    """One request inside the engine."""

    def __init__(self, request: GenerationRequest, model: Loaded, outbox: Outbox) -> None:
        self.request = request
        self.outbox = outbox
        self._model = model
        self._answer = Answer(request, model.codec, context_len=model.context_len, chat_stops=model.codec.chat_stops)
        self._untold_prompt_tokens = len(request.prompt.token_ids)
        self._generation: Generation | None = None

    def open(self) -> None:
        self._generation = self._model.pipeline.add(
            self.request.prompt.token_ids,
            self.request.sampling,
            max_new_tokens=self._answer.max_new_tokens,
            eos_token_ids=self._model.codec.eos_token_ids,
        )

    def advance(self) -> Iterable[TokenDelta]:
        """What the last step adds to the answer. Raises `RuntimeError` when it ended too early."""
        assert self._generation is not None
        status = self._generation.status
        for token in self._generation.take():
            num_prompt_tokens, self._untold_prompt_tokens = self._untold_prompt_tokens, 0
            yield self._answer.advance(NextToken(token), num_prompt_tokens=num_prompt_tokens)
        if status != "RUNNING":
            raise RuntimeError("the cache is full" if status == "IGNORED" else f"the pipeline ended it: {status}")

    def leave(self) -> bool:
        """Whether it still holds memory, until the next step."""
        if self._generation is None or self._generation.status != "RUNNING":
            return False
        self._generation.cancel()
        return True


def _refuse_unsupported(sampling: SamplingParams) -> None:
    # The library adds the two penalties to logits below zero instead of taking them away; it tells only the log
    # probability of the chosen token, and one that is not a number breaks the step for everybody.
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(sampling, name):
            raise UnsupportedParameter(f"the OpenVINO engine has no {name} of OpenAI's meaning", param=name)
    if sampling.logprobs is not None:
        raise UnsupportedParameter("the OpenVINO engine tells no logprobs", param="logprobs")


def _check(request: GenerationRequest, model: Loaded) -> None:
    """What the library would not notice, or notice for everybody."""
    _refuse_unsupported(request.sampling)
    if request.token_mask is not None:
        raise UnsupportedParameter("the OpenVINO engine takes no token mask", param="token_mask")
    ids = request.prompt.token_ids
    if not ids:
        raise InvalidRequest("the prompt is empty", param="prompt")
    if not all(0 <= token_id < model.vocab_size for token_id in ids):
        raise InvalidRequest(
            f"the prompt has tokens that the model does not know, of {model.vocab_size}", param="prompt"
        )
    if len(ids) >= model.context_len:
        raise PromptTooLong(f"the prompt has {len(ids)} tokens, the context {model.context_len}", param="prompt")
