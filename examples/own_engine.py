"""An engine of your own in one class: it returns the message in capital letters, one word per step.

    python examples/own_engine.py "is anybody there"

First `check_engine` checks the contract in `chatstream.engines.base`, then the engine answers through a queue.
docs/write-an-engine.md explains the class step by step.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncGenerator

from chatstream import ChatStream, FinishReason, SamplingParams, Token, Usage
from chatstream.engines.base import Capacity, EngineHealth, as_messages
from chatstream.errors import EngineUnavailable, PromptTooLong, UnsupportedParameter
from chatstream.testing import check_engine
from chatstream.types import GenerationRequest, PreparedPrompt, PromptInput, TokenDelta

CONTEXT_LEN = 100


class Shout:
    """A minimal `Engine`."""

    model_name = "shout"
    capacity = Capacity(context_len=CONTEXT_LEN)
    default_sampling = SamplingParams()

    def __init__(self, *, step_s: float = 0.05) -> None:
        self._step_s = step_s
        self._is_ready = False

    async def start(self) -> None:
        self._is_ready = True

    async def stop(self) -> None:
        self._is_ready = False

    def health(self) -> EngineHealth:
        return EngineHealth(self._is_ready, "" if self._is_ready else "not started")

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        for name, neutral in (("stop", ()), ("logprobs", None)):
            if getattr(sampling, name) != neutral:
                raise UnsupportedParameter(f"{name} is not supported by this engine", param=name)
        last = as_messages(prompt)[-1]  # earlier messages have no effect
        if len(last.content.split()) * 2 > CONTEXT_LEN:
            raise PromptTooLong(f"at most {CONTEXT_LEN // 2} words fit the context")
        return PreparedPrompt(messages=(last,))

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        text = request.prompt.messages[-1].content.upper().split() or ["?"]
        words = text[: request.sampling.max_new_tokens]
        for n, word in enumerate(words, start=1):
            await asyncio.sleep(self._step_s)  # where a model computes
            if not self._is_ready:
                raise EngineUnavailable("the engine was stopped")
            if n < len(words):
                yield TokenDelta(word + " ")
            else:
                reason = FinishReason.STOP if len(words) == len(text) else FinishReason.LENGTH
                yield TokenDelta(word, finish_reason=reason, usage=Usage(len(text), n))


async def main(message: str) -> None:
    await check_engine(Shout(step_s=0.0), as_messages("two words"))
    print("the engine fulfils its contract")
    async with ChatStream(engine=Shout(), max_concurrency=1) as chat_stream:
        async for event in chat_stream.stream(message):
            if isinstance(event, Token):
                print(event.text, end="", flush=True)
    print()


if __name__ == "__main__":
    asyncio.run(main(" ".join(sys.argv[1:]) or "is anybody there"))
