"""The shared engine for models whose batch we own: the event loop's side. The thread's side is step_loop.py."""

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
from chatstream.engines.thread.handover import Outbox, deltas_of
from chatstream.types import GenerationRequest, PreparedPrompt, PromptInput, SamplingParams, TokenDelta


class StepEngine:
    """An `Engine` that can preempt (base.py) over a `ModelRunner` and a `Codec`."""

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
        """`load` runs in the engine's thread at `start`. Raises `ConfigError` for impossible settings.

        Beside others who generate, a step reads as many prompt tokens as keep it within `itl_target_s`; without a
        target, within 1.9 times a step without prompts, and up to 4 times while more wait for their first token than
        generate; with one of `inf`, as many as there are. Never more than `max_prompt_tokens_per_step`.
        `max_undelivered` is how many tokens a reader may lag behind before its generation pauses; the others go on. A
        step that takes longer than `step_timeout_s` makes the engine unhealthy.
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

    def tell_progress(self, stage: str, share: float) -> None:
        """For `load`: how far it is, from 0 to 1. Seen in `health` meanwhile."""
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
                wanted=sampling.max_new_tokens or 1,
                may_drop_history=may_drop_history,
            )
        )

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        model = self._thread.ready_model()
        outbox = Outbox(asyncio.get_running_loop(), self._max_undelivered, self._wake)
        sequence = Sequence(request, model, outbox)
        self._thread.open(outbox, lambda: self._loop.add(sequence))
        leave = partial(self._wait_obeyed, lambda: self._loop.drop(sequence, keep=True))
        async with aclosing(deltas_of(outbox, leave=leave)) as deltas:
            async for delta in deltas:
                yield delta

    async def preempt(self, request_id: str) -> None:
        await self._wait_obeyed(lambda: self._loop.set_preempted(request_id, True))

    def resume(self, request_id: str) -> None:
        self._thread.put(lambda: self._loop.set_preempted(request_id, False))

    async def _wait_obeyed(self, command: Callable[[], None]) -> None:
        """Returns when the engine's thread has done it: at most one step later, and before the step after that."""

        def obey(tell: Callable[[], None]) -> None:
            command()
            tell()

        await self._thread.wait_executed(obey)

    def _wake(self) -> None:
        self._thread.put(lambda: None)
