"""The mock: scripted text, one token for everybody a beat."""

from __future__ import annotations

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.engines.mock import LONG, ROUND, MockEngine, split
from chatstream.errors import ConfigError
from chatstream.testing import check_engine, run_virtual
from chatstream.types import FinishReason, GenerationRequest, Message, PreparedPrompt, SamplingParams, TokenDelta


async def generate(engine: MockEngine, *said: str, request_id: str = "r", **sampling: object) -> list[TokenDelta]:
    messages: list[Message] = []
    for n, words in enumerate(said):
        messages.append(Message("assistant" if n % 2 else "user", words))
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    request = GenerationRequest(request_id, PreparedPrompt(messages=tuple(messages)), params)
    return [delta async for delta in engine.stream(request)]


def text(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.anyio
async def test_it_keeps_the_contract_of_engines() -> None:
    await check_engine(MockEngine("long", time_per_token_s=0.0))


@given(st.text(max_size=40))
def test_the_tokens_of_a_text_are_the_text(words: str) -> None:
    assert "".join(split(words)) == words


def test_a_token_is_a_word_or_a_wide_character() -> None:
    assert split("ab cd  e") == ["ab", " cd", " ", " e"]
    assert split("日本語の文") == list("日本語の文")
    assert split("日本 and two words") == ["日本", " and", " two", " words"]


def test_echo_says_what_was_said_round_one_sentence_a_turn_long_paragraphs() -> None:
    async def run() -> None:
        assert text(await generate(MockEngine("echo"), "first", "re", "say this")) == "say this"
        assert text(await generate(MockEngine("round"), "x")) == ROUND[0]
        assert text(await generate(MockEngine("round"), "x", "y", "z")) == ROUND[1]
        assert text(await generate(MockEngine("long"), "x")) == LONG

    run_virtual(run())


def test_it_keeps_its_pace_and_waits_first_inside_the_slot() -> None:
    async def run() -> None:
        engine = MockEngine("echo", initial_wait_s=2.0, time_per_token_s=0.5)
        deltas = await generate(engine, "a b c d")
        assert len(deltas) == 4
        assert asyncio.get_running_loop().time() == pytest.approx(2.0 + 3 * 0.5)

    run_virtual(run())


def test_two_take_turns_token_by_token_also_without_a_pause() -> None:
    async def run(time_per_token_s: float) -> None:
        engine = MockEngine("echo", time_per_token_s=time_per_token_s)
        order: list[str] = []

        async def read(request_id: str, words: str) -> None:
            request = GenerationRequest(request_id, PreparedPrompt(messages=(Message("user", words),)))
            async for _ in engine.stream(request):
                order.append(request_id)  # noqa: PERF401 - two readers share the list

        await asyncio.gather(read("a", "w " * 49), read("b", "w " * 49))
        for n in range(len(order)):
            assert abs(order[:n].count("a") - order[:n].count("b")) <= 1

    for pace in (0.0, 0.1):
        run_virtual(run(pace))


def test_it_honours_max_new_tokens_and_stop_and_has_no_default() -> None:
    async def run() -> None:
        engine = MockEngine("echo", time_per_token_s=0.0)
        deltas = await generate(engine, "a b c d", max_new_tokens=2)
        assert (text(deltas), deltas[-1].finish_reason) == ("a b", FinishReason.LENGTH)
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 2
        assert text(await generate(engine, "a b c d", stop=("c",))) == "a b "
        assert len(await generate(engine, "w " * 5000)) == 5001

    run_virtual(run())


def test_a_reader_that_lags_is_skipped_and_loses_nothing() -> None:
    async def run() -> None:
        engine = MockEngine("echo", time_per_token_s=0.1, max_undelivered=3)
        request = GenerationRequest("slow", PreparedPrompt(messages=(Message("user", "w " * 20),)))
        slow = engine.stream(request)
        first = await anext(slow)
        assert len(await generate(engine, "w " * 40)) == 41
        rest = [delta async for delta in slow]
        assert text([first, *rest]) == "w " * 20

    run_virtual(run())


@pytest.mark.parametrize("wrong", [{"type": "random"}, {"time_per_token_s": -1.0}, {"initial_wait_s": float("nan")}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        MockEngine(**wrong)  # type: ignore[arg-type]
