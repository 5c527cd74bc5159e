"""`max_concurrency="auto"`: measured before anybody is served, and kept. In virtual time."""

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
    """20 + 5 n ms: with a target of 100 ms, 15 or 16 may run."""
    return Machine(lambda n: 0.02 + 0.005 * n, **changes)


def auto(engine: Any, **settings: Any) -> ChatStream:
    return ChatStream(engine=engine, scheduler=SchedulerSettings(max_concurrency="auto", **settings))


def without_threads(main: Coroutine[Any, Any, Any], monkeypatch: pytest.MonkeyPatch) -> Any:
    """Virtual time knows no threads: the disk is waited for."""

    async def at_once(function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    monkeypatch.setattr(asyncio, "to_thread", at_once)
    return run_virtual(main)


async def limit_after_start(chat_stream: ChatStream) -> int:
    async with chat_stream:
        return chat_stream.stats().max_concurrency


def test_what_is_found_is_where_it_begins(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatstream")
    assert without_threads(limit_after_start(auto(machine())), monkeypatch) in (15, 16)
    lines = [record.getMessage() for record in caplog.records if "may run and" in record.getMessage()]
    assert len(lines) == 1
    assert "auto: measured: 1" in lines[0]
    assert "9 of 10 gaps between tokens within" in lines[0]


def test_the_next_start_asks_the_cache(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "chatstream")
    first = without_threads(limit_after_start(auto(machine())), monkeypatch)
    again = machine()
    assert without_threads(limit_after_start(auto(again)), monkeypatch) == first
    assert again.prompts == []
    assert "auto: measured at an earlier start" in caplog.text


def test_what_is_kept_is_never_more_than_the_engine_has_room_for_today(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_threads(limit_after_start(auto(machine())), monkeypatch) > 5
    assert without_threads(limit_after_start(auto(machine(max_concurrency=5))), monkeypatch) == 5


def test_what_a_failing_engine_broke_off_is_used_and_not_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It died with two streams. The one that replaces it carries as many as ever."""
    caplog.set_level(logging.INFO, "chatstream")
    dying = machine(fails_with=lambda n: EngineUnavailable("its process has died") if n == 2 else None)
    assert without_threads(limit_after_start(auto(dying)), monkeypatch) == 1
    assert "More than 1 stream was not tried: the engine failed: its process has died." in caplog.text
    assert without_threads(limit_after_start(auto(machine())), monkeypatch) in (15, 16)


@pytest.mark.parametrize("change", [{"model_name": "another"}, {"speed_key": "another"}, {"context_len": 500}])
def test_another_model_is_measured_anew(change: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    without_threads(limit_after_start(auto(machine())), monkeypatch)
    another = machine(**change)
    without_threads(limit_after_start(auto(another)), monkeypatch)
    assert another.prompts != []


def test_so_is_another_target(monkeypatch: pytest.MonkeyPatch) -> None:
    assert without_threads(limit_after_start(auto(machine(), itl_target_s=0.0601)), monkeypatch) == 8
    assert without_threads(limit_after_start(auto(machine())), monkeypatch) in (15, 16)


def test_it_is_the_floor_at_least_and_the_engine_s_own_limit_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = Machine(lambda n: 0.2 * n)
    assert without_threads(limit_after_start(auto(slow, min_concurrency=3)), monkeypatch) == 3
    small = Machine(lambda n: 0.01, max_concurrency=5, speed_key="another machine")
    assert without_threads(limit_after_start(auto(small)), monkeypatch) == 5


def test_an_engine_that_says_nothing_of_its_speed_is_not_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    silent, fake = machine(speed_key=None), FakeEngine()
    assert without_threads(limit_after_start(auto(silent)), monkeypatch) == AUTO_START
    assert without_threads(limit_after_start(auto(fake)), monkeypatch) == AUTO_START
    assert (silent.prompts, fake.log) == ([], [])


def test_nor_is_one_whose_limit_is_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = machine()
    chat_stream = ChatStream(engine=engine, scheduler=SchedulerSettings(max_concurrency=3, adaptive="on"))
    assert without_threads(limit_after_start(chat_stream), monkeypatch) == 3
    assert engine.prompts == []


def test_one_that_cannot_be_measured_begins_as_if_nobody_had_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = Machine(lambda n: 10.0)
    assert without_threads(limit_after_start(auto(engine)), monkeypatch) == AUTO_START
    assert "the concurrency limit could not be measured" in caplog.text


def test_who_asks_meanwhile_waits_until_it_is_over_and_is_then_served(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        engine = machine()
        chat_stream = auto(engine)
        starting = asyncio.create_task(chat_stream.start_queue_worker())
        await asyncio.sleep(SECONDS / 2)
        asking = asyncio.create_task(answer(chat_stream))
        await asyncio.sleep(SECONDS / 4)
        assert (chat_stream.stats().running, chat_stream.stats().waiting) == (0, 1)
        assert chat_stream.not_ready_because() == "measuring how many may run at once"
        assert not starting.done()
        await starting
        assert asyncio.get_running_loop().time() <= SECONDS + 0.5
        assert chat_stream.not_ready_because() == ""
        assert await asking == 3
        await chat_stream.stop_queue_worker()

    without_threads(main(), monkeypatch)


async def answer(chat_stream: ChatStream) -> int:
    async for event in chat_stream.stream("Hello", max_new_tokens=3):
        if isinstance(event, Done):
            return event.usage.completion_tokens
    raise AssertionError("no end")


def test_adaptive_concurrency_goes_on_from_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """The machine has become three times slower since: the limit goes down, and says why."""

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

    without_threads(main(), monkeypatch)


async def answer_long(chat_stream: ChatStream) -> None:
    async for _ in chat_stream.stream("Hello", max_new_tokens=100):
        pass


def test_what_an_operator_says_meanwhile_stays_also_at_a_later_start(monkeypatch: pytest.MonkeyPatch) -> None:
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

    without_threads(main(), monkeypatch)


def test_two_starts_at_once_measure_once_and_a_later_one_not_again(monkeypatch: pytest.MonkeyPatch) -> None:
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

    without_threads(main(), monkeypatch)


def test_a_start_that_is_given_up_leaves_nothing_running(monkeypatch: pytest.MonkeyPatch) -> None:
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

    without_threads(main(), monkeypatch)


def test_a_drain_that_begins_meanwhile_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    async def main() -> None:
        chat_stream = auto(machine())
        starting = asyncio.create_task(chat_stream.start_queue_worker())
        await asyncio.sleep(SECONDS / 2)
        chat_stream.start_drain()
        await starting
        assert chat_stream.stats().is_draining
        await chat_stream.stop_queue_worker()

    without_threads(main(), monkeypatch)


def test_short_contexts_get_short_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = machine(context_len=16)
    found = without_threads(find_limit(engine, itl_target_s=0.1, highest=8), monkeypatch)
    assert found is not None
    assert found.max_concurrency == 8
    assert {len(prompt.token_ids) for prompt in engine.prompts} == {4}
