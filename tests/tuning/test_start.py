"""`max_concurrency="auto"`: measured at startup and cached. In virtual time."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pytest

from chatstream import ChatStream, Done, SchedulerSettings
from chatstream.errors import EngineUnavailable
from chatstream.scheduler import events as ev
from chatstream.scheduler.settings import AUTO_START
from chatstream.testing import FakeEngine, run_virtual
from chatstream.tuning.start import SECONDS, find_limit
from tests.tuning.machine import Machine


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def machine(**changes: Any) -> Machine:
    """Return a machine with steps of 20 + 5 n ms: a target of 100 ms allows 15 or 16 streams."""
    return Machine(lambda n: 0.02 + 0.005 * n, **changes)


def auto(engine: Any, **settings: Any) -> ChatStream:
    return ChatStream(engine=engine, scheduler=SchedulerSettings(max_concurrency="auto", **settings))


def run_without_threads(main: Coroutine[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Run `main` in virtual time, which has no threads: disk access blocks."""

    async def run_inline(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", run_inline)
    return run_virtual(main)


async def limit_after_start(chat_stream: ChatStream) -> int:
    async with chat_stream:
        return chat_stream.stats().max_concurrency


def test_the_measured_limit_is_the_initial_limit(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "chatstream")
    assert run_without_threads(limit_after_start(auto(machine())), monkeypatch) in (15, 16)
    lines = [record.getMessage() for record in caplog.records if "max_concurrency is" in record.getMessage()]
    assert len(lines) == 1
    assert "auto: measured: 1" in lines[0]
    assert "9 of 10 gaps between tokens within" in lines[0]


def test_the_next_start_uses_the_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatstream")
    first = run_without_threads(limit_after_start(auto(machine())), monkeypatch)
    again = machine()
    assert run_without_threads(limit_after_start(auto(again)), monkeypatch) == first
    assert again.prompts == []
    assert "auto: measured at an earlier start" in caplog.text


def test_a_cached_limit_does_not_exceed_the_current_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_without_threads(limit_after_start(auto(machine())), monkeypatch) > 5
    assert run_without_threads(limit_after_start(auto(machine(max_concurrency=5))), monkeypatch) == 5


def test_a_limit_from_a_failed_engine_is_used_but_not_cached(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The engine dies with two streams; its replacement has the full capacity."""
    caplog.set_level(logging.INFO, "chatstream")
    dying = machine(fails_with=lambda n: EngineUnavailable("its process has died") if n == 2 else None)
    assert run_without_threads(limit_after_start(auto(dying)), monkeypatch) == 1
    assert "More than 1 stream was not tried: the engine failed: its process has died." in caplog.text
    assert run_without_threads(limit_after_start(auto(machine())), monkeypatch) in (15, 16)


@pytest.mark.parametrize("change", [{"model_name": "another"}, {"speed_key": "another"}, {"context_len": 500}])
def test_another_model_is_measured_again(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    run_without_threads(limit_after_start(auto(machine())), monkeypatch)
    another = machine(**change)
    run_without_threads(limit_after_start(auto(another)), monkeypatch)
    assert another.prompts != []


def test_another_target_is_measured_again(monkeypatch: pytest.MonkeyPatch) -> None:
    assert run_without_threads(limit_after_start(auto(machine(), itl_target_s=0.0601)), monkeypatch) == 8
    assert run_without_threads(limit_after_start(auto(machine())), monkeypatch) in (15, 16)


def test_the_limit_is_at_least_the_minimum_and_at_most_the_capacity(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Machine(lambda n: 0.2 * n)
    assert run_without_threads(limit_after_start(auto(slow, min_concurrency=3)), monkeypatch) == 3
    small = Machine(lambda n: 0.01, max_concurrency=5, speed_key="another machine")
    assert run_without_threads(limit_after_start(auto(small)), monkeypatch) == 5


def test_an_engine_without_a_speed_key_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, fake = machine(speed_key=None), FakeEngine()
    assert run_without_threads(limit_after_start(auto(silent)), monkeypatch) == AUTO_START
    assert run_without_threads(limit_after_start(auto(fake)), monkeypatch) == AUTO_START
    assert (silent.prompts, fake.log) == ([], [])


def test_an_explicit_limit_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = machine()
    chat_stream = ChatStream(engine=engine, scheduler=SchedulerSettings(max_concurrency=3, adaptive="on"))
    assert run_without_threads(limit_after_start(chat_stream), monkeypatch) == 3
    assert engine.prompts == []


def test_an_engine_that_cannot_be_measured_starts_with_the_default(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Machine(lambda n: 10.0)
    assert run_without_threads(limit_after_start(auto(engine)), monkeypatch) == AUTO_START
    assert "the concurrency limit could not be measured" in caplog.text


def test_a_request_during_the_measurement_waits_for_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = machine()
        chat_stream = auto(engine)
        starting = asyncio.create_task(chat_stream.start_queue_worker())
        await asyncio.sleep(SECONDS / 2)
        asking = asyncio.create_task(answer(chat_stream))
        await asyncio.sleep(SECONDS / 4)
        assert (chat_stream.stats().running, chat_stream.stats().waiting) == (0, 1)
        assert chat_stream.not_ready_because() == "measuring max_concurrency"
        assert not starting.done()
        await starting
        assert asyncio.get_running_loop().time() <= SECONDS + 0.5
        assert chat_stream.not_ready_because() == ""
        assert await asking == 3
        await chat_stream.stop_queue_worker()

    run_without_threads(main(), monkeypatch)


async def answer(chat_stream: ChatStream) -> int:
    async for event in chat_stream.stream("Hello", max_new_tokens=3):
        if isinstance(event, Done):
            return event.usage.completion_tokens
    raise AssertionError("no end")


def test_adaptive_concurrency_continues_from_the_measured_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine becomes three times slower after the start: the limit falls, with a reason."""

    async def main() -> None:
        engine = machine()
        chat_stream = auto(engine, max_queue_size=100)
        moves: list[ev.LimitsChanged] = []
        chat_stream.observe(lambda event: moves.append(event) if isinstance(event, ev.LimitsChanged) else None)
        async with chat_stream:
            engine.step_s = lambda n: 0.06 + 0.015 * n
            asking = [asyncio.create_task(answer_long(chat_stream)) for _ in range(60)]
            await asyncio.gather(*asking)
        assert [move.by for move in moves[:2]] == ["auto", "adaptive"]
        assert moves[0].max_concurrency in (15, 16)
        assert moves[1].max_concurrency < moves[0].max_concurrency

    run_without_threads(main(), monkeypatch)


async def answer_long(chat_stream: ChatStream) -> None:
    async for _ in chat_stream.stream("Hello", max_new_tokens=100):
        pass


def test_a_limit_set_during_the_measurement_is_kept_across_restarts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        chat_stream = auto(machine())
        starting = asyncio.create_task(chat_stream.start_queue_worker())
        await asyncio.sleep(SECONDS / 2)
        chat_stream.set_limits(max_concurrency=2)
        await starting
        assert chat_stream.stats().max_concurrency == 2
        await chat_stream.drain()
        await chat_stream.start_queue_worker()
        assert chat_stream.stats().max_concurrency == 2
        await chat_stream.stop_queue_worker()

    run_without_threads(main(), monkeypatch)


def test_concurrent_starts_measure_once_and_a_restart_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = machine()
        chat_stream = auto(engine)
        await asyncio.gather(chat_stream.start_queue_worker(), chat_stream.start_queue_worker())
        assert asyncio.get_running_loop().time() <= SECONDS + 0.5
        asked, chosen = len(engine.prompts), chat_stream.stats().max_concurrency
        await chat_stream.drain()
        chat_stream.set_limits(max_concurrency=chosen + 1)
        await chat_stream.start_queue_worker()
        assert (len(engine.prompts), chat_stream.stats().max_concurrency) == (asked, chosen + 1)
        await chat_stream.stop_queue_worker()

    run_without_threads(main(), monkeypatch)


def test_a_cancelled_start_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = machine()
        chat_stream = auto(engine)
        starting = asyncio.create_task(chat_stream.start_queue_worker())
        await asyncio.sleep(SECONDS / 2)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting
        assert engine.num_active == 0
        assert not chat_stream.stats().is_open
        await chat_stream.stop_queue_worker()

    run_without_threads(main(), monkeypatch)


def test_a_drain_during_the_measurement_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        chat_stream = auto(machine())
        starting = asyncio.create_task(chat_stream.start_queue_worker())
        await asyncio.sleep(SECONDS / 2)
        chat_stream.start_drain()
        await starting
        assert chat_stream.stats().is_draining
        await chat_stream.stop_queue_worker()

    run_without_threads(main(), monkeypatch)


def test_a_short_context_gets_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = machine(context_len=16)
    found = run_without_threads(find_limit(engine, itl_target_s=0.1, highest=8), monkeypatch)
    assert found is not None
    assert found.max_concurrency == 8
    assert {len(prompt.token_ids) for prompt in engine.prompts} == {4}
