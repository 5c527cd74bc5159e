"""An engine that plays a script, for tests of the code around an engine."""

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
    """A step of a script at which the generation hangs, until `FakeEngine.heal`."""

    HANG = "hang"
    """Hangs, and can be cancelled."""
    DEAF = "deaf"
    """Hangs, and ignores cancellation."""


Step: TypeAlias = str | Exception | Fault
Script: TypeAlias = Sequence[Step] | Callable[[GenerationRequest], Sequence[Step]]


class FakeEngine(ScriptedEngine):
    """Yields the strings of a script, one token each; raises an exception in the script at its position.

    Sampling parameters and token masks have no effect, unless the script is a function that applies them. Requested log
    probabilities are 0.

    The first token takes `prefill_s` + `step_s` seconds, each later one `step_s`; the time while preempted does not
    count. With `step_s=0` the engine still yields to the event loop before every token.

    For assertions: `log` has (time in seconds, request id) of every token, in order; `active` and `preempted` are the
    ids of the requests in that state; `peak_active` is the largest size of `active`; `prompts` and `generated` have the
    prompt and the tokens of each request, by id.
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
        """Let every generation that hangs continue, now and later."""
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
                    logprobs=_logprobs(step, request.sampling.logprobs),
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


def _logprobs(token: str, num_best: int | None) -> tuple[TokenLogprob, ...]:
    return () if num_best is None else (TokenLogprob(token, 0.0, ((token, 0.0),)[:num_best]),)
