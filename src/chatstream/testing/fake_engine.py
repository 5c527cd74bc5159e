"""An engine that plays a script, for tests of everything around an engine."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable, Sequence
from enum import Enum
from typing import TypeAlias

from chatstream.checks import check_seconds
from chatstream.engines.base import as_messages
from chatstream.engines.scripted import ScriptedEngine
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


class FakeEngine(ScriptedEngine):
    """Yields its script, one str a token, at a steady pace; an exception in the script is raised at its place.

    What the sampling parameters and the token mask ask for is up to a script that is a function. Log probabilities, if
    they are asked for, are 0: each token is certain.

    `log` holds (time, request id) of every token in the order of generation, `active` those that generate now,
    `peak_active` the most that ever did, and `preempted` those that are held. Without `step_s` it still gives the event
    loop its turn after every token. The clocks of prefill and step stand still while preempted.
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
        super().__init__(model_name)
        self._script = script
        self._step_s = step_s
        self._prefill_s = prefill_s
        self._finish_reason = finish_reason
        self.log: list[tuple[float, str]] = []
        self.generated: dict[str, list[str]] = {}
        self.prompts: dict[str, PreparedPrompt] = {}
        self.peak_active = 0
        self.num_prepared = 0
        self._healed = asyncio.Event()

    @property
    def active(self) -> set[str]:
        return self._generations.keys() - self.preempted

    @property
    def preempted(self) -> set[str]:
        return {request_id for request_id, clock in self._generations.items() if clock.is_preempted}

    def resume(self, request_id: str) -> None:
        super().resume(request_id)
        self._note_active()

    def heal(self) -> None:
        """Those who are deaf go on."""
        self._healed.set()

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        self.num_prepared += 1
        return PreparedPrompt(messages=as_messages(prompt))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        request_id = request.request_id
        self.prompts[request_id] = request.prompt
        self.generated[request_id] = so_far = []
        num_prompt_tokens = len(request.prompt.messages)
        with self._generating(request_id) as clock:
            self._note_active()
            await clock.wait_until(clock.time_s() + self._prefill_s)
            script = self._script(request) if callable(self._script) else self._script
            for n, step in enumerate(script, start=1):
                await clock.wait_until(clock.time_s() + self._step_s)
                if isinstance(step, Exception):
                    raise step
                if isinstance(step, Fault):
                    await self._hang(is_deaf=step is Fault.DEAF)
                    continue
                so_far.append(step)
                self.log.append((asyncio.get_running_loop().time(), request_id))
                is_last = n == len(script)
                yield TokenDelta(
                    step,
                    finish_reason=self._finish_reason if is_last else None,
                    usage=Usage(num_prompt_tokens, len(so_far)) if is_last else None,
                    num_prompt_tokens=num_prompt_tokens if len(so_far) == 1 else 0,
                    logprobs=_certain(step, request.sampling.logprobs),
                )

    def _note_active(self) -> None:
        self.peak_active = max(self.peak_active, len(self.active))

    async def _hang(self, *, is_deaf: bool) -> None:
        while not self._healed.is_set():
            try:
                await self._healed.wait()
            except asyncio.CancelledError:
                if not is_deaf:
                    raise


def _certain(token: str, num_best: int | None) -> tuple[TokenLogprob, ...]:
    return () if num_best is None else (TokenLogprob(token, 0.0, ((token, 0.0),)[:num_best]),)
