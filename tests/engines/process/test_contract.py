"""An engine in a child process keeps the contract of `chatstream.engines.base`."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from pickle import PicklingError

import pytest

from chatstream import ChatStream
from chatstream.engines import demo
from chatstream.engines.base import Engine, EngineHealth, EngineStats
from chatstream.engines.process import ProcessEngine
from chatstream.engines.process.channel import MAX_UNREAD, Channel, Close, Resume
from chatstream.errors import ConfigError, EngineError, InvalidRequest, PromptTooLong, UnsupportedParameter
from chatstream.testing import FakeEngine, check_engine
from chatstream.types import GenerationRequest, Message, PreparedPrompt, SamplingParams, TokenDelta, TokenMask
from tests.engines.process.steered import Steered, batched, generate, numbers, request, running, unpicklable, until

pytestmark = pytest.mark.anyio

QUESTION = (Message("user", "What is a slot?"),)


@pytest.mark.parametrize("recipe", [demo.create_engine, partial(FakeEngine, ("a", "b", "c") * 3, step_s=0.002)])
async def test_an_engine_keeps_its_contract_in_another_process(recipe: object) -> None:
    async with asyncio.timeout(60):
        await check_engine(ProcessEngine(recipe))  # type: ignore[arg-type]


async def answers(engine: Engine) -> list[str]:
    async def answer(seed: int) -> str:
        sampling = SamplingParams(seed=seed, max_new_tokens=20)
        prompt = await engine.prepare(QUESTION, sampling)
        return "".join([delta.text async for delta in engine.stream(GenerationRequest(str(seed), prompt, sampling))])

    await engine.start()
    try:
        assert engine.default_sampling.max_new_tokens is not None
        return await asyncio.gather(*map(answer, range(4)))
    finally:
        await engine.stop()


async def test_the_answers_are_those_of_the_same_engine_in_a_thread() -> None:
    assert await answers(ProcessEngine(demo.create_engine)) == await answers(demo.create_engine())


# --- name, capacity, health, stats --------------------------------------------------------------------------------


async def test_the_name_is_known_before_the_start_and_the_capacity_after_it(tmp_path: Path) -> None:
    engine = ProcessEngine(partial(Steered, str(tmp_path)))
    assert engine.model_name == "steered"
    assert (engine.health().is_ready, engine.health().detail) == (False, "not started")
    loading = asyncio.create_task(engine.start())
    await asyncio.sleep(0)
    assert (engine.health().is_ready, engine.health().detail) == (False, "loading")
    await asyncio.gather(loading, engine.start())
    assert engine.health().is_ready
    assert engine.capacity.context_len == 1000
    assert engine.default_sampling.max_new_tokens == 7
    await engine.stop()
    assert (engine.health().is_ready, engine.health().detail) == (False, "stopped")


async def test_health_reports_the_progress_of_a_load_and_of_a_reload(tmp_path: Path) -> None:
    (tmp_path / "loading").touch()
    engine = ProcessEngine(partial(Steered, str(tmp_path)))
    loading = asyncio.create_task(engine.start())
    await until(lambda: engine.health().detail == "loading: reading, 43%")
    (tmp_path / "loading").unlink()
    await loading
    assert engine.health() == EngineHealth(is_ready=True)
    (tmp_path / "loading").touch()
    assert engine.pid is not None
    os.kill(engine.pid, signal.SIGKILL)
    await until(lambda: "43%" in engine.health().detail)
    assert engine.health().detail.startswith("steered failed: its process was killed by SIGKILL")
    assert engine.health().detail.endswith("it is being loaded again; loading: reading, 43%")
    await engine.stop()


async def test_the_stats_of_the_engine_arrive_with_the_heartbeat() -> None:
    async with running(ProcessEngine(demo.create_engine)) as engine:
        await until(engine.stats)
        assert engine.stats() == EngineStats(
            num_cached_sequences=0, prefix_cache_bytes=0, prompt_tokens=0, reused_prompt_tokens=0
        )
        for _ in range(2):
            await generate(engine, "What is a slot? " * 5)
        await until(lambda: engine.stats() and engine.stats().prompt_tokens)  # type: ignore[union-attr]
        stats = engine.stats()
        assert stats is not None
        assert stats.is_batched
        assert stats.reused_prompt_tokens
        assert stats.prompt_tokens
        assert stats.reused_prompt_tokens < stats.prompt_tokens
        assert stats.num_cached_sequences
        assert stats.prefix_cache_bytes
    assert engine.stats() is None


async def test_an_engine_without_stats_has_none_in_a_child_process(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await generate(engine, "3")
        assert engine.stats() is None


def recipe_of_the_script() -> Engine:
    raise AssertionError("the recipe must not be called")


@pytest.mark.parametrize("recipe", [recipe_of_the_script, partial(recipe_of_the_script)])
def test_a_recipe_defined_in_the_main_script_is_refused(recipe: partial[Engine]) -> None:
    recipe_of_the_script.__module__ = "__main__"
    with pytest.raises(ConfigError, match="function of an importable module"):
        ProcessEngine(recipe)


def test_a_recipe_that_cannot_be_pickled_is_refused_in_one_line() -> None:
    with pytest.raises(ConfigError, match="cannot be created in a child process") as refusal:
        ProcessEngine(lambda: demo.create_engine())
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": object(), "tokenizer": object()}, "a loaded model cannot move to a child process"),
        ({"use_mock_response": True}, "engine_in is for models"),
        ({"engine": FakeEngine()}, "engine_in is for models"),
    ],
)
def test_a_model_or_engine_of_this_process_cannot_move_to_a_child_process(
    settings: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ChatStream(engine_in="process", **settings)  # type: ignore[arg-type]


def test_engine_in_is_thread_or_process() -> None:
    assert isinstance(ChatStream(engine_in="process").engine, ProcessEngine)
    assert not isinstance(ChatStream().engine, ProcessEngine)
    with pytest.raises(ConfigError, match="must be one of thread, process, not 'elsewhere'"):
        ChatStream(engine_in="elsewhere")  # type: ignore[arg-type]


# --- errors -------------------------------------------------------------------------------------------------------


async def test_an_error_keeps_its_class_message_and_parameter() -> None:
    engine = ProcessEngine(demo.create_engine)
    await engine.start()
    with pytest.raises(PromptTooLong) as in_child:
        await engine.prepare("long " * 10_000, SamplingParams())
    await engine.stop()
    local = demo.create_engine()
    await local.start()
    with pytest.raises(PromptTooLong) as in_thread:
        await local.prepare("long " * 10_000, SamplingParams())
    await local.stop()
    assert vars(in_child.value) == vars(in_thread.value)


async def test_a_hundred_bad_requests_in_a_row_harm_no_other_request(tmp_path: Path) -> None:
    (tmp_path / "block").touch()
    async with running(tmp_path) as engine:
        good = asyncio.create_task(generate(engine, "3 block 3", "good"))
        await until((tmp_path / "blocked").exists)
        for n in range(100):
            with pytest.raises(InvalidRequest, match="the template refuses this") as refusal:
                await request(engine, "refused")
            assert refusal.value.param == "messages"
            empty = GenerationRequest(f"bad {n}", PreparedPrompt(), SamplingParams())
            with pytest.raises(EngineError, match="the engine failed: IndexError"):
                _ = [delta async for delta in engine.stream(empty)]
        (tmp_path / "block").unlink()
        assert len(numbers(await good)) == 6
        assert len(numbers(await generate(engine, "4"))) == 4


async def test_a_result_that_cannot_be_pickled_fails_only_its_own_request(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "block").touch()
    async with running(tmp_path) as engine:
        good = asyncio.create_task(generate(engine, "3 block 3", "good"))
        await until((tmp_path / "blocked").exists)
        with pytest.raises(EngineError, match="the engine failed: "):
            await request(engine, "unpicklable")
        with pytest.raises(EngineError, match="the engine failed: "):
            await generate(engine, "2 unpicklable 2", "bad")
        (tmp_path / "block").unlink()
        assert len(numbers(await good)) == 6
    assert caplog.text.count("unpicklable.<locals>.Local") == 2


class EveryToken:
    """A token mask that allows every token."""

    def __call__(self, generated_ids: Sequence[int], /) -> None:
        return None


class Text(str):
    __slots__ = ()


@pytest.fixture
def main_script_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the classes look defined in this process's main script: they pickle, but the child cannot import them."""
    for kind in (EveryToken, Text):
        monkeypatch.setattr(kind, "__module__", "__main__")
        monkeypatch.setattr(sys.modules["__main__"], kind.__name__, kind, raising=False)


async def masked(engine: ProcessEngine, mask: TokenMask) -> list[TokenDelta]:
    masked_request = replace(await request(engine, "3", "masked"), token_mask=mask)
    return [delta async for delta in engine.stream(masked_request)]


async def test_a_token_mask_reaches_the_engine(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        assert len(numbers(await masked(engine, EveryToken()))) == 3


@pytest.mark.usefixtures("main_script_classes")
async def test_a_token_mask_or_prompt_that_cannot_be_sent_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "block").touch()
    async with running(tmp_path) as engine:
        pid = engine.pid
        good = asyncio.create_task(generate(engine, "3 block 3", "good"))
        await until((tmp_path / "blocked").exists)
        for mask in (EveryToken(), lambda ids: None):
            with pytest.raises(UnsupportedParameter, match="this token_mask cannot be sent") as refusal:
                await masked(engine, mask)
            assert refusal.value.param == "token_mask"
        for text in (Text("3"), unpicklable()):
            with pytest.raises(UnsupportedParameter, match="this prompt cannot be sent") as refusal:
                await request(engine, text)
            assert refusal.value.param == "prompt"
        (tmp_path / "block").unlink()
        assert len(numbers(await good)) == 6
        assert engine.pid == pid


async def test_log_records_of_the_child_are_logged_by_the_parent(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "warn").touch()
    async with running(tmp_path) as engine:
        await generate(engine, "warn 1")
        with pytest.raises(EngineError):
            await generate(engine, "")
    assert ("chatstream.steered", logging.WARNING, "a warning of steered") in caplog.record_tuples
    (failure,) = (record.message for record in caplog.records if record.levelno == logging.ERROR)
    assert "Traceback" in failure
    assert failure.endswith("ValueError: at least one command is needed")


# --- readers ------------------------------------------------------------------------------------------------------


async def test_a_stalled_reader_pauses_its_own_generation_and_no_other(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        slow = engine.stream(await request(engine, "500", "slow"))
        deltas = [await anext(slow)]
        last_of_other = numbers(await generate(engine, "500", "other"))[-1]
        deltas += [delta async for delta in slow]
        made = numbers(deltas)
        assert len(made) == 500
        assert sum(number < last_of_other for number in made) <= MAX_UNREAD + 1
        assert made == sorted(made)


async def test_deltas_made_before_a_preempt_can_be_read_by_a_reader_that_lags_far_behind() -> None:
    """They exceed `MAX_UNREAD`: the engine buffers as many again."""
    async with running(ProcessEngine(batched)) as engine:

        async def answer(prompt: str, num_tokens: int) -> AsyncGenerator[TokenDelta, None]:
            sampling = SamplingParams(max_new_tokens=num_tokens)
            prepared = await engine.prepare(prompt, sampling)
            async for delta in engine.stream(GenerationRequest(prompt, prepared, sampling)):
                yield delta

        deltas: list[TokenDelta] = []
        behind = answer("behind", 500)
        deltas.append(await anext(behind))
        assert len([delta async for delta in answer("other", 300)]) == 300
        preempting = asyncio.create_task(engine.preempt("behind"))
        await asyncio.sleep(0)
        preempting.cancel()  # cancelling the call does not undo the preemption
        assert len([delta async for delta in answer("other", 300)]) == 300
        reading = asyncio.create_task(collect(behind, deltas))
        for _ in range(500):
            await asyncio.sleep(0)
        num_read = len(deltas)
        assert MAX_UNREAD < num_read < 300
        assert len([delta async for delta in answer("other", 300)]) == 300
        assert len(deltas) == num_read
        engine.resume("behind")
        await reading
        assert len(deltas) == 500


async def collect(stream: AsyncGenerator[TokenDelta, None], deltas: list[TokenDelta]) -> None:
    async for delta in stream:
        deltas.append(delta)  # noqa: PERF401 - the test reads the list meanwhile


# --- the channel --------------------------------------------------------------------------------------------------


async def test_messages_sent_in_one_tick_arrive_in_one_tick() -> None:
    tick, received = 0, []
    done = asyncio.Event()

    def count_ticks() -> None:
        nonlocal tick
        tick += 1
        if not done.is_set():
            asyncio.get_running_loop().call_soon(count_ticks)

    sender_end, receiver_end = socket.socketpair()
    receiver = Channel(receiver_end, lambda message: received.append((tick, message)), lambda error: done.set())
    sender = Channel(sender_end, lambda message: None, lambda error: None)
    await receiver.open()
    await sender.open()
    count_ticks()
    sent = [Resume("x" * 1000 * n) for n in range(30)]  # more than a socket buffers
    for message in sent:
        sender.send(message)
    await until(lambda: len(received) == 30)
    assert [message for _, message in received] == sent
    assert len({tick for tick, _ in received}) == 1
    with pytest.raises((AttributeError, PicklingError)):
        sender.send(Resume(unpicklable()))
    sender.send(Close(1))
    sender.close()
    await done.wait()
    assert received[-1][1] == Close(1), "messages sent before the close arrive"
    receiver.abort()
