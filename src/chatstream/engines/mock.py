"""Scripted text at a chosen pace: for load tests, for work on pages, and for a first look at the line.

One beat gives every running generation one token, so that two of them alternate exactly as they do on a model.
A token is one space-separated word, or one character of text that is mostly wide (Japanese).
"""

from __future__ import annotations

import asyncio
import unicodedata
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from math import inf
from typing import Literal, TypeAlias, get_args

from chatstream.checks import check_choice, check_int, check_seconds
from chatstream.engines.base import Capacity, EngineHealth, EngineStats, as_messages
from chatstream.engines.text.detokenizer import StopStrings
from chatstream.errors import EngineUnavailable, InvalidRequest, UnsupportedParameter
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


class MockEngine:
    """An `Engine` without a model.

    `type`: `round` gives one of twelve sentences by turn, `long` several paragraphs, `echo` what the user said.
    `initial_wait_s` passes inside the slot before the first token, like a prefill, and not while parked. It honours
    `max_new_tokens` (and has no default for it) and `stop`. Each of its tokens is the only one that could come, so the
    parameters that choose among several change nothing. `logprobs` and a token mask are refused: it has no vocabulary.
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
        self._type = type
        self._initial_wait_s = initial_wait_s
        self._time_per_token_s = time_per_token_s
        self._max_undelivered = max_undelivered
        self._is_started = False
        self._sequences: list[_Sequence] = []
        self._beat: asyncio.Task[None] | None = None
        self._beat_s = 0.0
        """When the last beat was."""

    @property
    def model_name(self) -> str:
        return f"mock-{self._type}"

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
        for sequence in self._sequences:
            sequence.queue.put_nowait(None)

    def health(self) -> EngineHealth:
        return EngineHealth(self._is_started, "" if self._is_started else "not started")

    def stats(self) -> EngineStats:
        return EngineStats(num_slots=len(self._sequences))

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
        loop = asyncio.get_running_loop()
        tokens, ready_s = self._tokens(request.prompt.messages), loop.time() + self._initial_wait_s
        sequence = _Sequence(request, tokens, ready_s, self._max_undelivered)
        self._sequences.append(sequence)
        if self._beat is None or self._beat.done():
            self._start_beat()
        try:
            is_over = False
            while not is_over:
                delta = await sequence.queue.get()
                if delta is None:
                    raise EngineUnavailable("the engine was stopped")
                if sequence.queue.qsize() + 1 == self._max_undelivered:
                    self._start_beat()  # it was passed over until now
                is_over = delta.finish_reason is not None
                yield delta
        finally:
            if sequence in self._sequences:
                self._sequences.remove(sequence)

    async def park(self, request_id: str) -> None:
        for sequence in self._sequences:
            if sequence.request.request_id == request_id:
                sequence.park(asyncio.get_running_loop().time())

    def resume(self, request_id: str) -> None:
        for sequence in self._sequences:
            if sequence.request.request_id == request_id and sequence.is_parked:
                sequence.resume(asyncio.get_running_loop().time())
                self._start_beat()

    def _start_beat(self) -> None:
        """There is one to go on with. It may be ready before those for whom the present beat sleeps."""
        loop = asyncio.get_running_loop()
        if self._beat is None or self._beat.done():
            self._beat_s = loop.time()
        else:
            self._beat.cancel()
        self._beat = loop.create_task(self._keep_beat(), name="chatstream-mock")

    async def _keep_beat(self) -> None:
        """One token for everybody a beat, as long as somebody can go on; beats keep their distance."""
        loop = asyncio.get_running_loop()
        while (first_ready_s := min((s.next_s for s in self._sequences), default=inf)) < inf:
            next_s = max(self._beat_s + self._time_per_token_s, loop.time(), first_ready_s)
            await asyncio.sleep(next_s - loop.time())
            self._beat_s = next_s
            now_s = loop.time()
            for sequence in [s for s in self._sequences if s.next_s <= now_s]:
                if sequence.advance():
                    self._sequences.remove(sequence)

    def _tokens(self, messages: tuple[Message, ...]) -> list[str]:
        turn = sum(message.role == "user" for message in messages)
        said = messages[-1].content
        text = {"round": ROUND[(turn - 1) % len(ROUND)], "long": LONG, "echo": said}[self._type]
        return split(text)


@dataclass(slots=True, eq=False)
class _Sequence:
    request: GenerationRequest
    tokens: list[str]
    ready_s: float
    """When its initial wait is over; infinity while it is parked."""
    max_undelivered: int
    queue: asyncio.Queue[TokenDelta | None] = field(default_factory=asyncio.Queue)
    _next: int = 0
    _wait_left_s: float = 0.0
    """While it is parked: what was left of the initial wait."""
    _prompt_tokens: int = field(init=False)
    _stops: StopStrings = field(init=False)

    def __post_init__(self) -> None:
        self._prompt_tokens = sum(len(split(message.content)) for message in self.request.prompt.messages)
        self._stops = StopStrings(self.request.sampling.stop)

    @property
    def is_parked(self) -> bool:
        return self.ready_s == inf

    @property
    def next_s(self) -> float:
        """No token before this time; infinity: not before it is resumed, or its reader has taken one of too many."""
        return self.ready_s if self.queue.qsize() < self.max_undelivered else inf

    def park(self, now_s: float) -> None:
        if not self.is_parked:
            self._wait_left_s, self.ready_s = max(0.0, self.ready_s - now_s), inf

    def resume(self, now_s: float) -> None:
        self.ready_s = now_s + self._wait_left_s

    def advance(self) -> bool:
        """Generate one token; True when it was the last."""
        limit = self.request.sampling.max_new_tokens
        token = self.tokens[self._next] if self.tokens else ""
        self._next += 1
        text = self._stops.push(token)
        reason = None
        if self._stops.is_hit or self._next >= len(self.tokens):
            reason = FinishReason.STOP
        elif limit is not None and self._next >= limit:
            reason = FinishReason.LENGTH
        newly_read = self._prompt_tokens if self._next == 1 else 0
        if reason is None:
            self.queue.put_nowait(TokenDelta(text, num_prompt_tokens=newly_read))
            return False
        usage = Usage(self._prompt_tokens, self._next)
        self.queue.put_nowait(TokenDelta(text + self._stops.flush(), 1, reason, usage, newly_read))
        return True


def split(text: str) -> list[str]:
    """The mock's tokens: words with the space before them, or characters when at least 3 are wide and outnumber spaces.

    The concatenation is the text.
    """
    num_wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    if num_wide >= 3 and text.count(" ") < num_wide:
        return list(text)
    first, *rest = text.split(" ")
    return [first, *(f" {word}" for word in rest)]
