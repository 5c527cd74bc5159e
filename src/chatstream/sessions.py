"""Conversations kept on the server, bounded in number and size.

A conversation is an immutable value; a change makes a new one, which is saved. The store is a small protocol that a
database can implement. Contains nothing of cookies, requests or models.
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
    """One message of a user and its answer."""

    user: str
    answer: str
    message_id: str
    """Id of the answer."""


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
        """The conversation without its last turn, and that turn's user message. Raises `InvalidRequest` if empty."""
        if not self.turns:
            raise InvalidRequest("there is no answer to regenerate yet", param="regenerate")
        return replace(self, turns=self.turns[:-1]), self.turns[-1].user

    def with_turn(self, turn: Turn, limits: SessionSettings) -> Conversation:
        """Append a turn. The oldest turns are dropped to keep the limits; the newest one is always kept."""
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
    """Checked at construction; a wrong value raises `ConfigError` that names the setting."""

    max_conversations: int = 10_000
    """Beyond this number the least recently used conversation is dropped."""
    idle_s: float = 24 * 3600.0
    """A conversation unused for this long is dropped."""
    max_turns: int = 200
    max_chars: int = 200_000
    """Characters of one conversation: some 50,000 tokens, more than most contexts. The newest turn is always kept."""
    max_total_chars: int = 100_000_000
    """Characters of all conversations in memory; the least recently used ones are dropped first."""

    def __post_init__(self) -> None:
        for name in ("max_conversations", "max_turns", "max_chars", "max_total_chars"):
            check_int(name, getattr(self, name), at_least=1)
        check_seconds("idle_s", self.idle_s)


class ConversationStore(Protocol):
    """Storage of conversations. Requests of one conversation never overlap, so no locking is needed."""

    async def load(self, key: str) -> Conversation:
        """The conversation; an empty one when the key is unknown."""

    async def save(self, key: str, conversation: Conversation) -> None: ...

    async def delete(self, key: str) -> bool:
        """Delete the conversation. False when there was none."""


class MemoryStore:
    """Conversations in the memory of this process."""

    def __init__(self, settings: SessionSettings | None = None, *, timer: Callable[[], float] = time.monotonic) -> None:
        """`timer` returns seconds."""
        settings = settings or SessionSettings()
        # A TTLCache drops the entry *written* longest ago; `load` writes again, so that reads count as use.
        # One bound for number and size: each conversation counts at least its share of the total.
        min_size = max(1, settings.max_total_chars // settings.max_conversations)
        self._conversations: TTLCache[str, Conversation] = TTLCache(
            max(settings.max_total_chars, settings.max_conversations),
            settings.idle_s,
            timer,
            getsizeof=lambda conversation: max(min_size, conversation.num_chars),
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
    """The conversations of one server: opens turns, and saves answered ones."""

    def __init__(self, store: ConversationStore, limits: SessionSettings) -> None:
        self._store = store
        self._limits = limits
        # Turns being answered, at most one per conversation. The answer of a turn that `forget` removed is not saved.
        self._open: dict[str, OpenTurn] = {}

    @property
    def num_open_turns(self) -> int:
        """Number of turns in progress."""
        return len(self._open)

    def open_turn(self, key: str, user_text: str | None, message_id: str) -> OpenTurn:
        """An async context manager around one answer. `user_text` None: answer the last message again."""
        return OpenTurn(self, key, user_text, message_id)

    async def check_regenerable(self, key: str) -> None:
        """Raises `InvalidRequest` when there is no answer yet."""
        (await self._store.load(key)).for_regeneration()

    async def forget(self, key: str) -> bool:
        """Delete a conversation; the answer being generated is not saved either. False when there was none."""
        self._open.pop(key, None)
        return await self._store.delete(key)

    async def start_turn(self, turn: OpenTurn) -> Conversation:
        self._open[turn.key] = turn
        return await self._store.load(turn.key)

    async def end_turn(self, turn: OpenTurn, conversation: Conversation | None) -> None:
        """Close the turn and save `conversation`, unless it is None."""
        if self._open.get(turn.key) is not turn:
            return
        del self._open[turn.key]
        if conversation is not None:
            await self._store.save(turn.key, conversation)

    def with_turn(self, before: Conversation, turn: Turn) -> Conversation:
        return before.with_turn(turn, self._limits)


class OpenTurn:
    """A turn in progress: its answer is being generated.

    The turn is saved when the block ends, also if the client disconnected in the middle: the user has seen that part of
    the answer. It is not saved if the generation failed or the answer is empty.
    """

    def __init__(self, conversations: Conversations, key: str, user_text: str | None, message_id: str) -> None:
        self.key = key
        self.answer = ""
        """The answer so far; the caller appends to it."""
        self.messages: tuple[Message, ...] = ()
        """The conversation, ending with the message to answer."""
        self._conversations = conversations
        self._user_text = user_text
        self._message_id = message_id
        self._before = Conversation()

    async def __aenter__(self) -> OpenTurn:
        try:
            before = await self._conversations.start_turn(self)
            if self._user_text is None:
                before, self._user_text = before.for_regeneration()
        except BaseException:  # nothing to regenerate, the store failed, or the client disconnected during the load
            await self._conversations.end_turn(self, None)
            raise
        self._before = before
        self.messages = (*before.messages(), Message("user", self._user_text))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, *_: object) -> None:
        has_failed = kind is not None and issubclass(kind, Exception)
        conversation = None
        if self.answer and self._user_text is not None and not has_failed:
            turn = Turn(self._user_text, self.answer, self._message_id)
            conversation = self._conversations.with_turn(self._before, turn)
        await self._conversations.end_turn(self, conversation)
