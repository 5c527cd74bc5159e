"""Conversations kept on the server: which turns are saved and which are dropped."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from functools import wraps

import pytest

from chatstream import Message, SessionSettings
from chatstream.errors import ConfigError, InvalidRequest
from chatstream.sessions import Conversation, Conversations, MemoryStore, Turn


def run(test: Callable[[], Awaitable[None]]) -> Callable[[], None]:
    @wraps(test)
    def wrapper() -> None:
        asyncio.run(test())  # type: ignore[arg-type]

    return wrapper


def conversation(*turns: tuple[str, str]) -> Conversation:
    return Conversation(tuple(Turn(user, answer, f"m{n}") for n, (user, answer) in enumerate(turns)))


class Sessions:
    def __init__(self, **limits: float) -> None:
        self.settings = SessionSettings(**limits)  # type: ignore[arg-type]
        self.store = MemoryStore(self.settings)
        self.conversations = Conversations(self.store, self.settings)

    async def take_turn(
        self, key: str, user_text: str | None, answer: str, error: BaseException | None = None
    ) -> list[str]:
        """Run one turn; returns the messages in the prompt."""
        try:
            async with self.conversations.open_turn(key, user_text, "m") as turn:
                turn.answer = answer
                seen = [message.content for message in turn.messages]
                if error is not None:
                    raise error
        except (RuntimeError, asyncio.CancelledError, GeneratorExit):
            pass
        return seen

    async def turns(self, key: str) -> list[tuple[str, str]]:
        return [(turn.user, turn.answer) for turn in (await self.store.load(key)).turns]


def test_a_conversation_alternates_user_messages_and_answers() -> None:
    assert conversation(("a", "b"), ("c", "d")).messages() == (
        Message("user", "a"), Message("assistant", "b"), Message("user", "c"), Message("assistant", "d")
    )  # fmt: skip
    assert Conversation().messages() == ()


@run
async def test_an_answered_turn_is_kept_and_the_next_one_sees_it() -> None:
    sessions = Sessions()
    assert await sessions.take_turn("k", "one", "1") == ["one"]
    assert await sessions.take_turn("k", "two", "2") == ["one", "1", "two"]
    assert await sessions.take_turn("other", "alien", "x") == ["alien"]
    assert await sessions.turns("k") == [("one", "1"), ("two", "2")]


@run
async def test_a_partial_answer_is_kept_after_a_disconnect_but_a_failed_or_empty_one_is_not() -> None:
    for error, kept in ((asyncio.CancelledError(), True), (GeneratorExit(), True), (RuntimeError(), False)):
        sessions = Sessions()
        await sessions.take_turn("k", "one", "half", error)
        assert await sessions.turns("k") == ([("one", "half")] if kept else [])
    sessions = Sessions()
    await sessions.take_turn("k", "one", "")
    assert await sessions.turns("k") == []


@run
async def test_regenerating_replaces_the_last_answer_only_when_there_is_a_new_one() -> None:
    sessions = Sessions()
    await sessions.take_turn("k", "one", "1")
    await sessions.take_turn("k", "two", "2")
    assert await sessions.take_turn("k", None, "2b", RuntimeError()) == ["one", "1", "two"]
    assert await sessions.turns("k") == [("one", "1"), ("two", "2")]
    await sessions.take_turn("k", None, "")
    assert await sessions.turns("k") == [("one", "1"), ("two", "2")]
    await sessions.take_turn("k", None, "2b")
    assert await sessions.turns("k") == [("one", "1"), ("two", "2b")]


@run
async def test_there_is_nothing_to_regenerate_in_an_empty_conversation() -> None:
    sessions = Sessions()
    with pytest.raises(InvalidRequest, match="regenerate"):
        await sessions.take_turn("k", None, "x")
    with pytest.raises(InvalidRequest, match="regenerate"):
        await sessions.conversations.check_regenerable("k")
    await sessions.take_turn("k", "one", "1")  # the failed attempt has no effect
    await sessions.conversations.check_regenerable("k")


@run
async def test_forget_discards_the_answer_in_progress_and_the_next_turn_is_kept() -> None:
    sessions = Sessions()
    await sessions.take_turn("k", "one", "1")
    async with sessions.conversations.open_turn("k", "two", "m") as turn:
        turn.answer = "2"
        assert await sessions.conversations.forget("k")
        async with sessions.conversations.open_turn("k", "three", "m") as later:
            assert [message.content for message in later.messages] == ["three"]
            later.answer = "3"
    assert await sessions.turns("k") == [("three", "3")]
    assert await sessions.conversations.forget("k")
    assert not await sessions.conversations.forget("k")


@run
async def test_an_ended_turn_leaves_nothing_in_memory() -> None:
    sessions = Sessions()
    for error in (None, RuntimeError(), asyncio.CancelledError()):
        await sessions.take_turn("k", "one", "1", error)
    with pytest.raises(InvalidRequest):
        await sessions.take_turn("empty", None, "x")
    assert sessions.conversations.num_open_turns == 0


class FailingStore(MemoryStore):
    """A store that fails, or answers too late."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self._how = how

    async def load(self, key: str) -> Conversation:
        if self._how == "is slow":
            await asyncio.sleep(3600.0)
        raise OSError("the store cannot be reached")


@run
async def test_a_turn_whose_conversation_cannot_be_loaded_leaves_nothing_in_memory() -> None:
    for how in ("raises", "is slow"):
        conversations = Conversations(FailingStore(how), SessionSettings())
        with pytest.raises((OSError, TimeoutError)):
            async with asyncio.timeout(0.01):
                await conversations.open_turn("k", "hello", "m").__aenter__()
        assert conversations.num_open_turns == 0


@run
async def test_the_oldest_turns_are_dropped_to_keep_number_and_length_bounded() -> None:
    sessions = Sessions(max_turns=2)
    for n in range(4):
        await sessions.take_turn("k", f"q{n}", f"a{n}")
    assert await sessions.turns("k") == [("q2", "a2"), ("q3", "a3")]
    sessions = Sessions(max_chars=10)
    for answer in ("aaaa", "bbbb", "cccc"):  # 5 characters a turn
        await sessions.take_turn("k", "q", answer)
    assert await sessions.turns("k") == [("q", "bbbb"), ("q", "cccc")]
    await sessions.take_turn("k", "q", "d" * 50)  # the newest turn is kept whatever its size
    assert await sessions.turns("k") == [("q", "d" * 50)]


@run
async def test_the_least_recently_used_conversation_is_dropped_for_a_new_one() -> None:
    sessions = Sessions(max_conversations=2)
    for key in ("a", "b"):
        await sessions.take_turn(key, "one", "1")
    await sessions.store.load("a")  # a read counts as use
    await sessions.take_turn("c", "one", "1")
    assert len(sessions.store) == 2
    assert await sessions.turns("b") == []
    assert await sessions.turns("a") != []


@run
async def test_an_idle_conversation_is_dropped_and_a_read_counts_as_use() -> None:
    clock = [0.0]
    store = MemoryStore(SessionSettings(idle_s=100.0), timer=lambda: clock[0])
    await store.save("k", conversation(("a", "b")))
    for clock[0] in (99.0, 198.0, 297.0):
        assert (await store.load("k")).turns
    clock[0] = 398.0
    assert not (await store.load("k")).turns
    assert len(store) == 0


@pytest.mark.parametrize("name", ["max_conversations", "idle_s", "max_turns", "max_chars"])
def test_an_impossible_limit_is_refused_by_name(name: str) -> None:
    for wrong in (0, -1):
        with pytest.raises(ConfigError, match=name):
            SessionSettings(**{name: wrong})  # type: ignore[arg-type]


async def keys_of(store: MemoryStore, count: int) -> list[int]:
    return [n for n in range(count) if (await store.load(str(n))).turns]


@pytest.mark.anyio
async def test_all_conversations_together_are_bounded_in_size_and_in_number() -> None:
    by_size = MemoryStore(SessionSettings(max_conversations=100, max_total_chars=1000))
    for n in range(5):
        await by_size.save(str(n), Conversation((Turn("u" * 200, "a" * 100, "id"),)))
    assert await keys_of(by_size, 5) == [2, 3, 4]
    by_number = MemoryStore(SessionSettings(max_conversations=2, max_total_chars=1000))
    for n in range(5):
        await by_number.save(str(n), Conversation((Turn("u", "a", "id"),)))
    assert await keys_of(by_number, 5) == [3, 4]


@pytest.mark.anyio
async def test_a_conversation_larger_than_the_store_is_not_kept() -> None:
    store = MemoryStore(SessionSettings(max_conversations=2, max_total_chars=1000))
    await store.save("0", Conversation((Turn("u", "a", "id"),)))
    await store.save("0", Conversation((Turn("u" * 2000, "a", "id"),)))
    assert not (await store.load("0")).turns
