"""Scripted text at a chosen pace: for load tests, for work on pages, and for a first look at the line.

Every running generation gets its tokens at the same pace, so two of them alternate exactly as they do on a model.
A token is one space-separated word, or one character of text that is mostly wide (Japanese).
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
            "Good day, and welcome to the front of the line.",
            "While I answer you, somebody else gets every other token.",
            "A slot is a place at the model, and you are sitting in one.",
            "Those who wait know how many are ahead of them.",
            "First come, first served: nobody can pass you here.",
            "When I finish, the next one starts in the same moment.",
            "If you close this window now, your slot is free at once.",
            "A full line says so, and says when to come back.",
            "Two can talk at the same time without waiting for each other's end.",
            "The limit is exact, in bursts too.",
            "Nothing here is clever, but everything is in order.",
            "That was the last of my twelve sentences; the next one is the first again.",
        ),
        start=1,
    )
)
"""One sentence a turn, over and over."""

LONG = """\
This answer comes from the mock engine, which has no model behind it. It exists so that you can watch the line at \
work, and so that programs that talk to ChatStream can be tested at any speed.

Imagine a small post office with two counters. Whoever comes in takes a number. Two people are served at the same \
time, and because the clerks share one stamp, they use it in turns: a stamp for you, a stamp for me. A third person \
waits, sees the number one on the board, and knows: I am next. The moment a counter is free, the third person steps up.

Now imagine that somebody in the line remembers a pot on the stove and leaves. The line closes up at once, and the \
board shows everybody the new numbers. Nobody calls the name of a person who is not there any more, and no counter \
stays empty while somebody waits.

If the room is full, a friendly sign at the door says so, and says when it makes sense to come back. That is all that \
ChatStream does, and it does it exactly."""


class MockEngine(ScriptedEngine):
    """An `Engine` without a model.

    `type`: `round` gives one of twelve sentences by turn, `long` several paragraphs, `echo` what the user said.
    `initial_wait_s` passes inside the slot before the first token, like a prefill, and not while preempted. It honours
    `max_new_tokens` (and has no default for it) and `stop`. Each of its tokens is the only one that could come, so the
    parameters that choose among several change nothing. `logprobs` and a token mask are refused: it has no vocabulary.
    A reader that lags gets the tokens it has missed at once, at most `max_undelivered` of them.
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
            text, newly_read = stops.push(token), num_prompt_tokens if n == 1 else 0
            if stops.is_hit or n == len(tokens):
                reason = FinishReason.STOP
            elif n == sampling.max_new_tokens:
                reason = FinishReason.LENGTH
            else:
                yield TokenDelta(text, num_prompt_tokens=newly_read)
                continue
            yield TokenDelta(text + stops.flush(), 1, reason, Usage(num_prompt_tokens, n), newly_read)
            return

    def _tokens(self, messages: tuple[Message, ...]) -> list[str]:
        turn = sum(message.role == "user" for message in messages)
        said = messages[-1].content
        text = {"round": ROUND[(turn - 1) % len(ROUND)], "long": LONG, "echo": said}[self._type]
        return split(text)


def split(text: str) -> list[str]:
    """The mock's tokens: words with the space before them, or characters when at least 3 are wide and outnumber spaces.

    The concatenation is the text.
    """
    num_wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    if num_wide >= 3 and text.count(" ") < num_wide:
        return list(text)
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]
