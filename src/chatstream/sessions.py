"""Conversations, kept on the server, bounded in number and in size.

A conversation is a value; whoever changes it makes a new one and saves it. The store is behind a small protocol, so
that a database can take its place. Knows nothing of cookies, requests or models.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol

from cachetools import TTLCache

from chatstream.checks import check_int, check_seconds
from chatstream.errors import InvalidRequest
from chatstream.types import Message


@dataclass(frozen=True, slots=True)
class Turn:
    """What a user said and what was answered."""

    user: str
    answer: str
    message_id: str
    """Of the answer."""


@dataclass(frozen=True, slots=True)
class Conversation:
    """Turns, oldest first."""

    turns: tuple[Turn, ...] = ()

    @property
    def num_chars(self) -> int:
        return sum(len(turn.user) + len(turn.answer) for turn in self.turns)

    def messages(self) -> tuple[Message, ...]:
        pairs = ((Message("user", turn.user), Message("assistant", turn.answer)) for turn in self.turns)
        return tuple(message for pair in pairs for message in pair)

    def for_regeneration(self) -> tuple[Conversation, str]:
        """The conversation before its last turn, and what the user said in it. Raises `InvalidRequest` if empty."""
        if not self.turns:
            raise InvalidRequest("there is no answer to regenerate yet", param="regenerate")
        return replace(self, turns=self.turns[:-1]), self.turns[-1].user

    def with_turn(self, turn: Turn, limits: SessionSettings) -> Conversation:
        """The oldest turns are forgotten when the limits are reached; the newest one always stays."""
        turns = (*self.turns, turn)[-limits.max_turns :]
        num_chars = 0
        for kept, old in enumerate(reversed(turns)):
            num_chars += len(old.user) + len(old.answer)
            if kept and num_chars > limits.max_chars:
                turns = turns[len(turns) - kept :]
                break
        return Conversation(turns)


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """Checked when built; a wrong value raises `ConfigError` that names it."""

    max_conversations: int = 10_000
    """The one unused for longest is forgotten when there is another."""
    idle_s: float = 24 * 3600.0
    """A conversation unused for so long is forgotten."""
    max_turns: int = 200
    max_chars: int = 200_000
    """Of one conversation; some 50,000 tokens, more than most contexts hold. The newest turn is kept even so."""
    max_total_chars: int = 100_000_000
    """Of all conversations in memory together; those unused for longest are forgotten first."""

    def __post_init__(self) -> None:
        for name in ("max_conversations", "max_turns", "max_chars", "max_total_chars"):
            check_int(name, getattr(self, name), at_least=1)
        check_seconds("idle_s", self.idle_s)


class ConversationStore(Protocol):
    """Where conversations live. Requests of one conversation never overlap, so no locking is asked for."""

    async def load(self, key: str) -> Conversation:
        """An empty one when the key is unknown or forgotten."""

    async def save(self, key: str, conversation: Conversation) -> None: ...

    async def delete(self, key: str) -> bool:
        """False when there was none."""


class MemoryStore:
    """In this process; gone when it ends."""

    def __init__(self, settings: SessionSettings | None = None, *, timer: Callable[[], float] = time.monotonic) -> None:
        """`timer` in seconds."""
        settings = settings or SessionSettings()
        # A TTLCache forgets what was *written* longest ago; `load` writes again, so that using counts.
        # One bound for number and size: each counts as at least its share of the total.
        least = max(1, settings.max_total_chars // settings.max_conversations)
        self._conversations: TTLCache[str, Conversation] = TTLCache(
            max(settings.max_total_chars, settings.max_conversations),
            settings.idle_s,
            timer,
            getsizeof=lambda conversation: max(least, conversation.num_chars),
        )

    def __len__(self) -> int:
        return len(self._conversations)

    async def load(self, key: str) -> Conversation:
        conversation = self._conversations.get(key)
        if conversation is None:
            return Conversation()
        self._conversations[key] = conversation
        return conversation

    async def save(self, key: str, conversation: Conversation) -> None:
        if conversation.num_chars <= self._conversations.maxsize:
            self._conversations[key] = conversation
        else:
            self._conversations.pop(key, None)

    async def delete(self, key: str) -> bool:
        return self._conversations.pop(key, None) is not None


class Conversations:
    """The conversations of one server: opens a turn, and keeps it when it was answered."""

    def __init__(self, store: ConversationStore, limits: SessionSettings) -> None:
        self._store = store
        self._limits = limits
        # Turns being answered, one a conversation at most; who is missing was told to forget.
        self._open: dict[str, OpenTurn] = {}

    @property
    def num_open_turns(self) -> int:
        """Conversations with an answer in the making."""
        return len(self._open)

    def open_turn(self, key: str, said: str | None, message_id: str) -> OpenTurn:
        """An async context manager around one answer. `said` None: answer the last message again."""
        return OpenTurn(self, key, said, message_id)

    async def check_regenerable(self, key: str) -> None:
        """Raises `InvalidRequest` when there is no answer yet."""
        (await self._store.load(key)).for_regeneration()

    async def forget(self, key: str) -> bool:
        """Delete it, also for an answer that is on its way. False when there was none."""
        self._open.pop(key, None)
        return await self._store.delete(key)

    async def begin(self, turn: OpenTurn) -> Conversation:
        self._open[turn.key] = turn
        return await self._store.load(turn.key)

    async def end(self, turn: OpenTurn, conversation: Conversation | None) -> None:
        """`conversation` None: nothing is to be kept."""
        if self._open.get(turn.key) is not turn:
            return
        del self._open[turn.key]
        if conversation is not None:
            await self._store.save(turn.key, conversation)

    def with_turn(self, before: Conversation, turn: Turn) -> Conversation:
        return before.with_turn(turn, self._limits)


class OpenTurn:
    """One answer in the making.

    Kept when the block ends, also when its reader left in the middle: that much of the answer was seen, and the
    conversation goes on from there. Not kept when it failed (the user says it again) or is empty.
    """

    def __init__(self, conversations: Conversations, key: str, said: str | None, message_id: str) -> None:
        self.key = key
        self.answer = ""
        """Grows while it is generated; by whoever opened the turn."""
        self.messages: tuple[Message, ...] = ()
        """The conversation up to what was said now."""
        self._conversations = conversations
        self._said = said
        self._message_id = message_id
        self._before = Conversation()

    async def __aenter__(self) -> OpenTurn:
        try:
            before = await self._conversations.begin(self)
            if self._said is None:
                before, self._said = before.for_regeneration()
        except BaseException:  # nothing to regenerate; or the store failed, or the client left while it was asked
            await self._conversations.end(self, None)
            raise
        self._before = before
        self.messages = (*before.messages(), Message("user", self._said))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        has_failed = kind is not None and issubclass(kind, Exception)
        conversation = None
        if self.answer and self._said is not None and not has_failed:
            turn = Turn(self._said, self.answer, self._message_id)
            conversation = self._conversations.with_turn(self._before, turn)
        await self._conversations.end(self, conversation)
