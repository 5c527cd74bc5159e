"""An engine that plays a script, for tests of everything around an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

from chatstream.checks import check_seconds
from chatstream.engines.base import Capacity, EngineHealth, EngineStats, as_messages
from chatstream.errors import EngineUnavailable
from chatstream.types import (
    FinishReason,
    GenerationRequest,
    PreparedPrompt,
    PromptInput,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
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

    What the sampling parameters and the token mask ask for is up to a script that is a function. Log probabilities, if
    they are asked for, are 0: each token is certain.

    `log` holds (time, request id) of every token in the order of generation, `active` those that generate now,
    `peak_active` the most that ever did, and `parked` those that are held. Without `step_s` it still gives the event
    loop its turn after every token. The clocks of prefill and step stand still while parked.
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
        check_seconds("step_s", step_s, at_least=0)
        check_seconds("prefill_s", prefill_s, at_least=0)
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
        self._generations: dict[str, _Generation] = {}
        self._healed = asyncio.Event()

    @property
    def model_name(self) -> str:
        return self._model_name

    @property
    def capacity(self) -> Capacity:
        return Capacity(can_park=True)

    @property
    def default_sampling(self) -> SamplingParams:
        return SamplingParams()

    async def start(self) -> None:
        self._is_started = True

    async def stop(self) -> None:
        self._is_started = False
        for generation in self._generations.values():
            generation.is_stopped = True
            generation.may_step.set()

    def health(self) -> EngineHealth:
        return EngineHealth(self._is_started, "" if self._is_started else "not started")

    def stats(self) -> EngineStats:
        return EngineStats(num_slots=len(self._generations))

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        self.num_prepared += 1
        return PreparedPrompt(messages=as_messages(prompt))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        request_id = request.request_id
        self.prompts[request_id] = request.prompt
        self.generated[request_id] = []
        self._generations[request_id] = generation = _Generation()
        self._activate(request_id)
        try:
            await generation.compute(self._prefill_s)
            async for delta in self._play(request, generation):
                yield delta
        finally:
            self._generations.pop(request_id, None)
            self.active.discard(request_id)

    @property
    def parked(self) -> set[str]:
        return {request_id for request_id, generation in self._generations.items() if generation.is_parked}

    async def park(self, request_id: str) -> None:
        if request_id in self._generations:
            self._generations[request_id].park()
            self.active.discard(request_id)

    def resume(self, request_id: str) -> None:
        if request_id in self.parked:
            self._generations[request_id].resume()
            self._activate(request_id)

    def _activate(self, request_id: str) -> None:
        self.active.add(request_id)
        self.peak_active = max(self.peak_active, len(self.active))

    def heal(self) -> None:
        """Those who are deaf go on."""
        self._healed.set()

    async def _play(self, request: GenerationRequest, generation: _Generation) -> AsyncGenerator[TokenDelta, None]:
        script = self._script(request) if callable(self._script) else self._script
        so_far = self.generated[request.request_id]
        for n, step in enumerate(script, start=1):
            await generation.compute(self._step_s)
            if isinstance(step, Exception):
                raise step
            if isinstance(step, Fault):
                await self._hang(is_deaf=step is Fault.DEAF)
                continue
            so_far.append(step)
            self.log.append((asyncio.get_running_loop().time(), request.request_id))
            is_last = n == len(script)
            prompt_tokens = len(request.prompt.messages)
            yield TokenDelta(
                step,
                finish_reason=self._finish_reason if is_last else None,
                usage=Usage(prompt_tokens, len(so_far)) if is_last else None,
                num_prompt_tokens=prompt_tokens if len(so_far) == 1 else 0,
                logprobs=_certain(step, request.sampling.logprobs),
            )

    async def _hang(self, *, is_deaf: bool) -> None:
        while not self._healed.is_set():
            try:
                await self._healed.wait()
            except asyncio.CancelledError:
                if not is_deaf:
                    raise


def _certain(token: str, num_best: int | None) -> tuple[TokenLogprob, ...]:
    return () if num_best is None else (TokenLogprob(token, 0.0, ((token, 0.0),)[:num_best]),)


@dataclass(slots=True, eq=False)
class _Generation:
    """The clock of one stream, which stands still while it is parked."""

    may_step: asyncio.Event = field(default_factory=asyncio.Event)
    is_stopped: bool = False
    is_parked: bool = False
    _parked_at_s: float = 0.0
    _parked_s: float = 0.0
    """All the time it was parked, up to the last `resume`."""

    def __post_init__(self) -> None:
        self.may_step.set()

    def park(self) -> None:
        if not self.is_parked and not self.is_stopped:
            self._parked_at_s = asyncio.get_running_loop().time()
            self.is_parked = True
            self.may_step.clear()

    def resume(self) -> None:
        self._parked_s += asyncio.get_running_loop().time() - self._parked_at_s
        self.is_parked = False
        self.may_step.set()

    async def compute(self, seconds: float) -> None:
        """Returns when so much of its time has passed. Raises `EngineUnavailable` when it was stopped."""
        due_s, left_s = self._time_s() + seconds, seconds
        while True:
            await asyncio.sleep(left_s)
            await self.may_step.wait()
            if self.is_stopped:
                raise EngineUnavailable("the engine was stopped")
            left_s = due_s - self._time_s()
            if left_s < 1e-9:  # rounding
                return

    def _time_s(self) -> float:
        now_s = self._parked_at_s if self.is_parked else asyncio.get_running_loop().time()
        return now_s - self._parked_s
