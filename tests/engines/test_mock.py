"""The mock engine: scripted text, all generations at the same pace."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.engines.mock import LONG, ROUND, MockEngine, split
from chatstream.errors import ConfigError, EngineUnavailable, UnsupportedParameter
from chatstream.testing import check_engine, run_virtual
from chatstream.types import FinishReason, GenerationRequest, Message, PreparedPrompt, SamplingParams, TokenDelta


async def generate(engine: MockEngine, *contents: str, request_id: str = "r", **sampling: object) -> list[TokenDelta]:
    messages: list[Message] = []
    for n, content in enumerate(contents):
        messages.append(Message("assistant" if n % 2 else "user", content))
    params = SamplingParams(**sampling)  # type: ignore[arg-type]
    request = GenerationRequest(request_id, PreparedPrompt(messages=tuple(messages)), params)
    return [delta async for delta in engine.stream(request)]


def text(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)


@pytest.mark.anyio
async def test_it_keeps_the_contract_of_engines() -> None:
    await check_engine(MockEngine("long", time_per_token_s=0.0))


@pytest.mark.anyio
async def test_unsupported_parameters_are_refused_by_name() -> None:
    engine = MockEngine()
    with pytest.raises(UnsupportedParameter) as refusal:
        await engine.prepare("hi", SamplingParams(logprobs=0))
    assert refusal.value.param == "logprobs"
    prepared = await engine.prepare("hi", SamplingParams(min_p=0.5, frequency_penalty=2.0))
    with pytest.raises(UnsupportedParameter) as refusal:
        await anext(engine.stream(GenerationRequest("r", prepared, token_mask=lambda generated_ids: None)))
    assert refusal.value.param == "token_mask"


@given(st.text(max_size=40))
def test_the_tokens_of_a_text_concatenate_to_the_text(words: str) -> None:
    assert "".join(split(words)) == words


def test_a_token_is_a_word_or_a_wide_character() -> None:
    assert split("ab cd  e") == ["ab", " cd", " ", " e"]
    assert split("日本語の文") == list("日本語の文")
    assert split("日本 and two words") == ["日本", " and", " two", " words"]


def test_the_answers_of_echo_round_and_long() -> None:
    async def run() -> None:
        assert text(await generate(MockEngine("echo"), "first", "re", "say this")) == "say this"
        assert text(await generate(MockEngine("round"), "x")) == ROUND[0]
        assert text(await generate(MockEngine("round"), "x", "y", "z")) == ROUND[1]
        assert text(await generate(MockEngine("long"), "x")) == LONG

    run_virtual(run())


def test_tokens_come_at_the_pace_after_the_initial_wait() -> None:
    async def run() -> None:
        engine = MockEngine("echo", initial_wait_s=2.0, time_per_token_s=0.5)
        deltas = await generate(engine, "a b c d")
        assert len(deltas) == 4
        assert asyncio.get_running_loop().time() == pytest.approx(2.0 + 3 * 0.5)

    run_virtual(run())


def test_two_generations_alternate_token_by_token_at_any_pace() -> None:
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


def test_max_new_tokens_and_stop_are_honoured_and_have_no_default() -> None:
    async def run() -> None:
        engine = MockEngine("echo", time_per_token_s=0.0)
        deltas = await generate(engine, "a b c d", max_new_tokens=2)
        assert (text(deltas), deltas[-1].finish_reason) == ("a b", FinishReason.LENGTH)
        assert deltas[-1].usage is not None
        assert deltas[-1].usage.completion_tokens == 2
        assert text(await generate(engine, "a b c d", stop=("c",))) == "a b "
        assert len(await generate(engine, "w " * 5000)) == 5001

    run_virtual(run())


def test_a_reader_that_lags_delays_no_other_and_loses_no_text() -> None:
    async def run() -> None:
        engine = MockEngine("echo", time_per_token_s=0.1, max_undelivered=3)
        request = GenerationRequest("slow", PreparedPrompt(messages=(Message("user", "w " * 20),)))
        slow = engine.stream(request)
        first = await anext(slow)
        assert len(await generate(engine, "w " * 40)) == 41
        rest = [delta async for delta in slow]
        assert text([first, *rest]) == "w " * 20

    run_virtual(run())


def test_a_reader_that_lagged_gets_the_missed_tokens_at_once() -> None:
    async def run() -> None:
        engine = MockEngine("echo", time_per_token_s=1.0, max_undelivered=3)
        stream = engine.stream(GenerationRequest("late", PreparedPrompt(messages=(Message("user", "w " * 9),))))
        await anext(stream)
        await asyncio.sleep(99.0)
        times_s = [asyncio.get_running_loop().time() async for _ in stream]
        assert times_s == [100.0] * 4 + [101.0, 102.0, 103.0, 104.0, 105.0]

    run_virtual(run())


def test_a_stop_ends_the_initial_wait_at_once() -> None:
    async def run() -> None:
        engine = MockEngine("echo", initial_wait_s=3600.0)
        await engine.start()
        waiting = StreamReader(engine, "r", "a b")
        await asyncio.sleep(1.0)
        await engine.stop()
        with pytest.raises(EngineUnavailable):
            await waiting.task
        assert asyncio.get_running_loop().time() == 1.0

    run_virtual(run())


def test_no_timer_runs_while_every_reader_lags() -> None:
    async def run() -> None:
        slow = MockEngine("echo", max_undelivered=3).stream(
            GenerationRequest("slow", PreparedPrompt(messages=(Message("user", "w " * 20),)))
        )
        await anext(slow)
        await asyncio.Event().wait()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        run_virtual(run())


def test_a_reader_that_lagged_does_not_wait_for_the_initial_wait_of_another() -> None:
    async def run() -> None:
        engine = MockEngine("echo", initial_wait_s=5.0, time_per_token_s=1.0, max_undelivered=1)
        slow = engine.stream(GenerationRequest("slow", PreparedPrompt(messages=(Message("user", "a b c"),))))
        await anext(slow)
        await asyncio.sleep(2.5)
        late = StreamReader(engine, "late", "d e")
        await asyncio.sleep(1.0)
        assert [delta.text async for delta in slow] == [" b", " c"]
        assert asyncio.get_running_loop().time() == pytest.approx(8.5)
        await late.task
        assert late.times_s == [12.5, 13.5]

    run_virtual(run())


# --- preempting -----------------------------------------------------------------------------------------------------


class StreamReader:
    """Reads one stream in a task. `times_s`: the time at which each token arrived."""

    def __init__(self, engine: MockEngine, request_id: str, words: str) -> None:
        self.times_s: list[float] = []
        self.text = ""
        self.num_prompt_tokens: list[int] = []
        request = GenerationRequest(request_id, PreparedPrompt(messages=(Message("user", words),)))
        self.task = asyncio.create_task(self._read(engine, request))

    async def _read(self, engine: MockEngine, request: GenerationRequest) -> None:
        async with aclosing(engine.stream(request)) as stream:
            async for delta in stream:
                self.times_s.append(round(asyncio.get_running_loop().time(), 6))
                self.text += delta.text
                self.num_prompt_tokens.append(delta.num_prompt_tokens)


def test_a_preempted_generation_is_silent_and_others_keep_their_pace() -> None:
    async def run() -> None:
        engine = MockEngine("echo", time_per_token_s=1.0)
        preempted, other = StreamReader(engine, "preempted", "a b c d"), StreamReader(engine, "other", "w " * 9)
        await asyncio.sleep(2.5)
        await engine.preempt("preempted")
        await engine.preempt("preempted")
        await asyncio.sleep(3.0)
        engine.resume("preempted")
        await asyncio.gather(preempted.task, other.task)
        assert (preempted.text, preempted.times_s) == ("a b c d", [1.0, 2.0, 6.0, 7.0])
        assert other.times_s == [float(n) for n in range(1, 11)]
        assert preempted.num_prompt_tokens == [4, 0, 0, 0]

    run_virtual(run())


def test_the_initial_wait_stands_still_while_preempted() -> None:
    async def run() -> None:
        engine = MockEngine("echo", initial_wait_s=5.0, time_per_token_s=1.0)
        preempted, other = StreamReader(engine, "preempted", "a b"), StreamReader(engine, "other", "c d")
        await asyncio.sleep(2.0)
        await engine.preempt("preempted")
        await asyncio.sleep(100.0)
        engine.resume("preempted")
        await asyncio.gather(preempted.task, other.task)
        assert (preempted.times_s, other.times_s) == ([105.0, 106.0], [5.0, 6.0])

    run_virtual(run())


def test_a_resumed_generation_does_not_wait_for_the_initial_wait_of_another() -> None:
    async def run() -> None:
        engine = MockEngine("echo", initial_wait_s=5.0, time_per_token_s=1.0)
        preempted = StreamReader(engine, "preempted", "a b c")
        await asyncio.sleep(5.5)
        await engine.preempt("preempted")
        late = StreamReader(engine, "late", "d e")
        await asyncio.sleep(1.0)
        engine.resume("preempted")
        await asyncio.gather(preempted.task, late.task)
        assert preempted.times_s[0] == 5.0
        assert preempted.times_s[1] < 8.0
        assert late.times_s == [10.5, 11.5]

    run_virtual(run())


def test_no_timer_runs_while_all_generations_are_preempted() -> None:
    async def run() -> None:
        engine = MockEngine("echo")
        preempted = StreamReader(engine, "preempted", "a b")
        await asyncio.sleep(0)
        await engine.preempt("preempted")
        await asyncio.wait([preempted.task])

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        run_virtual(run())


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_a_preempted_generation_can_be_cancelled_or_stopped(end: str) -> None:
    async def run() -> None:
        engine = MockEngine("echo")
        await engine.start()
        preempted = StreamReader(engine, "r", "a b c")
        await asyncio.sleep(0.15)
        await engine.preempt("r")
        if end == "stop":
            await engine.stop()
        else:
            preempted.task.cancel()
        with pytest.raises(asyncio.CancelledError if end == "cancel" else EngineUnavailable):
            await preempted.task
        engine.resume("r")
        await engine.preempt("r")
        assert text(await generate(engine, "again", request_id="r")) == "again"

    run_virtual(run())


@pytest.mark.parametrize("wrong", [{"type": "random"}, {"time_per_token_s": -1.0}, {"initial_wait_s": float("nan")}])
def test_impossible_settings_are_refused(wrong: dict[str, object]) -> None:
    with pytest.raises(ConfigError):
        MockEngine(**wrong)  # type: ignore[arg-type]
