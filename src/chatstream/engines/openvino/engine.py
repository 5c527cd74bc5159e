"""An engine over `Pipeline`: one thread; each step gives every generating request one token.

    commands -> pipeline.step() -> detokenise, stop strings -> one hand-over to the event loop -> again

The library plans each step by itself, and no request can skip a step. So a slow reader does not pause its
generation (the undelivered deltas are bounded by the length of the answer), and a generation cannot be preempted.
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
from chatstream.engines.thread.handover import DeltaBuffer, Item, deltas_of, hand_over
from chatstream.errors import ChatStreamError, EngineError, UnsupportedParameter
from chatstream.types import GenerationRequest, PreparedPrompt, PromptInput, SamplingParams, TokenDelta

if TYPE_CHECKING:
    from chatstream.engines.openvino.loader import Loaded
    from chatstream.engines.openvino.pipeline import Generation

logger = logging.getLogger(__name__)

YIELD_S = 0.0005
"""Sleep between two steps, both of which hold Python's lock: the event loop wakes and runs one tick. Without the sleep,
tokens are read one step late."""


class OpenVINOEngine:
    """An `Engine` (base.py) for exported models. Run it in a process of its own: a step holds Python's lock."""

    def __init__(self, model_name: str, load: Callable[[], Loaded]) -> None:
        """`load` runs in the engine thread at `start`. After a failed step the engine stays unavailable until it is
        started again."""
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
        """Statistics without those of the prefix cache, which the library does not report."""
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
                num_answer_tokens=sampling.max_new_tokens or 1,
                may_drop_history=may_drop_history,
            )
        )

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        model = self._thread.ready_model()
        _refuse_unsupported(request.sampling)
        if request.token_mask is not None:
            raise UnsupportedParameter("the OpenVINO engine does not support token_mask", param="token_mask")
        check_prompt(request.prompt.token_ids, model.vocab_size, model.context_len)
        buffer = DeltaBuffer(asyncio.get_running_loop(), model.context_len, lambda: None)
        sequence = _Sequence(request, model, buffer)
        self._thread.open(buffer, lambda: self._loop.add(sequence))
        deltas = deltas_of(
            buffer,
            on_abandoned=lambda: self._thread.execute(lambda on_released: self._loop.drop(sequence, on_released)),
        )
        async with aclosing(deltas):
            async for delta in deltas:
                yield delta


class _PipelineLoop:
    """The `Work` (engine_thread.py) of a pipeline: starts waiting requests while there is capacity, hands over what a
    step generated."""

    survives_failure = False

    def __init__(self) -> None:
        self._model: Loaded | None = None
        self._waiting: list[_Sequence] = []
        self._running: list[_Sequence] = []
        self._prompt_tokens = 0
        self._releases: list[Callable[[], None]] = []
        """Callbacks of cancelled requests. The next step frees their memory; then they are called."""

    def stats(self) -> EngineStats:
        """May be called in any thread."""
        return EngineStats(num_slots=len(self._running), prompt_tokens=self._prompt_tokens)

    def set_model(self, model: Loaded) -> None:
        self._model = model

    def run_step(self) -> bool:
        if not (self._waiting or self._running or self._releases):
            return False
        assert self._model is not None
        # While a cancelled request still holds memory, a new request might find none, and the library would then end
        # every request.
        if not self._releases:
            self._start_waiting(self._model)
        try:
            if self._model.pipeline.has_requests:
                self._model.pipeline.step()
        except BaseException:
            self._model = None  # prevents another step in `close`, which could end the process
            raise
        releases, self._releases = self._releases, []
        deliveries: list[tuple[DeltaBuffer, Item]] = []
        for sequence in list(self._running):
            deliveries += ((sequence.buffer, item) for item in self._advance(sequence))
        hand_over(deliveries)
        for on_released in releases:
            on_released()
        time.sleep(YIELD_S)
        return True

    def _start_waiting(self, model: Loaded) -> None:
        while self._waiting and len(self._running) < model.max_concurrency:
            sequence = self._waiting.pop(0)
            try:
                sequence.open()
            except Exception as error:
                logger.exception("request %s could not be added", sequence.request.request_id)
                hand_over([(sequence.buffer, EngineError(f"the model refused the request: {error}"))])
            else:
                self._running.append(sequence)

    def _advance(self, sequence: _Sequence) -> Iterable[Item]:
        """The deltas that the step gave one sequence. The sequence is dropped with its last delta."""
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
        self._waiting.append(sequence)

    def drop(self, sequence: _Sequence, on_released: Callable[[], None] = lambda: None) -> None:
        """Remove a sequence. Calls `on_released` when its memory is free: at once, or after the next step."""
        if sequence in self._running:
            self._running.remove(sequence)
            if sequence.cancel():
                self._releases.append(on_released)
                return
        elif sequence in self._waiting:
            self._waiting.remove(sequence)
        on_released()

    def end_all(self, error: ChatStreamError) -> None:
        sequences, self._running, self._waiting = self._running + self._waiting, [], []
        releases, self._releases = self._releases, []
        for sequence in sequences:
            sequence.cancel()
        hand_over([(sequence.buffer, error) for sequence in sequences])
        for on_released in releases:
            on_released()

    def close(self) -> None:
        """Runs in the engine thread, because the pipeline frees gigabytes."""
        model, self._model = self._model, None
        if model is not None and model.pipeline.has_requests:
            try:
                model.pipeline.step()  # this step frees cancelled requests
            except Exception:
                logger.exception("the last step failed")


class _Sequence:
    """One request inside the engine."""

    def __init__(self, request: GenerationRequest, model: Loaded, buffer: DeltaBuffer) -> None:
        self.request = request
        self.buffer = buffer
        self._model = model
        self._answer = Answer(request, model.codec, context_len=model.context_len, chat_stops=model.codec.chat_stops)
        self._unreported_prompt_tokens = len(request.prompt.token_ids)
        self._generation: Generation | None = None

    def open(self) -> None:
        self._generation = self._model.pipeline.add(
            self.request.prompt.token_ids,
            self.request.sampling,
            max_new_tokens=self._answer.max_new_tokens,
            eos_token_ids=self._model.codec.eos_token_ids,
        )

    def advance(self) -> Iterable[TokenDelta]:
        """The deltas that the last step adds to the answer. Raises `RuntimeError` if the pipeline ended the request."""
        assert self._generation is not None
        status = self._generation.status
        for token in self._generation.take():
            num_prompt_tokens, self._unreported_prompt_tokens = self._unreported_prompt_tokens, 0
            yield self._answer.advance(SampledToken(token), num_prompt_tokens=num_prompt_tokens)
        if status != "RUNNING":
            raise RuntimeError("the cache is full" if status == "IGNORED" else f"the pipeline ended it: {status}")

    def cancel(self) -> bool:
        """Cancel the generation. Returns whether it holds memory until the next step."""
        if self._generation is None or self._generation.status != "RUNNING":
            return False
        self._generation.cancel()
        return True


def _refuse_unsupported(sampling: SamplingParams) -> None:
    # The library adds the two penalties to logits below zero instead of subtracting them; it reports the log
    # probability of the chosen token only, and one that is not a number breaks the step for every request.
    for name in ("frequency_penalty", "presence_penalty"):
        if getattr(sampling, name):
            raise UnsupportedParameter(
                f"the OpenVINO engine does not support {name} as the OpenAI API defines it", param=name
            )
    if sampling.logprobs is not None:
        raise UnsupportedParameter("the OpenVINO engine does not support logprobs", param="logprobs")
