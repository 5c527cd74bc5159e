"""One token per generation and step, while requests start, disconnect, lag or fail."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from collections.abc import Sequence as SequenceOf
from contextlib import aclosing
from math import inf

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.loop import StepLoop
from chatstream.engines.batching.model import LoadedModel
from chatstream.engines.batching.prompt_budget import PromptBudget
from chatstream.engines.batching.sequence import Sequence
from chatstream.engines.thread.handover import DeltaBuffer
from chatstream.errors import ConfigError, EngineError, EngineUnavailable, InvalidRequest, PromptTooLong
from chatstream.testing import check_engine
from chatstream.types import (
    FinishReason,
    GenerationRequest,
    Message,
    PreparedPrompt,
    SamplingParams,
    TokenDelta,
    Usage,
)
from tests.engines.batching.scripted import (
    EOS,
    CharCodec,
    CharDecoder,
    Panic,
    ScriptedRunner,
    advanced,
    begin,
    counting,
    generate,
    prefill_inputs,
    running,
    scripted_engine,
    text,
    until,
    use,
)

pytestmark = pytest.mark.anyio


async def test_it_keeps_the_contract_of_engines() -> None:
    await check_engine(scripted_engine(ScriptedRunner()))


async def test_a_single_request_gets_its_answer_and_usage() -> None:
    runner = ScriptedRunner()
    async with running(runner) as engine:
        deltas = await generate(engine, "a")
    assert text(deltas) == "".join(chr(counting((ord("a"),), n)) for n in range(5))
    assert deltas[-1] == TokenDelta(deltas[-1].text, 1, FinishReason.LENGTH, Usage(1, 5))


async def test_the_end_token_ends_the_answer_and_is_not_part_of_it() -> None:
    async with running(ScriptedRunner(lambda p, n: ord("x") if n < 2 else EOS)) as engine:
        deltas = await generate(engine, "a")
    assert text(deltas) == "xx"
    assert deltas[-1] == TokenDelta("", 0, FinishReason.STOP, Usage(1, 2))


async def test_a_step_advances_every_generation_by_exactly_one_token() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        tasks = [await begin(engine, c, c, max_new_tokens=20) for c in "abc"]
        runner.gate.set()
        await asyncio.gather(*tasks)
    counts = dict.fromkeys(range(3), 0)
    for step in runner.steps:
        for slot in advanced(step):
            counts[slot] += 1
        live = [count for count in counts.values() if 0 < count < 20]
        assert not live or max(live) - min(live) <= 2  # they started one after the other
    assert counts == {0: 20, 1: 20, 2: 20}


@settings(max_examples=30, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 30), min_size=2, max_size=5),
    prompts=st.lists(st.integers(1, 40), min_size=5, max_size=5),
    chunk=st.integers(1, 16),
)
def test_two_generations_never_drift_apart_by_more_than_one_token(
    lengths: list[int], prompts: list[int], chunk: int
) -> None:
    runner = ScriptedRunner()

    async def run() -> None:
        async with running(runner, max_prompt_tokens_per_step=chunk) as engine:
            await asyncio.gather(
                *(generate(engine, chr(97 + n) * prompts[n], f"r{n}", max_new_tokens=m) for n, m in enumerate(lengths))
            )

    asyncio.run(run())
    for n, length in enumerate(lengths):
        steps = runner.sampled_in[chr(97 + n)]
        assert steps == list(range(steps[0], steps[0] + length)), "a step skipped it"
    for step in runner.steps:
        prompt_tokens = sum(len(item.token_ids) for item in step) - len(advanced(step))
        assert prompt_tokens <= chunk


async def test_a_long_prompt_is_computed_in_chunks_while_others_generate() -> None:
    runner = ScriptedRunner(context_len=10**9)
    async with running(runner, max_prompt_tokens_per_step=10, itl_target_s=inf, max_undelivered=10**9) as engine:
        params = SamplingParams()
        async with aclosing(
            engine.stream(GenerationRequest("a", await engine.prepare("a", params), params))
        ) as endless:
            reader = asyncio.create_task(read_all(endless))
            await until(lambda: runner.steps)
            await generate(engine, "b" * 95, "late", max_new_tokens=3)
            reader.cancel()
            await asyncio.gather(reader, return_exceptions=True)
    assert [len(item.token_ids) for item in prefill_inputs(runner, 1)] == [10] * 9 + [5]
    assert all(0 in advanced(step) for step in runner.steps if any(item.slot == 1 for item in step))


async def read_all(stream: AsyncIterator[TokenDelta]) -> None:
    async for _ in stream:
        pass


async def test_the_model_runs_in_its_own_thread_and_does_not_block_the_event_loop() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner) as engine:
        task = asyncio.create_task(generate(engine, "a"))
        await until(lambda: runner.open_slots)
        for _ in range(100):
            await asyncio.sleep(0)  # the event loop runs while the model hangs in a step
        runner.gate.set()
        await task
    assert runner.threads == {"chatstream-engine"}


async def test_a_closed_stream_frees_its_slot_within_one_step() -> None:
    runner = ScriptedRunner()
    async with running(runner) as engine:
        params = SamplingParams(max_new_tokens=900)
        stream = engine.stream(GenerationRequest("a", await engine.prepare("a", params), params))
        await anext(stream)
        await stream.aclose()
        assert not runner.open_slots  # before aclose returned
        num_steps = len(runner.steps)
        await generate(engine, "b")
        assert {item.slot for step in runner.steps[num_steps:] for item in step} == {0}


async def test_a_stream_cancelled_during_prefill_frees_its_slot() -> None:
    runner = ScriptedRunner()
    runner.gate.clear()
    async with running(runner, max_prompt_tokens_per_step=1) as engine:
        task = asyncio.create_task(generate(engine, "a" * 500, max_new_tokens=1))
        await until(lambda: runner.open_slots)
        task.cancel()
        await asyncio.sleep(0)
        runner.gate.set()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not runner.open_slots
        assert len(runner.steps) < 500


async def test_a_reader_that_lags_pauses_its_own_generation_only() -> None:
    runner = ScriptedRunner()
    async with running(runner, max_undelivered=4) as engine:
        params = SamplingParams(max_new_tokens=100)
        async with aclosing(engine.stream(GenerationRequest("a", await engine.prepare("a", params), params))) as slow:
            await anext(slow)
            assert len(await generate(engine, "b", max_new_tokens=50)) == 50
            steps_of_slow = sum(item.slot == 0 for step in runner.steps for item in step)
            assert steps_of_slow <= 5
            rest = [delta async for delta in slow]
    assert len(rest) == 99  # it continued without a gap


async def test_an_exception_in_place_of_a_token_ends_that_request_only() -> None:
    def rule(prompt: tuple[int, ...], n: int) -> int | Exception:
        return ValueError("nan") if prompt == (ord("!"),) and n == 2 else counting(prompt, n)

    async with running(ScriptedRunner(rule)) as engine:
        results = await asyncio.gather(
            generate(engine, "!", "bad"), generate(engine, "a", "good"), return_exceptions=True
        )
        assert isinstance(results[0], EngineError)
        assert not isinstance(results[1], BaseException)
        assert len(await generate(engine, "a")) == 5


async def test_a_failed_step_ends_its_requests_and_the_next_request_works() -> None:
    def rule(prompt: tuple[int, ...], n: int) -> int:
        if prompt == (ord("!"),):
            raise MemoryError("out of memory")
        return counting(prompt, n)

    async with running(ScriptedRunner(rule)) as engine:
        with pytest.raises(EngineError, match="out of memory"):
            await generate(engine, "!")
        assert len(await generate(engine, "a")) == 5


async def test_stop_strings_end_the_answer_across_tokens() -> None:
    async with running(ScriptedRunner(lambda p, n: ord("abcdefgh"[n]))) as engine:
        deltas = await generate(engine, "x", stop=("cd",), max_new_tokens=8)
    assert text(deltas) == "ab"
    assert deltas[-1].finish_reason == FinishReason.STOP
    assert deltas[-1].usage == Usage(1, 4)


async def test_an_answer_ends_when_the_context_is_full() -> None:
    async with running(ScriptedRunner(context_len=10)) as engine:
        deltas = await generate(engine, "abcdef", max_new_tokens=None)
    assert (len(deltas), deltas[-1].finish_reason) == (4, FinishReason.LENGTH)


async def test_a_seed_is_always_set_for_the_runner() -> None:
    runner = ScriptedRunner()
    async with running(runner) as engine:
        await generate(engine, "a", seed=7)
        assert runner.sampling[-1].seed == 7
        await generate(engine, "a")
        assert isinstance(runner.sampling[-1].seed, int)
        assert runner.sampling[-1].seed != 7


# --- prompts --------------------------------------------------------------------------------------------------------


async def prepare(engine: StepEngine, prompt: str | tuple[Message, ...], max_new_tokens: int, **options: bool):  # type: ignore[no-untyped-def]
    return await engine.prepare(prompt, SamplingParams(max_new_tokens=max_new_tokens), **options)


async def test_a_prompt_that_does_not_fit_with_its_answer_is_refused_with_the_numbers() -> None:
    async with running(ScriptedRunner(context_len=20)) as engine:
        await prepare(engine, "x" * 10, 10)
        with pytest.raises(PromptTooLong, match="11 tokens; with 10 to generate, at most 10 fit the context of 20"):
            await prepare(engine, "x" * 11, 10)


@pytest.mark.parametrize("prompt", ["x", (Message("user", "x"),)], ids=["text", "conversation"])
@pytest.mark.parametrize("may_drop_history", [True, False])
async def test_an_answer_that_fills_the_context_is_refused_as_max_new_tokens(
    prompt: str | tuple[Message, ...], may_drop_history: bool
) -> None:
    async with running(ScriptedRunner(context_len=20)) as engine:
        for wanted in (20, 100_000):
            message = f"an answer of {wanted} tokens leaves no room for a prompt in the context of 20"
            with pytest.raises(PromptTooLong, match=message) as caught:
                await prepare(engine, prompt, wanted, may_drop_history=may_drop_history)
            assert caught.value.param == "max_new_tokens"


async def test_an_empty_prompt_is_refused() -> None:
    async with running(ScriptedRunner()) as engine:
        with pytest.raises(InvalidRequest, match="empty"):
            await prepare(engine, "", 1)


async def test_messages_that_the_template_refuses_are_an_invalid_request() -> None:
    async with running(ScriptedRunner()) as engine:
        with pytest.raises(InvalidRequest, match="template"):
            await prepare(engine, (Message("user", "unspeakable"),), 1)


def conversation(turns: int) -> tuple[Message, ...]:
    messages = [Message("system", "S")]
    for n in range(turns):
        messages += [Message("user", f"q{n}"), Message("assistant", f"r{n}")]
    return (*messages, Message("user", "last"))


@pytest.mark.parametrize("context_len", range(23, 90))
async def test_history_loses_its_oldest_turns_and_nothing_else(context_len: int) -> None:
    whole = conversation(5)
    async with running(ScriptedRunner(context_len=context_len)) as engine:
        prepared = await prepare(engine, whole, 10, may_drop_history=True)
        kept = prepared.messages
        assert kept[0] == whole[0]
        assert kept[1:] == whole[1 + prepared.dropped_messages :]
        assert kept[1].role == "user"
        assert len(prepared.token_ids) <= context_len - 10
        if prepared.dropped_messages:  # one more turn would not fit
            more = (whole[0], *whole[prepared.dropped_messages - 1 :])
            with pytest.raises(PromptTooLong):
                await prepare(engine, more, 10)


async def test_history_is_dropped_only_on_request_and_the_last_message_never() -> None:
    async with running(ScriptedRunner(context_len=20)) as engine:
        with pytest.raises(PromptTooLong):
            await prepare(engine, conversation(5), 10)
        with pytest.raises(PromptTooLong):
            await prepare(engine, (*conversation(5)[:-1], Message("user", "x" * 30)), 10, may_drop_history=True)


# --- start and stop -------------------------------------------------------------------------------------------------


async def test_a_model_that_cannot_be_loaded_is_a_config_error() -> None:
    def load():  # type: ignore[no-untyped-def]
        raise OSError("no such file")

    engine = StepEngine("broken", load)
    with pytest.raises(ConfigError, match="cannot load broken: no such file"):
        await engine.start()
    assert "no such file" in engine.health().detail
    with pytest.raises(EngineUnavailable):
        await generate(engine, "a")


async def test_concurrent_starts_wait_for_the_same_load() -> None:
    gate = threading.Event()
    loads: list[str] = []

    def load() -> LoadedModel:
        loads.append("load")
        gate.wait()
        return LoadedModel(ScriptedRunner(), CharCodec())

    engine = StepEngine("slow", load)
    impatient = asyncio.create_task(engine.start())
    patient = asyncio.create_task(engine.start())
    await until(lambda: loads)
    impatient.cancel()
    await asyncio.gather(impatient, return_exceptions=True)
    assert not patient.done()
    assert not engine.health().is_ready
    gate.set()
    await patient
    assert loads == ["load"]
    assert len(await generate(engine, "a")) == 5
    await engine.stop()


async def test_a_panic_in_a_step_is_an_error_and_the_engine_stays_ready() -> None:
    def rule(prompt: tuple[int, ...], n: int) -> int:
        if prompt == (ord("!"),):
            raise Panic
        return counting(prompt, n)

    async with running(ScriptedRunner(rule)) as engine:
        with pytest.raises(EngineUnavailable):
            await generate(engine, "!")
        assert len(await generate(engine, "a")) == 5
        assert engine.health().is_ready


async def test_a_prompt_that_can_never_fit_is_refused_before_it_is_tokenised() -> None:
    class Expensive(CharCodec):
        def encode_chat(self, messages: SequenceOf[Message]) -> list[int]:
            raise AssertionError("it was tokenised")

    engine = StepEngine("x", lambda: LoadedModel(ScriptedRunner(context_len=20), Expensive()))
    await engine.start()
    for may_drop in (False, True):
        with pytest.raises(PromptTooLong, match="1281 characters"):
            await prepare(engine, (Message("user", "x" * 1281),), 1, may_drop_history=may_drop)
    await engine.stop()


async def test_open_streams_end_when_the_engine_stops() -> None:
    runner = ScriptedRunner()
    engine = scripted_engine(runner)
    await engine.start()
    task = asyncio.create_task(generate(engine, "a", max_new_tokens=900))
    await until(lambda: runner.steps)
    await engine.stop()
    with pytest.raises(EngineUnavailable):
        await task
    assert not runner.open_slots
    await engine.start()
    assert len(await generate(engine, "a")) == 5
    await engine.stop()


async def test_a_stream_can_be_closed_after_the_engine_has_stopped() -> None:
    runner = ScriptedRunner()
    engine = scripted_engine(runner)
    await engine.start()
    params = SamplingParams(max_new_tokens=900)
    stream = engine.stream(GenerationRequest("a", await engine.prepare("a", params), params))
    await anext(stream)
    await engine.stop()
    async with asyncio.timeout(5):
        await stream.aclose()


@pytest.mark.parametrize("option", ["max_prompt_tokens_per_step", "max_undelivered", "itl_target_s", "step_timeout_s"])
def test_impossible_settings_are_refused_by_name(option: str) -> None:
    with pytest.raises(ConfigError, match=option):
        scripted_engine(ScriptedRunner(), **{option: 0})


class PanicsAt(CharCodec, CharDecoder):
    """A codec and its decoders that panic at one character."""

    def __init__(self, character: str) -> None:
        self.character = character

    def open_decoder(self) -> PanicsAt:
        return self

    def push(self, token_id: int) -> str:
        if chr(token_id) == self.character:
            raise Panic
        return chr(token_id)


async def test_a_panic_over_one_token_does_not_affect_other_requests_of_the_step() -> None:
    runner = ScriptedRunner(lambda prompt, n: ord("!") if prompt == (ord("b"),) and n == 2 else ord("x"))
    runner.gate.clear()
    engine = StepEngine("scripted", lambda: LoadedModel(runner, PanicsAt("!")), itl_target_s=inf)
    async with use(engine, runner):
        first = asyncio.create_task(generate(engine, "-", "first", max_new_tokens=1))
        await until(lambda: runner.open_slots)
        others = [await begin(engine, c, c, max_new_tokens=n) for c, n in (("a", 3), ("b", 9), ("c", 9))]
        runner.gate.set()
        await first
        a, b, c = await asyncio.gather(*others, return_exceptions=True)
    assert isinstance(b, EngineError)
    assert isinstance(a, list)
    assert isinstance(c, list)
    assert text(a) == "xxx"
    assert text(c) == "x" * 9
    assert advanced(runner.steps[3]) == [0, 1, 2]  # the last token of a came in the step in which b panicked


async def test_inputs_are_in_slot_order_whatever_the_order_of_arrival() -> None:
    runner = ScriptedRunner()
    model = LoadedModel(runner, CharCodec())
    loop = StepLoop(PromptBudget(512, inf))
    loop.set_model(model)

    def join(name: str, max_new_tokens: int) -> None:
        params = SamplingParams(max_new_tokens=max_new_tokens)
        request = GenerationRequest(name, PreparedPrompt((ord(name),)), params)
        loop.add(Sequence(request, model, DeltaBuffer(asyncio.get_running_loop(), 64, lambda: None)))

    for name, max_new_tokens in (("a", 2), ("b", 9), ("c", 2), ("d", 9)):
        join(name, max_new_tokens)
    for _ in range(2):
        loop.run_step()
    join("e", 9)  # into the slot of a
    join("f", 9)  # and of c
    for _ in range(2):
        loop.run_step()
    assert [item.slot for item in runner.steps[-1]] == [0, 1, 2, 3]
    loop.end_all(EngineUnavailable("it is over"))


async def test_a_stream_first_read_after_stop_raises_engine_unavailable() -> None:
    runner = ScriptedRunner()
    engine = scripted_engine(runner)
    await engine.start()
    params = SamplingParams(max_new_tokens=5)
    stream = engine.stream(GenerationRequest("r", await engine.prepare("a", params), params))
    await engine.stop()
    with pytest.raises(EngineUnavailable):
        await anext(stream)
