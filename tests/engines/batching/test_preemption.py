"""A preempted generation is in no step, releases its slot, and resumes with an unchanged answer."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel, SlotInput
from chatstream.errors import EngineUnavailable
from chatstream.types import FinishReason, GenerationRequest, PreparedPrompt, SamplingParams, TokenDelta, Usage
from tests.engines.batching.lockstep import Step, check_play, check_texts, largest_drift, play_alone, play_at_random
from tests.engines.batching.scripted import (
    EOS,
    CharCodec,
    Panic,
    ScriptedRunner,
    counting,
    generate,
    running,
    scripted_engine,
    text,
    until,
)

pytestmark = pytest.mark.anyio


def stream(engine: StepEngine, prompt: str, max_new_tokens: int = 900) -> AsyncGenerator[TokenDelta, None]:
    """The request id is the prompt."""
    prepared = PreparedPrompt(tuple(map(ord, prompt)))
    return engine.stream(GenerationRequest(prompt, prepared, SamplingParams(max_new_tokens=max_new_tokens)))


def requests_since(runner: ScriptedRunner, num_steps: int) -> set[str]:
    return set().union(*runner.requests_in_step[num_steps:])


# --- progress of a prefill ------------------------------------------------------------------------------------------


async def test_each_chunk_of_a_prompt_is_reported_and_the_last_one_with_the_first_token() -> None:
    async with running(ScriptedRunner(), max_prompt_tokens_per_step=10) as engine:
        deltas = await generate(engine, "p" * 25, max_new_tokens=2)
    assert deltas[:2] == [TokenDelta("", 0, num_prompt_tokens=10)] * 2
    assert [(delta.num_tokens, delta.num_prompt_tokens) for delta in deltas[2:]] == [(1, 5), (1, 0)]


async def test_an_answer_that_ends_at_once_reports_the_last_chunk() -> None:
    async with running(ScriptedRunner(lambda p, n: EOS)) as engine:
        assert await generate(engine, "abc") == [TokenDelta("", 0, FinishReason.STOP, Usage(3, 0), 3)]


async def test_a_prefill_does_not_wait_for_a_reader_that_lags() -> None:
    runner = ScriptedRunner()
    async with running(runner, max_prompt_tokens_per_step=1, max_undelivered=3) as engine:
        answer = stream(engine, "p" * 40)
        first = await anext(answer)
        await generate(engine, "b", max_new_tokens=60)
        # The 40 steps of the prompt, the last one with the first token, and two more tokens.
        assert sum("p" in requests_in_step for requests_in_step in runner.requests_in_step) == 40 + 2
        rest = [await anext(answer) for _ in range(39 + 3)]
        assert sum(delta.num_prompt_tokens for delta in (first, *rest)) == 40
        await answer.aclose()


# --- preempting -----------------------------------------------------------------------------------------------------


async def test_nothing_is_generated_while_preempted_and_earlier_tokens_can_be_read() -> None:
    runner = ScriptedRunner()
    async with running(runner, max_undelivered=20) as engine:
        answer = stream(engine, "a")
        first = await anext(answer)
        await engine.preempt("a")
        num_steps = len(runner.steps)
        made = [await asyncio.wait_for(anext(answer), 10) for _ in range(num_steps - 1)]
        reader = asyncio.ensure_future(anext(answer))
        await generate(engine, "b", max_new_tokens=50)
        assert requests_since(runner, num_steps) == {"b"}
        assert not reader.done()
        engine.resume("a")
        rest = [await reader] + [await anext(answer) for _ in range(20)]
        deltas = [first, *made, *rest]
        assert text(deltas) == "".join(chr(counting((ord("a"),), n)) for n in range(len(deltas)))
        await answer.aclose()


async def test_a_prompt_preempted_in_its_prefill_lets_the_next_one_run() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner, max_prompt_tokens_per_step=1) as engine:
        first = asyncio.create_task(generate(engine, "a" * 50, "a", max_new_tokens=3))
        await until(lambda: runner.open_slots)
        preempt = asyncio.create_task(engine.preempt("a"))
        await asyncio.sleep(0)
        runner.gate.set()
        await preempt
        num_steps = len(runner.steps)
        assert num_steps < 50
        await generate(engine, "b" * 20, max_new_tokens=3)
        assert requests_since(runner, num_steps) == {"b"}
        engine.resume("a")
        assert len([d for d in await first if d.num_tokens]) == 3


async def test_cancelling_while_preempted_leaves_nothing_behind() -> None:
    runner = ScriptedRunner()
    async with running(runner) as engine:
        for _ in range(3):
            answer = stream(engine, "a")
            await anext(answer)
            await engine.preempt("a")
            assert not runner.open_slots
            await answer.aclose()
        engine.resume("a")
        assert len(await generate(engine, "a", "a")) == 5, "the id is not preempted any more"


async def test_state_that_only_a_cancelled_request_could_use_is_discarded() -> None:
    async with running(ScriptedRunner(supports_partial_prefix=False), prefix_cache_bytes=1000) as engine:
        for prompt in "ab":
            preempted = stream(engine, prompt)
            await anext(preempted)
            await engine.preempt(prompt)
            assert engine.stats().num_cached_sequences == 1
            await preempted.aclose()
            assert engine.stats().num_cached_sequences == 0


async def test_stopping_while_preempted_ends_the_stream() -> None:
    runner = ScriptedRunner()
    async with running(runner) as engine:
        answer = stream(engine, "a")
        await anext(answer)
        await engine.preempt("a")
        await engine.stop()
        with pytest.raises(EngineUnavailable):
            async for _ in answer:
                pass
        await engine.preempt("a")  # returns although the thread has ended
        engine.resume("a")


async def test_an_engine_failure_ends_preempted_streams_too() -> None:
    def rule(prompt: tuple[int, ...], n: int) -> int:
        if prompt == (ord("!"),):
            raise Panic
        return counting(prompt, n)

    async with running(ScriptedRunner(rule)) as engine:
        answer = stream(engine, "a")
        await anext(answer)
        await engine.preempt("a")
        with pytest.raises(EngineUnavailable):
            await generate(engine, "!")
        with pytest.raises(EngineUnavailable):
            async for _ in answer:
                pass


async def test_a_failed_step_does_not_affect_preempted_generations() -> None:
    def rule(prompt: tuple[int, ...], n: int) -> int:
        if prompt == (ord("!"),):
            raise MemoryError
        return counting(prompt, n)

    async with running(ScriptedRunner(rule)) as engine:
        answer = stream(engine, "a", max_new_tokens=200)
        deltas = [await anext(answer)]
        await engine.preempt("a")
        await asyncio.gather(generate(engine, "!"), return_exceptions=True)
        engine.resume("a")
        deltas += [delta async for delta in answer]
    assert len(deltas) == 200


@pytest.mark.parametrize("last_call", ["preempt", "resume"])
async def test_the_latest_of_preempt_and_resume_counts_before_earlier_calls_return(last_call: str) -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        answer = asyncio.create_task(generate(engine, "a", "a", max_new_tokens=10))
        await until(lambda: runner.open_slots)
        preempts = []
        for call in ("preempt", "resume", "preempt", "preempt", last_call):
            if call == "preempt":
                preempts.append(asyncio.create_task(engine.preempt("a")))
                await asyncio.sleep(0)
            else:
                engine.resume("a")
        runner.gate.set()
        await asyncio.gather(*preempts)
        await generate(engine, "b", max_new_tokens=30)
        if last_call == "preempt":
            assert not answer.done()
            engine.resume("a")
        assert len(await answer) == 10


async def test_an_id_that_is_unknown_or_has_ended_has_no_effect() -> None:
    async with running(ScriptedRunner()) as engine:
        await generate(engine, "a", "a")
        for request_id in ("a", "never"):
            engine.resume(request_id)
            await engine.preempt(request_id)
        assert len(await generate(engine, "a", "a")) == 5
    await scripted_engine(ScriptedRunner()).preempt("a")  # not started yet


async def test_a_preempt_call_that_is_cancelled_preempts_all_the_same() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        answer = asyncio.create_task(generate(engine, "a", "a", max_new_tokens=10))
        await until(lambda: runner.open_slots)
        preempt = asyncio.create_task(engine.preempt("a"))
        await asyncio.sleep(0)
        preempt.cancel()
        await asyncio.gather(preempt, return_exceptions=True)
        runner.gate.set()
        await generate(engine, "b", max_new_tokens=30)
        assert not answer.done()
        engine.resume("a")
        assert len(await answer) == 10


# --- any schedule ---------------------------------------------------------------------------------------------------


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=2, max_size=9),
    most=st.integers(1, 16),
    seed=st.integers(0, 2**32),
)
def test_each_step_gives_one_token_to_exactly_the_running_generations(
    sizes: list[tuple[int, int]], most: int, seed: int
) -> None:
    """In any schedule of starts, disconnects, preemptions: two running requests drift apart by one token at most."""
    model = LoadedModel(ScriptedRunner(), CharCodec(), prefix_cache_bytes=10**6)
    expected = asyncio.run(play_alone(model, requests_of(sizes)))
    options = {"max_prompt_tokens_per_step": most, "itl_target_s": inf}
    check_play(asyncio.run(play_at_random(model, requests_of(sizes), seed, **options)), expected)


@settings(max_examples=40, deadline=None)
@given(
    sizes=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 30)), min_size=2, max_size=9),
    prefix_cache_bytes=st.integers(0, 60),
    seed=st.integers(0, 2**32),
    supports_partial_prefix=st.booleans(),
)
def test_answers_are_the_same_when_the_prefix_cache_is_too_small(
    sizes: list[tuple[int, int]], prefix_cache_bytes: int, seed: int, supports_partial_prefix: bool
) -> None:
    """A preempted generation whose entry was evicted computes its tokens again."""
    model = LoadedModel(
        ScriptedRunner(supports_partial_prefix=supports_partial_prefix),
        CharCodec(),
        prefix_cache_bytes=prefix_cache_bytes,
    )
    expected = asyncio.run(play_alone(model, requests_of(sizes)))
    play = asyncio.run(play_at_random(model, requests_of(sizes), seed))
    check_texts(play, expected)


def requests_of(sizes: list[tuple[int, int]]) -> list[GenerationRequest]:
    """Requests whose prompts have a common prefix."""
    return [
        GenerationRequest(
            f"r{n}", PreparedPrompt((*[1] * (prompt - 1), 100 + n)), SamplingParams(max_new_tokens=answer)
        )
        for n, (prompt, answer) in enumerate(sizes)
    ]


def test_largest_drift_detects_a_generation_at_twice_the_pace() -> None:
    inputs = (SlotInput(0, 1, (1,), is_last=True), SlotInput(1, 1, (1,), is_last=True))
    both = {"a": 0, "b": 1}
    fair = [Step(inputs, both, None, {"a": n, "b": n - 1}) for n in range(1, 9)]
    assert largest_drift(fair) == 0
    assert largest_drift([Step(inputs, both, None, {"a": 2 * n, "b": n}) for n in range(1, 9)]) == 7
    alone = Step(inputs, {"a": 0}, None, {"a": 20, "b": 7})  # b is preempted, which does not count as drift
    assert largest_drift([*fair, alone, *[Step(inputs, both, None, {"a": 20 + n, "b": 7 + n}) for n in (1, 2)]]) == 0
