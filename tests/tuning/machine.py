"""An engine in virtual time with a step time given by a formula."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field

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


@dataclass(eq=False)
class Machine:
    """An engine with one token per stream and step. Each new stream extends the next step by `prefill_s`."""

    step_s: Callable[[int], float]
    """Step time in seconds by number of streams."""
    prefill_s: float = 0.0
    context_len: int | None = 1000
    max_concurrency: int | None = None
    speed_key: str | None = "a machine"
    ends_after: int | None = None
    """Length after which every answer ends, as with an end-of-sequence token."""
    fails_with: Callable[[int], Exception | None] = lambda num_streams: None
    """Error of a step by number of streams; None: no error."""
    prompts: list[PreparedPrompt] = field(default_factory=list)
    most_active: int = 0
    model_name: str = "machine"
    default_sampling: SamplingParams = field(default_factory=lambda: SamplingParams(temperature=0.5))
    _active: dict[str, asyncio.Queue[Exception | None]] = field(default_factory=dict)
    _joining: int = 0
    _clock: asyncio.Task[None] | None = None

    @property
    def capacity(self) -> Capacity:
        return Capacity(self.max_concurrency, self.context_len, speed_key=self.speed_key)

    @property
    def num_active(self) -> int:
        return len(self._active)

    async def start(self) -> None: ...

    async def stop(self) -> None: ...

    def health(self) -> EngineHealth:
        return EngineHealth(is_ready=True)

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        messages = as_messages(prompt)
        return PreparedPrompt(token_ids=tuple(range(len(messages[-1].content.split()))))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        self.prompts.append(request.prompt)
        tokens: asyncio.Queue[Exception | None] = asyncio.Queue()
        self._active[request.request_id] = tokens
        self._joining += 1
        self.most_active = max(self.most_active, len(self._active))
        if self._clock is None:
            self._clock = asyncio.create_task(self._run())
        limit = min(request.sampling.max_new_tokens or 10**9, self.ends_after or 10**9)
        try:
            for n in range(1, limit + 1):
                if error := await tokens.get():
                    raise error
                if n == limit:
                    self._active.pop(request.request_id)
                usage = Usage(len(request.prompt.token_ids), n) if n == limit else None
                yield TokenDelta("x", 1, FinishReason.LENGTH if n == limit else None, usage)
        finally:
            self._active.pop(request.request_id, None)

    async def _run(self) -> None:
        while self._active:
            rows, joining = list(self._active.values()), self._joining
            self._joining = 0
            await asyncio.sleep(self.step_s(len(rows)) + joining * self.prefill_s)
            error = self.fails_with(len(rows))
            for tokens in rows:
                tokens.put_nowait(error)
            await asyncio.sleep(0)
            await asyncio.sleep(0)
            await asyncio.sleep(0)  # ended streams have started their next request
        self._clock = None
