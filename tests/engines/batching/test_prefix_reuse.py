"""No prefix is computed twice: turns of a conversation, shared prefixes, preempted generations."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Mapping, Sequence
from math import inf

import pytest

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.loop import MIN_SHARED_TOKENS
from chatstream.engines.batching.model import SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.errors import EngineError
from chatstream.types import GenerationRequest, PreparedPrompt, SamplingParams, TokenDelta, Usage
from tests.engines.batching.scripted import SavedTokens, ScriptedRunner, begin, counting, generate, running, text, until

pytestmark = pytest.mark.anyio

WITH_CACHE = {"prefix_cache_bytes": 10**6}
SYSTEM = "s" * 200


def stream(engine: StepEngine, prompt: str, request_id: str, max_new_tokens: int) -> AsyncGenerator[TokenDelta, None]:
    prepared = PreparedPrompt(tuple(map(ord, prompt)))
    return engine.stream(GenerationRequest(request_id, prepared, SamplingParams(max_new_tokens=max_new_tokens)))


def num_computed(steps: Sequence[Sequence[SlotInput]]) -> int:
    return sum(len(item.token_ids) for step in steps for item in step)


def prompt_tokens_reported(deltas: Sequence[TokenDelta]) -> int:
    return sum(delta.num_prompt_tokens for delta in deltas)


# --- one after the other --------------------------------------------------------------------------------------------


async def test_the_next_turn_computes_only_new_tokens() -> None:
    runner = ScriptedRunner()
    async with running(runner, **WITH_CACHE) as engine:
        first = "hello " * 20
        answer = text(await generate(engine, first, max_new_tokens=30))
        num_steps = len(runner.steps)
        second = first + answer + " and now?"
        deltas = await generate(engine, second, max_new_tokens=3)
    # The last token of the answer was sampled, but not computed.
    cached = len(first + answer) - 1
    assert runner.steps[num_steps][0].start == cached
    assert num_computed(runner.steps[num_steps:]) == len(second) - cached + 2
    assert prompt_tokens_reported(deltas) == len(second), "reused tokens are reported too"
    assert deltas[-1].usage == Usage(len(second), 3)


async def test_a_repeated_request_computes_one_token_of_its_prompt() -> None:
    runner = ScriptedRunner()
    async with running(runner, **WITH_CACHE) as engine:
        answers = [text(await generate(engine, SYSTEM)) for _ in range(3)]
        assert engine.stats().num_cached_sequences == 1
    assert answers[0] == answers[1] == answers[2]
    assert num_computed(runner.steps) == (200 + 4) + 2 * (1 + 4)


async def test_the_prefill_of_a_closed_stream_is_reused() -> None:
    runner = ScriptedRunner()
    async with running(runner, max_prompt_tokens_per_step=50, **WITH_CACHE) as engine:
        closed = stream(engine, SYSTEM, "a", 5)
        await anext(closed)
        await closed.aclose()
        num_steps, cached = len(runner.steps), num_computed(runner.steps)
        await generate(engine, SYSTEM)
    assert cached >= 50
    assert runner.steps[num_steps][0].start == min(cached, len(SYSTEM) - 1)  # the logits of the last token are needed


async def test_a_short_common_prefix_is_computed_again() -> None:
    runner = ScriptedRunner()
    async with running(runner, **WITH_CACHE) as engine:
        await generate(engine, "s" * (MIN_SHARED_TOKENS - 1) + "a" * 20)
        await generate(engine, "s" * (MIN_SHARED_TOKENS - 1) + "b" * 20)
        assert runner.reused == []
        await generate(engine, "s" * MIN_SHARED_TOKENS + "c" * 20)
        await generate(engine, "s" * MIN_SHARED_TOKENS + "d" * 20)
    assert runner.reused == [("cache", MIN_SHARED_TOKENS)]


# --- at the same time -----------------------------------------------------------------------------------------------


async def test_a_prefix_shared_by_eight_concurrent_requests_is_computed_once() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner, max_prompt_tokens_per_step=50, max_undelivered=10**6, **WITH_CACHE) as engine:
        tasks = [await begin(engine, SYSTEM + c * 5, c) for c in "abcdefgh"]
        runner.gate.set()
        answers = await asyncio.gather(*tasks)
    assert [source for source, _ in runner.reused] == ["slot"] * 7
    assert num_computed(runner.steps) == len(SYSTEM) + 8 * (5 + 4)
    assert all(prompt_tokens_reported(deltas) == len(SYSTEM) + 5 for deltas in answers)


async def test_a_new_request_copies_the_prefix_of_a_generating_one() -> None:
    runner = ScriptedRunner()
    async with running(runner, max_undelivered=3, **WITH_CACHE) as engine:
        other = stream(engine, SYSTEM + "a", "a", 500)
        await anext(other)
        assert text(await generate(engine, SYSTEM + "b")) == text(await generate(engine, SYSTEM + "b"))
        await other.aclose()
    assert runner.reused == [("slot", len(SYSTEM))] * 2


class FailingRunner(ScriptedRunner):
    """The third step fails."""

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        if len(self.steps) == 2:
            self.steps.append(tuple(inputs))
            raise MemoryError
        return super().step(inputs)


@pytest.mark.parametrize("what", ["closes", "fails", "is preempted"])
async def test_a_request_that_waits_for_an_abandoned_prefill_computes_the_prefix_itself(what: str) -> None:
    runner = FailingRunner() if what == "fails" else ScriptedRunner()
    runner.gate.clear()
    async with running(runner, max_prompt_tokens_per_step=20, **WITH_CACHE) as engine:
        first = stream(engine, SYSTEM + "a", "a", 5)
        reader = asyncio.create_task(anext(first))
        await until(lambda: runner.open_slots)
        second = await begin(engine, SYSTEM + "b", "b")
        preempted = asyncio.create_task(engine.preempt("a")) if what == "is preempted" else None
        await asyncio.sleep(0)
        runner.gate.set()
        await reader
        if what == "closes":
            await first.aclose()
        assert text(await second) == text(await generate(engine, SYSTEM + "b"))
        if what == "fails":
            with pytest.raises(EngineError):
                _ = [delta async for delta in first]
        if preempted:
            await preempted
            engine.resume("a")
            assert len([delta async for delta in first if delta.num_tokens]) == 5
        await first.aclose()


async def test_without_a_prefix_cache_nothing_is_shared_and_no_request_waits() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner, prefix_cache_bytes=0, max_prompt_tokens_per_step=300) as engine:
        tasks = [await begin(engine, SYSTEM + c, c) for c in "abc"]
        runner.gate.set()
        await asyncio.gather(*tasks)
        await generate(engine, SYSTEM + "a")
        assert (engine.stats().num_cached_sequences, engine.stats().reused_prompt_tokens) == (0, 0)
    assert runner.reused == []
    assert num_computed(runner.steps) == 4 * (201 + 4)


async def test_indivisible_state_is_not_shared_but_restored_after_a_preemption() -> None:
    runner = ScriptedRunner(supports_partial_prefix=False)
    async with running(runner, max_undelivered=3, **WITH_CACHE) as engine:
        preempted = stream(engine, SYSTEM, "a", 20)
        deltas = [await anext(preempted)]
        await engine.preempt("a")
        assert engine.stats().num_cached_sequences == 1
        await generate(engine, SYSTEM + "bb")
        assert runner.reused == []
        engine.resume("a")
        deltas += [delta async for delta in preempted]
        assert engine.stats().num_cached_sequences == 0
    assert [source for source, _ in runner.reused] == ["cache"]
    assert len(deltas) == 20


# --- slots ----------------------------------------------------------------------------------------------------------


async def test_new_requests_wait_in_order_until_a_slot_is_free() -> None:
    runner = ScriptedRunner(max_slots=2)
    runner.gate.clear()
    most_open: list[int] = []
    step = runner.step

    def counted(inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        most_open.append(len(runner.open_slots))
        return step(inputs)

    runner.step = counted  # type: ignore[method-assign]
    async with running(runner, itl_target_s=inf) as engine:
        tasks = [await begin(engine, c, c, max_new_tokens=3 + n) for n, c in enumerate("abcde")]
        runner.gate.set()
        answers = await asyncio.gather(*tasks)
    assert [sum(d.num_tokens for d in deltas) for deltas in answers] == [3, 4, 5, 6, 7]
    assert max(most_open) == 2
    firsts = [runner.sampled_in[c][0] for c in "abcde"]
    assert firsts == sorted(firsts)


async def test_a_resumed_generation_waits_for_a_slot_too() -> None:
    runner = ScriptedRunner(max_slots=1)
    async with running(runner, max_undelivered=3, **WITH_CACHE) as engine:
        preempted = stream(engine, "a", "a", 20)
        deltas = [await anext(preempted)]
        await engine.preempt("a")
        other = stream(engine, "b", "b", 500)
        await anext(other)
        engine.resume("a")
        for _ in range(20):
            await anext(other)
        await other.aclose()
        deltas += [delta async for delta in preempted]
    assert text(deltas) == "".join(chr(counting((ord("a"),), n)) for n in range(20))


# --- failures -------------------------------------------------------------------------------------------------------


async def test_the_state_of_a_failed_request_is_not_cached() -> None:
    def rule(prompt: tuple[int, ...], n: int) -> int | Exception:
        return ArithmeticError("NaN") if n == 3 and prompt[-1] == ord("!") else counting(prompt, n)

    runner = ScriptedRunner(rule)
    async with running(runner, **WITH_CACHE) as engine:
        with pytest.raises(EngineError):
            await generate(engine, SYSTEM + "!")
        assert engine.stats().num_cached_sequences == 0
        await generate(engine, SYSTEM)
    assert runner.reused == []


class UnloadableRunner(ScriptedRunner):
    """Saved state cannot be loaded."""

    def load(self, slot: int, saved: SavedTokens, num_tokens: int) -> None:
        raise MemoryError("no room")


async def test_state_that_cannot_be_loaded_ends_that_request_only_and_frees_its_slot() -> None:
    """It was given a second slot in the same plan, which was never released."""
    runner = UnloadableRunner()
    async with running(runner, max_undelivered=3, **WITH_CACHE) as engine:
        other = stream(engine, "n", "n", 500)
        deltas = [await anext(other)]
        preempted = stream(engine, SYSTEM, "a", 20)
        await anext(preempted)
        await engine.preempt("a")
        engine.resume("a")
        with pytest.raises(EngineError, match="no room"):
            _ = [delta async for delta in preempted]
        deltas += [await anext(other) for _ in range(20)]
        assert engine.stats().num_slots == len(runner.open_slots) == 1
        await other.aclose()
    assert text(deltas) == "".join(chr(counting((ord("n"),), n)) for n in range(21))


class UnsavableRunner(ScriptedRunner):
    def save(self, slot: int) -> SavedTokens:
        raise MemoryError("no room")


async def test_state_that_cannot_be_saved_is_computed_again() -> None:
    runner = UnsavableRunner()
    async with running(runner, max_undelivered=3, **WITH_CACHE) as engine:
        preempted = stream(engine, SYSTEM, "a", 20)
        deltas = [await anext(preempted)]
        await engine.preempt("a")
        engine.resume("a")
        deltas += [delta async for delta in preempted]
        assert engine.stats().num_cached_sequences == 0
    assert runner.reused == []
    assert len(deltas) == 20
    assert prompt_tokens_reported(deltas) == len(SYSTEM), "reported once, although computed twice"


@pytest.mark.parametrize("token_id", [2**63, 2**70, -(2**64)])
async def test_a_token_id_beyond_64_bits_fails_that_request_only(token_id: int) -> None:
    runner = ScriptedRunner()
    async with running(runner, max_undelivered=3, **WITH_CACHE) as engine:
        other = stream(engine, "n", "n", 500)
        await anext(other)
        prompt = PreparedPrompt((*[1] * 30, token_id))
        with pytest.raises(EngineError):
            _ = [delta async for delta in engine.stream(GenerationRequest("r", prompt, SamplingParams()))]
        for _ in range(20):
            await anext(other)
        await other.aclose()


# --- figures for operators ------------------------------------------------------------------------------------------


async def test_stats_count_prompt_tokens_reused_tokens_and_cached_sequences() -> None:
    runner = ScriptedRunner()
    async with running(runner, max_undelivered=3, **WITH_CACHE) as engine:
        assert (engine.stats().num_slots, engine.stats().prompt_tokens) == (0, 0)
        await generate(engine, SYSTEM + "a")
        stats = engine.stats()
        assert stats.is_batched
        assert stats.slow_because == ""
        assert (stats.prompt_tokens, stats.reused_prompt_tokens) == (201, 0)
        assert (stats.num_cached_sequences, stats.prefix_cache_bytes) == (1, 205)
        other = stream(engine, SYSTEM + "b", "b", 500)
        await anext(other)
        stats = engine.stats()
        assert (stats.num_slots, stats.prompt_tokens, stats.reused_prompt_tokens) == (1, 402, 200)
        await other.aclose()
        assert engine.stats().num_slots == 0
        await engine.stop()
        assert (engine.stats().num_cached_sequences, engine.stats().prefix_cache_bytes) == (0, 0), (
            "the prefix cache is released"
        )


@pytest.mark.parametrize("prefix_cache_bytes", [0, 10**6])
async def test_tokens_computed_again_after_a_preemption_are_counted_once(prefix_cache_bytes: int) -> None:
    async with running(ScriptedRunner(), max_undelivered=3, prefix_cache_bytes=prefix_cache_bytes) as engine:
        preempted = stream(engine, SYSTEM, "a", 20)
        deltas = [await anext(preempted)]
        for _ in range(3):
            await engine.preempt("a")
            engine.resume("a")
            deltas.append(await anext(preempted))
        deltas += [delta async for delta in preempted]
        assert prompt_tokens_reported(deltas) == engine.stats().prompt_tokens == len(SYSTEM)
        assert engine.stats().reused_prompt_tokens == 0, "its own tokens do not count as reused"
        assert deltas[-1].usage == Usage(len(SYSTEM), 20)


async def test_a_step_that_does_not_end_makes_the_engine_unhealthy_until_it_does() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner, step_timeout_s=0.01) as engine:
        task = asyncio.create_task(generate(engine, "a"))
        await until(lambda: not engine.health().is_ready)
        assert "a step has not ended" in engine.health().detail
        runner.gate.set()
        await task
        await until(lambda: engine.health().is_ready)
