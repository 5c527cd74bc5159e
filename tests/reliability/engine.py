"""A `FakeEngine` that breaks the engine contract wherever a fault occurs."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncGenerator

from chatstream.errors import EngineUnavailable
from chatstream.testing import FakeEngine, Fault
from chatstream.testing.fake_engine import Step
from chatstream.types import FinishReason, GenerationRequest, PreparedPrompt, PromptInput, SamplingParams, TokenDelta
from tests.reliability.faults import Faults

LATE = TokenDelta("late")


class UnreliableEngine(FakeEngine):
    """The answer to a request, and its faults, depend on the seed and on the text of the request."""

    def __init__(self, seed: int, faults: Faults) -> None:
        super().__init__(self._script, step_s=0.1, prefill_s=0.05)
        self._seed = seed
        self._faults = faults
        self._attempts: dict[str, int] = {}

    def answer(self, message: str) -> list[str]:
        """Return the complete answer to a message."""
        rng = random.Random(f"{self._seed}:{message}")
        return [f"{message}.{n} " for n in range(rng.choice([1, 2, 4, 8, 30]))]

    async def start(self) -> None:
        await asyncio.sleep(0.5)
        await super().start()

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        if self._faults.strikes("slow preparation"):
            await asyncio.sleep(self._faults.rng("slow preparation").uniform(0.1, 4.0))
        if self._faults.strikes("after admission"):
            raise self._faults.rng("after admission").choice([RuntimeError("no template"), EngineUnavailable("gone")])
        return await super().prepare(prompt, sampling, may_drop_history=may_drop_history)

    async def preempt(self, request_id: str) -> None:
        if self._faults.strikes("cannot preempt"):
            if self._faults.rng("cannot preempt").random() < 0.5:
                raise RuntimeError("no room to preempt")
            await self._hang(is_deaf=False)
        await super().preempt(request_id)

    def resume(self, request_id: str) -> None:
        if self._faults.strikes("cannot resume"):
            raise RuntimeError("preempted and lost")
        super().resume(request_id)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        faults = self._faults
        inner = super().stream(request)
        so_far: list[TokenDelta] = []
        try:
            while True:
                if faults.strikes("slow step"):
                    await asyncio.sleep(5.0)
                try:
                    delta = await anext(inner)
                except StopAsyncIteration:
                    return
                except asyncio.CancelledError:
                    if faults.strikes("finish during cancel"):
                        yield TokenDelta("", finish_reason=FinishReason.STOP)
                    elif faults.strikes("first token after cancel"):
                        self.generated[request.request_id].append(LATE.text)
                        yield LATE
                    raise
                so_far.append(delta)
                if faults.strikes("engine cancels itself"):
                    raise asyncio.CancelledError
                if delta.finish_reason is not None and faults.strikes("ends without a finish"):
                    self.generated[request.request_id].pop()
                    return
                yield delta
                if delta.finish_reason is not None and faults.strikes("goes on after its end"):
                    yield TokenDelta("more")
        finally:
            try:
                if faults.strikes("cancelled inside finally"):
                    await _be_cancelled_meanwhile()
            finally:
                await inner.aclose()

    async def _hang(self, *, is_deaf: bool) -> None:
        """Hang until the watchdog ends the request; a recovery of the engine does not help."""
        if is_deaf:
            await super()._hang(is_deaf=True)
        else:
            await asyncio.get_running_loop().create_future()

    def _script(self, request: GenerationRequest) -> list[Step]:
        message = request.prompt.messages[-1].content
        steps: list[Step] = list(self.answer(message))
        attempt = self._attempts[message] = self._attempts.get(message, 0) + 1
        rng = random.Random(f"{self._seed}:{message}:{attempt}")
        broken: dict[str, Step] = {
            "step raises": RuntimeError("boom"),
            "memory error in the engine": MemoryError(),
            "engine is lost": EngineUnavailable("lost"),
            "engine hangs": Fault.HANG,
            "engine is deaf": Fault.DEAF,
        }
        if attempt == 1 and "queue full at requeue" in self._faults and not self._faults.is_over:
            return [EngineUnavailable("lost when the queue is full")]
        if self._faults.strikes("start raises"):
            return [rng.choice([RuntimeError("no"), EngineUnavailable("lost"), ValueError("ids")])]
        for name, step in broken.items():
            if self._faults.strikes(name):
                return [*steps[: rng.randrange(len(steps))], step, *steps[-1:]]
        return steps


async def _be_cancelled_meanwhile() -> None:
    task = asyncio.current_task()
    assert task is not None
    asyncio.get_running_loop().call_later(0.01, task.cancel)
    await asyncio.sleep(0.05)
