"""From what somebody asks to what an engine generates: conversation, prompt, sampling. Knows nothing of the queue."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator, Mapping
from contextlib import aclosing, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from chatstream.checks import check_int, check_seconds
from chatstream.config import checked_sampling
from chatstream.engines.base import Engine
from chatstream.errors import ConfigError, EngineUnavailable, InvalidRequest, PromptTooLong
from chatstream.scheduler.settings import MAX_PRIORITY, MIN_PRIORITY
from chatstream.sessions import Conversations
from chatstream.types import GenerationRequest, Message, PreparedPrompt, SamplingParams, TokenDelta, TokenMask

logger = logging.getLogger(__name__)

BYTES_PER_TOKEN = 4
"""Of UTF-8, about: four letters, or one and a third of Japanese. For the estimate that the line is planned with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """What somebody asks for, checked, before it has a place in line."""

    messages: tuple[Message, ...] = ()
    """The conversation; within a server-side one, only what is said now."""
    conversation: str | None = None
    """Key of a conversation kept on the server: its turns come first, and the answer is kept there."""
    regenerate: bool = False
    """Answer the last message of the conversation again, instead of its last answer."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """The fields of `SamplingParams` that were given."""
    token_mask: TokenMask | None = None
    """What may come next in the answer: the place for a grammar. Not every engine takes one."""
    client: str = ""
    owner: str = ""
    """Which API key may cancel it; empty: whoever knows its id."""
    priority: int = 0
    max_wait_s: float | None = None
    sent_as: Mapping[str, str] = field(default_factory=dict)
    """What the caller calls `messages` and `max_new_tokens`, where not so: errors name the field that was sent."""

    @property
    def estimated_prompt_tokens(self) -> int:
        """Of what was sent; what a conversation kept here adds is not looked up before there is a place."""
        num_bytes = sum(len(message.content.encode()) for message in self.messages)
        return num_bytes // BYTES_PER_TOKEN

    def __post_init__(self) -> None:
        """Raises `InvalidRequest` naming what is wrong."""
        checked_sampling(self.sampling)
        check_int("priority", self.priority, at_least=MIN_PRIORITY, at_most=MAX_PRIORITY, error=InvalidRequest)
        check_seconds("max_wait_seconds", self.max_wait_s, or_none=True, error=InvalidRequest)
        try:
            for message in self.messages:
                message.content.encode()
        except UnicodeEncodeError:
            raise InvalidRequest(
                "the text has half a surrogate pair: it is not valid Unicode", param="messages"
            ) from None


class Answering:
    """One engine, the conversations kept here, and what a request gets where it does not say."""

    def __init__(
        self,
        engine: Engine,
        conversations: Conversations,
        *,
        system_prompt: str | None,
        sampling_defaults: Mapping[str, Any],
    ) -> None:
        self._engine = engine
        self._conversations = conversations
        self._system = (Message("system", system_prompt),) if system_prompt else ()
        self._sampling_defaults = sampling_defaults
        self._has_checked_room = False

    async def check_room(self) -> None:
        """Tell the operator what leaves little room in the context. Raises `ConfigError` if there is none for anybody.

        Not before the engine has started.
        """
        context_len = self._engine.capacity.context_len
        if self._has_checked_room or context_len is None or not self._engine.health().is_ready:
            return
        longest = self._sampling_defaults.get("max_new_tokens", 0)
        if longest >= context_len:
            logger.warning(
                "max_new_tokens is %d, and the context %d tokens: answers end where that is full", longest, context_len
            )
        shortest = SamplingParams(max_new_tokens=1)
        beside = "the chat template and system_prompt" if self._system else "the chat template"
        try:
            prompt = await self._engine.prepare((*self._system, Message("user", "Hello")), shortest)
        except PromptTooLong as error:
            param = "system_prompt" if self._system else "context_len"
            raise ConfigError(f"no room is left beside {beside}: {error.message}", param=param) from error
        except Exception as error:  # what an engine of the user's own raises may be the affair of this one conversation
            logger.warning("a conversation of one message could not be prepared when it was tried: %s", error)
            prompt = PreparedPrompt()
        self._has_checked_room = True
        if len(prompt.token_ids) > context_len // 2:
            logger.warning("of the %d tokens of the context %d are %s", context_len, len(prompt.token_ids), beside)

    async def check(self, request: ChatRequest, *, waits_for_its_own: bool) -> None:
        """Refuse what can never be answered while a status line can still say so. Not before the engine is ready.

        `waits_for_its_own`: an earlier request of the same conversation may still bring the answer to regenerate.
        """
        if request.regenerate:
            if request.conversation is not None and not waits_for_its_own:
                await self._conversations.check_regenerable(request.conversation)
        elif self._engine.health().is_ready:
            try:
                await self._prepare(request, request.messages, self._sampling(request))
            except EngineUnavailable:
                pass  # it died of something else just now; the request keeps its place, and is prepared in its slot

    async def generate(
        self, request_id: str, request: ChatRequest, message_id: str
    ) -> AsyncGenerator[TokenDelta, None]:
        """Call it when the request has its slot: only now is a conversation complete and the engine loaded."""
        if request.conversation is None:
            async with aclosing(self._answer(request_id, request, request.messages)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        said = None if request.regenerate else request.messages[-1].content
        async with (
            self._conversations.open_turn(request.conversation, said, message_id) as turn,
            aclosing(self._answer(request_id, request, turn.messages)) as deltas,
        ):
            async for delta in deltas:
                turn.answer += delta.text
                yield delta

    async def _answer(
        self, request_id: str, request: ChatRequest, messages: tuple[Message, ...]
    ) -> AsyncGenerator[TokenDelta, None]:
        sampling = self._sampling(request)
        prompt = await self._prepare(request, messages, sampling)
        generation = GenerationRequest(request_id, prompt, sampling, request.token_mask)
        async with aclosing(self._engine.stream(generation)) as deltas:
            async for delta in deltas:
                yield delta

    async def _prepare(
        self, request: ChatRequest, messages: tuple[Message, ...], sampling: SamplingParams
    ) -> PreparedPrompt:
        """A conversation kept here loses its oldest turns when it outgrows the context; one that was sent does not."""
        prepare = partial(
            self._engine.prepare, (*self._system, *messages), may_drop_history=request.conversation is not None
        )
        with _naming(request.sent_as):
            try:
                return await prepare(sampling)
            except PromptTooLong:
                if "max_new_tokens" in request.sampling:
                    raise
            # Only the default length does not fit: the answer gets the room that is left.
            return await prepare(replace(sampling, max_new_tokens=None))

    def _sampling(self, request: ChatRequest) -> SamplingParams:
        given = {**self._sampling_defaults, **checked_sampling(request.sampling)}
        return replace(self._engine.default_sampling, **given)


@contextmanager
def _naming(sent_as: Mapping[str, str]) -> Iterator[None]:
    try:
        yield
    except InvalidRequest as error:
        error.param = sent_as.get(error.param or "", error.param)
        raise
