"""From a chat request to a generation: conversation, prompt, sampling. Contains nothing of the queue."""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Iterator, Mapping, Sequence
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
"""Approximate UTF-8 bytes per token: four letters, or one and a third Japanese characters. Used for estimates only."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatRequest:
    """A checked request for one answer, before its admission."""

    messages: tuple[Message, ...] = ()
    """The conversation; only the new message if the conversation is kept on the server."""
    conversation: str | None = None
    """Key of a conversation kept on the server: its turns precede `messages`, and the answer is added to it."""
    regenerate: bool = False
    """Answer the last message of the conversation again, instead of its last answer."""
    sampling: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `SamplingParams`; missing ones take their defaults."""
    token_mask: TokenMask | None = None
    """Restricts the next token, for example by a grammar. Some engines refuse it."""
    client: str = ""
    owner: str = ""
    """Id of the API key that may cancel the request; empty: the request id is enough."""
    priority: int = 0
    max_wait_s: float | None = None
    sent_as: Mapping[str, str] = field(default_factory=dict)
    """The caller's names of `messages` and `max_new_tokens` where they differ, so that errors name the field sent."""

    @property
    def estimated_prompt_tokens(self) -> int:
        """Estimated tokens of `messages`. Turns kept on the server are not counted: they are loaded after admission."""
        num_bytes = sum(len(message.content.encode()) for message in self.messages)
        return num_bytes // BYTES_PER_TOKEN

    def __post_init__(self) -> None:
        """Raises `InvalidRequest` that names the wrong field."""
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


def as_conversation(prompt: str | Sequence[Message | Mapping[str, str]]) -> tuple[Message, ...]:
    """A text as one user message, or the messages of a conversation. Raises `InvalidRequest`."""
    if isinstance(prompt, str):
        return (Message("user", prompt),)
    messages = tuple(m if isinstance(m, Message) else _as_message(m) for m in prompt)
    if not messages:
        raise InvalidRequest("the conversation is empty", param="messages")
    return messages


def _as_message(given: Mapping[str, str]) -> Message:
    match given:
        case {"role": "system" | "user" | "assistant" as role, "content": str(content)} if len(given) == 2:
            return Message(role, content)
    raise InvalidRequest("a message needs a role (system, user or assistant) and a content, a string", param="messages")


class Answering:
    """Answers requests with one engine, the kept conversations and the default sampling parameters."""

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
        self._has_checked_context = False

    async def check_context(self) -> None:
        """Warn when little of the context remains for conversations. Raises `ConfigError` if nothing remains.

        Call it after the engine has started; before that it does nothing.
        """
        context_len = self._engine.capacity.context_len
        if self._has_checked_context or context_len is None or not self._engine.health().is_ready:
            return
        longest = self._sampling_defaults.get("max_new_tokens", 0)
        if longest >= context_len:
            logger.warning(
                "max_new_tokens is %d, but the context has %d tokens: answers end when it is full", longest, context_len
            )
        shortest = SamplingParams(max_new_tokens=1)
        fixed = "the chat template and system_prompt" if self._system else "the chat template"
        try:
            prompt = await self._engine.prepare((*self._system, Message("user", "Hello")), shortest)
        except PromptTooLong as error:
            param = "system_prompt" if self._system else "context_len"
            raise ConfigError(f"no room in the context after {fixed}: {error.message}", param=param) from error
        except Exception as error:  # a custom engine may raise for this conversation only
            logger.warning("a test conversation of one message could not be prepared: %s", error)
            prompt = PreparedPrompt()
        self._has_checked_context = True
        if len(prompt.token_ids) > context_len // 2:
            logger.warning("%d of the context's %d tokens are used by %s", len(prompt.token_ids), context_len, fixed)

    async def check(self, request: ChatRequest, *, waits_for_conversation: bool) -> None:
        """Refuse a request that can never be answered, while an HTTP status can still be sent.

        The prompt is checked only if the engine is ready. `waits_for_conversation`: an earlier request of the same
        conversation may still produce the answer to regenerate. Raises `InvalidRequest`.
        """
        if request.regenerate:
            if request.conversation is not None and not waits_for_conversation:
                await self._conversations.check_regenerable(request.conversation)
        elif self._engine.health().is_ready:
            try:
                await self._prepare(request, request.messages, self._sampling(request))
            except EngineUnavailable:
                pass  # the engine has just failed; the request stays in the queue and is prepared when it starts

    async def generate(
        self, request_id: str, request: ChatRequest, message_id: str
    ) -> AsyncGenerator[TokenDelta, None]:
        """Generate the answer. Call it when the request has a slot: until then its conversation may still change."""
        if request.conversation is None:
            async with aclosing(self._answer(request_id, request, request.messages)) as deltas:
                async for delta in deltas:
                    yield delta
            return
        user_text = None if request.regenerate else request.messages[-1].content
        async with (
            self._conversations.open_turn(request.conversation, user_text, message_id) as turn,
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
        """Make the prompt. Only a conversation kept on the server may lose its oldest turns to fit the context."""
        prepare = partial(
            self._engine.prepare, (*self._system, *messages), may_drop_history=request.conversation is not None
        )
        with _naming(request.sent_as):
            try:
                return await prepare(sampling)
            except PromptTooLong:
                if "max_new_tokens" in request.sampling:
                    raise
            # Only the default answer length does not fit: limit the answer by the rest of the context.
            return await prepare(replace(sampling, max_new_tokens=None))

    def _sampling(self, request: ChatRequest) -> SamplingParams:
        given = {**self._sampling_defaults, **checked_sampling(request.sampling)}
        return replace(self._engine.default_sampling, **given)


@contextmanager
def _naming(sent_as: Mapping[str, str]) -> Iterator[None]:
    """Translate `param` of an `InvalidRequest` to the caller's name of the field."""
    try:
        yield
    except InvalidRequest as error:
        error.param = sent_as.get(error.param or "", error.param)
        raise
