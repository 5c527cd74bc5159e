"""An engine that plays a script, for tests of everything around an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from enum import Enum
from typing import TypeAlias

from chatstream.engines.base import Capacity, EngineHealth, as_messages
from chatstream.types import (
    FinishReason,
    GenerationRequest,
    PreparedPrompt,
    PromptInput,
    SamplingParams,
    TokenDelta,
    Usage,
)


class Fault(Enum):
    """What a script can contain beside text."""

    HANG = "hang"
    """Never goes on, but can be cancelled."""
    DEAF = "deaf"
    """Does not go on and does not let go when it is cancelled, until `FakeEngine.heal`."""


Step: TypeAlias = str | Exception | Fault
Script: TypeAlias = Sequence[Step] | Callable[[GenerationRequest], Sequence[Step]]


class FakeEngine:
    """Yields its script, one str a token, at a steady pace; an exception in the script is raised at its place.

    `log` holds (time, request id) of every token in the order of generation, `active` those that generate now, and
    `peak_active` the most that ever did. Without `step_s` it still gives the event loop its turn after every token.
    """

    def __init__(
        self,
        script: Script = ("Hello", ", ", "world"),
        *,
        step_s: float = 0.0,
        prefill_s: float = 0.0,
        model_name: str = "fake",
        finish_reason: FinishReason = FinishReason.STOP,
    ) -> None:
        self._script = script
        self._step_s = step_s
        self._prefill_s = prefill_s
        self._model_name = model_name
        self._finish_reason = finish_reason
        self._is_started = False
        self.log: list[tuple[float, str]] = []
        self.generated: dict[str, list[str]] = {}
        self.prompts: dict[str, PreparedPrompt] = {}
        self.active: set[str] = set()
        self.peak_active = 0
        self.num_prepared = 0
        self._healed = asyncio.Event()

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        return Capacity()

    @property
    def default_sampling(self) -> SamplingParams:
        return SamplingParams()

    async def start(self) -> None:
        self._is_started = True

    async def stop(self) -> None:
        self._is_started = False

    def health(self) -> EngineHealth:
        return EngineHealth(self._is_started, "" if self._is_started else "not started")

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        self.num_prepared += 1
        return PreparedPrompt(messages=as_messages(prompt))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        request_id = request.request_id
        self.prompts[request_id] = request.prompt
        self.generated[request_id] = []
        self.active.add(request_id)
        self.peak_active = max(self.peak_active, len(self.active))
        try:
            await asyncio.sleep(self._prefill_s)
            async for delta in self._play(request):
                yield delta
        finally:
            self.active.discard(request_id)

    def heal(self) -> None:
        """Those who are deaf go on."""
        self._healed.set()

    async def _play(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        script = self._script(request) if callable(self._script) else self._script
        so_far = self.generated[request.request_id]
        for n, step in enumerate(script, start=1):
            await asyncio.sleep(self._step_s)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Fault):
                await self._hang(is_deaf=step is Fault.DEAF)
                continue
            so_far.append(step)
            self.log.append((asyncio.get_running_loop().time(), request.request_id))
            is_last = n == len(script)
            yield TokenDelta(
                step,
                finish_reason=self._finish_reason if is_last else None,
                usage=Usage(len(request.prompt.messages), len(so_far)) if is_last else None,
            )

    async def _hang(self, *, is_deaf: bool) -> None:
        while not self._healed.is_set():
            try:
                await self._healed.wait()
            except asyncio.CancelledError:
                if not is_deaf:
                    raise
