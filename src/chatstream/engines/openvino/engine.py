"""An engine over `Pipeline`: one thread, one token for everybody a step.

    commands -> pipeline.step() -> detokenise, stop strings -> one hand-over to the event loop -> again

The library plans each step by itself: nobody can be left out of one. So a reader who does not keep up does not pause
its generation; what lies undelivered is bounded by the length of its answer. And a generation cannot be preempted.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from chatstream.engines.base import Capacity, EngineHealth, EngineStats
from chatstream.engines.loading.checkpoint_defaults import answer_len
from chatstream.engines.text.answer import Answer
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.text.prompt_fitting import check_prompt, fit_prompt
from chatstream.engines.thread.engine_thread import EngineThread
from chatstream.engines.thread.handover import Item, Outbox, deltas_of, hand_over
from chatstream.errors import ChatStreamError, EngineError, UnsupportedParameter
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

    def __init__(self, model_name: str, load: Callable[[], Loaded]) -> None:
        """`load` runs in the engine's thread at `start`. After a step that failed the engine is not ready any more."""
        self._model_name = model_name
        self._loop = _PipelineLoop()
        self._thread = EngineThread(model_name, load, self._loop)

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        model = self._thread.model
        if model is None:
            return Capacity()
        return Capacity(model.max_concurrency, model.context_len, speed_key=model.speed_key)

    @property
    def default_sampling(self) -> SamplingParams:
        model = self._thread.model
        if model is None:
            return SamplingParams()
        return replace(model.default_sampling, max_new_tokens=answer_len(model.context_len))

    def health(self) -> EngineHealth:
        return self._thread.health()

    def stats(self) -> EngineStats:
        """Without what the library keeps of earlier prompts: it does not say."""
        return self._loop.stats()

    async def start(self) -> None:
        await self._thread.start()

    async def stop(self) -> None:
        await self._thread.stop()

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        model = self._thread.ready_model()
        _refuse_unsupported(sampling)
        return await self._thread.encode(
            partial(
                fit_prompt,
                model.codec,
                prompt,
                context_len=model.context_len,
                wanted=sampling.max_new_tokens or 1,
                may_drop_history=may_drop_history,
            )
        )

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        model = self._thread.ready_model()
        _refuse_unsupported(request.sampling)
        if request.token_mask is not None:
            raise UnsupportedParameter("the OpenVINO engine takes no token mask", param="token_mask")
        check_prompt(request.prompt.token_ids, model.vocab_size, model.context_len)
        outbox = Outbox(asyncio.get_running_loop(), model.context_len, lambda: None)
        sequence = _Sequence(request, model, outbox)
        self._thread.open(outbox, lambda: self._loop.add(sequence))
        deltas = deltas_of(
            outbox,
            leave=lambda: self._thread.wait_executed(lambda tell: self._loop.drop(sequence, tell)),
        )
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta


class _PipelineLoop:
    """The `Work` (engine_thread.py) of a pipeline: adds newcomers while there is room, hands out what a step made."""

    survives_failure = False

    def __init__(self) -> None:
        self._model: Loaded | None = None
        self._newcomers: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._prompt_tokens = 0
        self._leavers: list[Callable[[], None]] = []
        """Their memory is free after the next step; then these are called."""

    def stats(self) -> EngineStats:
        """May be called in any thread."""
        return EngineStats(num_slots=len(self._running), prompt_tokens=self._prompt_tokens)

    def begin(self, model: Loaded) -> None:
        self._model = model

    def turn(self) -> bool:
        if not (self._newcomers or self._running or self._leavers):
            return False
        assert self._model is not None
        # Who is added while a leaver still holds memory might find none, and the library ends everybody's request then.
        if not self._leavers:
            self._admit(self._model)
        try:
            if self._model.pipeline.has_requests:
                self._model.pipeline.step()
        except BaseException:
            self._model = None  # another step, when it is closed, could end the process
            raise
        leavers, self._leavers = self._leavers, []
        deliveries: list[tuple[Outbox, Item]] = []
        for sequence in list(self._running):
            deliveries += ((sequence.outbox, item) for item in self._news(sequence))
        hand_over(deliveries)
        for tell in leavers:
            tell()
        time.sleep(LOOP_TURN_S)
        return True

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
                    self.drop(sequence)
                    return
        except Exception as error:
            logger.warning("request %s failed", sequence.request.request_id, exc_info=error)
            self.drop(sequence)
            yield EngineError(f"the model failed: {error}")

    def add(self, sequence: _Sequence) -> None:
        self._newcomers.append(sequence)

    def drop(self, sequence: _Sequence, tell: Callable[[], None] = lambda: None) -> None:
        if sequence in self._running:
            self._running.remove(sequence)
            if sequence.leave():
                self._leavers.append(tell)
                return
        elif sequence in self._newcomers:
            self._newcomers.remove(sequence)
        tell()

    def end_all(self, error: ChatStreamError) -> None:
        sequences, self._running, self._newcomers = self._running + self._newcomers, [], []
        leavers, self._leavers = self._leavers, []
        for sequence in sequences:
            sequence.leave()
        hand_over([(sequence.outbox, error) for sequence in sequences])
        for tell in leavers:
            tell()

    def close(self) -> None:
        """Here and not on the event loop: the pipeline gives back gigabytes."""
        model, self._model = self._model, None
        if model is not None and model.pipeline.has_requests:
            try:
                model.pipeline.step()  # which those who were cancelled wait for
            except Exception:
                logger.exception("the last step failed")


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
            yield self._answer.advance(SampledToken(token), num_prompt_tokens=num_prompt_tokens)
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
