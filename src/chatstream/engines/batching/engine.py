"""`StepEngine`: the event loop's side of an engine over a `ModelRunner`. The engine thread's side is loop.py."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from math import inf

from chatstream.checks import check_int, check_seconds
from chatstream.engines.base import Capacity, EngineHealth, EngineStats
from chatstream.engines.batching.loop import StepLoop
from chatstream.engines.batching.model import LoadedModel
from chatstream.engines.batching.prompt_budget import PromptBudget
from chatstream.engines.batching.sequence import Sequence
from chatstream.engines.loading.checkpoint_defaults import answer_len
from chatstream.engines.text.prompt_fitting import fit_prompt
from chatstream.engines.thread.engine_thread import EngineThread
from chatstream.engines.thread.handover import DeltaBuffer, deltas_of
from chatstream.types import GenerationRequest, PreparedPrompt, PromptInput, SamplingParams, TokenDelta


class StepEngine:
    """An `Engine` that can preempt (base.py), over a `ModelRunner` and a `Codec`."""

    def __init__(
        self,
        model_name: str,
        load: Callable[[], LoadedModel],
        *,
        max_prompt_tokens_per_step: int = 512,
        itl_target_s: float | None = None,
        max_undelivered: int = 64,
        step_timeout_s: float = 120.0,
    ) -> None:
        """`load` runs in the engine thread during `start`. Raises `ConfigError` for an invalid setting.

        `max_prompt_tokens_per_step` bounds the prompt tokens of one step. `itl_target_s` is the target time of a step
        while requests generate; the prefill part of the step is sized to it. None: 1.9 times the time of a step without
        prompt tokens, up to 4 times while more requests wait for their first token than generate. `inf`: no target.

        `max_undelivered` bounds the buffered tokens of one stream; while the buffer is full, that generation pauses. A
        step that runs longer than `step_timeout_s` makes the engine unhealthy.
        """
        check_int("max_prompt_tokens_per_step", max_prompt_tokens_per_step, at_least=1)
        check_int("max_undelivered", max_undelivered, at_least=1)
        if itl_target_s != inf:
            check_seconds("itl_target_s", itl_target_s, or_none=True)
        check_seconds("step_timeout_s", step_timeout_s)
        self._model_name = model_name
        self._max_undelivered = max_undelivered
        self._step_timeout_s = step_timeout_s
        self._loop = StepLoop(PromptBudget(max_prompt_tokens_per_step, itl_target_s))
        self._thread = EngineThread(model_name, load, self._loop)

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        model = self._thread.model
        if model is None:
            return Capacity(can_preempt=True)
        runner = model.runner
        return Capacity(
            runner.max_slots,
            runner.context_len,
            can_preempt=True,
            limited_by=model.limits,
            speed_key=model.speed_key,
        )

    @property
    def default_sampling(self) -> SamplingParams:
        model = self._thread.model
        if model is None:
            return SamplingParams()
        sampling = model.default_sampling
        if sampling.max_new_tokens is not None:
            return sampling
        return replace(sampling, max_new_tokens=answer_len(model.runner.context_len))

    def health(self) -> EngineHealth:
        began_s = self._loop.step_began_s
        if began_s is not None and time.monotonic() - began_s > self._step_timeout_s:
            return EngineHealth(False, f"a step has not ended for more than {self._step_timeout_s:.0f} s")
        return self._thread.health()

    def stats(self) -> EngineStats:
        return self._loop.stats()

    def report_progress(self, stage: str, share: float) -> None:
        """Called by `load`: set the progress that `health` reports. `share` is between 0 and 1."""
        self._thread.detail = f"loading: {stage}, {share:.0%}"

    async def start(self) -> None:
        await self._thread.start()

    async def stop(self) -> None:
        await self._thread.stop()

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        model = self._thread.ready_model()
        return await self._thread.encode(
            partial(
                fit_prompt,
                model.codec,
                prompt,
                context_len=model.runner.context_len,
                num_answer_tokens=sampling.max_new_tokens or 1,
                may_drop_history=may_drop_history,
            )
        )

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        model = self._thread.ready_model()
        buffer = DeltaBuffer(asyncio.get_running_loop(), self._max_undelivered, self._wake)
        sequence = Sequence(request, model, buffer)
        self._thread.open(buffer, lambda: self._loop.add(sequence))
        drop = partial(self._execute, lambda: self._loop.drop(sequence, cache=True))
        async with aclosing(deltas_of(buffer, on_abandoned=drop)) as deltas:
            async for delta in deltas:
                yield delta

    async def preempt(self, request_id: str) -> None:
        await self._execute(lambda: self._loop.set_preempted(request_id, True))

    def resume(self, request_id: str) -> None:
        self._thread.put(lambda: self._loop.set_preempted(request_id, False))

    async def _execute(self, command: Callable[[], None]) -> None:
        """Run the command in the engine thread, between two steps. Return when it has run, at most one step later."""

        def run(report_done: Callable[[], None]) -> None:
            command()
            report_done()

        await self._thread.execute(run)

    def _wake(self) -> None:
        self._thread.put(lambda: None)
