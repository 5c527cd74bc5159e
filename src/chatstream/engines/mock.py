"""Scripted text at a fixed pace, for load tests, web development and a first look at the queue.

All running generations advance at the same pace, so the tokens of two generations alternate as they do with a model.
A token is one space-separated word, or one character if the text is mostly wide characters (Japanese).
"""

from __future__ import annotations

import unicodedata
from collections.abc import AsyncGenerator, Iterator
from typing import Literal, TypeAlias, get_args

from chatstream.checks import check_choice, check_int, check_seconds
from chatstream.engines.base import as_messages
from chatstream.engines.scripted import ScriptedEngine
from chatstream.engines.text.detokenizer import StopStrings
from chatstream.errors import InvalidRequest, UnsupportedParameter
from chatstream.types import (
    FinishReason,
    GenerationRequest,
    Message,
    PreparedPrompt,
    PromptInput,
    SamplingParams,
    TokenDelta,
    Usage,
)

MockType: TypeAlias = Literal["round", "long", "echo"]

ROUND = tuple(
    f"({n}) {sentence}"
    for n, sentence in enumerate(
        (
            "Good day, and welcome to the front of the queue.",
            "While this answer runs, another request gets every other token.",
            "A slot is the right to generate, and this request has one.",
            "Every waiting client sees its position in the queue.",
            "First come, first served: no later request can pass this one.",
            "When this answer ends, the next request starts in the same moment.",
            "If you close this window now, the slot is free at once.",
            "A full queue rejects new requests, and states when to retry.",
            "Two requests can generate at the same time, token by token.",
            "The limit is exact, in bursts too.",
            "No model computes this; every sentence is part of a script.",
            "That was the last of twelve sentences; the next one is the first again.",
        ),
        start=1,
    )
)
"""One sentence per turn of the conversation; the thirteenth turn gets the first sentence again."""

LONG = """\
This answer comes from the mock engine, which has no model behind it. It exists so that you can watch the queue at \
work, and so that programs that use ChatStream can be tested at any speed.

Suppose that the limit is two. The first two requests get a slot at once and generate at the same time: in each step \
of the model, both answers grow by one token, so neither of them waits for the end of the other. A third request goes \
to the queue, at position one, and its client is sent that position together with the expected time until it starts. \
The moment a slot is free, the third request starts.

Now suppose that a client in the queue disconnects. Its request is withdrawn at once, all requests behind it move up \
by one, and their clients receive the new positions. No slot is given to a client that is not there any more, and no \
slot stays free while a request waits.

If the queue is full, a new request is rejected, and the response states the number of seconds until a retry. \
That is all that ChatStream does, and it does it exactly."""


class MockEngine(ScriptedEngine):
    """An `Engine` without a model.

    `type` selects the answer: `round` is one of twelve sentences, by the number of the turn; `long` is several
    paragraphs; `echo` repeats the last message. `initial_wait_s` passes in the slot before the first token, like a
    prefill; it stands still while the generation is preempted.

    Of the sampling parameters, `max_new_tokens` (without a default) and `stop` are honoured. Parameters that select
    among tokens have no effect, because the script has one token for each position. `logprobs` and a token mask are
    refused, because there is no vocabulary. A reader that lags behind gets the missed tokens at once, at most
    `max_undelivered` of them.
    """

    def __init__(
        self,
        type: MockType = "round",
        *,
        initial_wait_s: float = 0.0,
        time_per_token_s: float = 0.1,
        max_undelivered: int = 64,
    ) -> None:
        check_choice("mock_type", type, get_args(MockType))
        check_seconds("mock_initial_wait", initial_wait_s, at_least=0)
        check_seconds("mock_time_per_token", time_per_token_s, at_least=0)
        check_int("max_undelivered", max_undelivered, at_least=1)
        super().__init__(f"mock-{type}")
        self._type = type
        self._initial_wait_s = initial_wait_s
        self._time_per_token_s = time_per_token_s
        self._max_lag_s = max_undelivered * time_per_token_s

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        messages = as_messages(prompt)
        if not messages:
            raise InvalidRequest("the prompt is empty", param="messages")
        if sampling.logprobs is not None:
            raise UnsupportedParameter("logprobs are not supported by the mock engine", param="logprobs")
        return PreparedPrompt(messages=messages)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        if request.token_mask is not None:
            raise UnsupportedParameter("token_mask is not supported by the mock engine", param="token_mask")
        with self._generating(request.request_id) as clock:
            due_s = clock.time_s() + max(self._initial_wait_s, self._time_per_token_s)
            for delta in self._answer(request):
                await clock.wait_until(due_s)
                yield delta
                due_s = max(due_s + self._time_per_token_s, clock.time_s() - self._max_lag_s)

    def _answer(self, request: GenerationRequest) -> Iterator[TokenDelta]:
        messages, sampling = request.prompt.messages, request.sampling
        num_prompt_tokens = sum(len(split(message.content)) for message in messages)
        tokens = self._tokens(messages)
        stops = StopStrings(sampling.stop)
        for n, token in enumerate(tokens, start=1):
            text, prompt_share = stops.push(token), num_prompt_tokens if n == 1 else 0
            if stops.is_hit or n == len(tokens):
                reason = FinishReason.STOP
            elif n == sampling.max_new_tokens:
                reason = FinishReason.LENGTH
            else:
                yield TokenDelta(text, num_prompt_tokens=prompt_share)
                continue
            yield TokenDelta(text + stops.flush(), 1, reason, Usage(num_prompt_tokens, n), prompt_share)
            return

    def _tokens(self, messages: tuple[Message, ...]) -> list[str]:
        turn = sum(message.role == "user" for message in messages)
        last = messages[-1].content
        text = {"round": ROUND[(turn - 1) % len(ROUND)], "long": LONG, "echo": last}[self._type]
        return split(text)


def split(text: str) -> list[str]:
    """Split a text into the tokens of the mock; their concatenation is the text.

    Tokens are words with the space before them, or single characters if the text has at least 3 wide characters and
    more of them than spaces.
    """
    num_wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    if num_wide >= 3 and text.count(" ") < num_wide:
        return list(text)
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]
