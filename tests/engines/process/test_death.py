"""The engine's process dies, hangs or cannot be loaded: which errors requests get, and how service resumes."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import pytest

from chatstream import ChatStream
from chatstream.engines.base import EngineHealth
from chatstream.engines.process import ProcessEngine
from chatstream.errors import ChatStreamError, ConfigError, EngineUnavailable
from chatstream.types import Done, Failed, GenerationRequest, Queued, Started, StreamEvent, Token, TokenDelta
from tests.engines.process.steered import (
    batched,
    generate,
    hanging_once,
    is_alive,
    numbers,
    request,
    running,
    steered,
    until,
)

pytestmark = pytest.mark.anyio


def kill(engine: ProcessEngine, signal_number: signal.Signals = signal.SIGKILL) -> int:
    """Signal the ready child. Returns its process id."""
    assert engine.pid is not None
    os.kill(engine.pid, signal_number)
    return engine.pid


# --- through the queue ----------------------------------------------------------------------------------------------


class Client:
    """Sends its request when created and reads every event."""

    def __init__(self, chat_stream: ChatStream, commands: str) -> None:
        self.events: list[StreamEvent] = []
        self._reading = asyncio.create_task(self._read(chat_stream, commands))

    async def _read(self, chat_stream: ChatStream, commands: str) -> None:
        try:
            async for event in chat_stream.stream(commands):
                self.events.append(event)
        except ChatStreamError as error:
            self.events.append(Failed("", error))

    async def wait_ended(self) -> list[type[StreamEvent]]:
        """The event classes in order of first appearance."""
        await self._reading
        kinds = [type(event) for event in self.events]
        return [kind for n, kind in enumerate(kinds) if kind not in kinds[:n]]

    @property
    def num_tokens(self) -> int:
        return sum(isinstance(event, Token) for event in self.events)


@asynccontextmanager
async def serving(folder: Path, max_concurrency: int = 1) -> AsyncIterator[tuple[ChatStream, ProcessEngine]]:
    engine = steered(folder)
    async with asyncio.timeout(60), ChatStream(engine=engine, max_concurrency=max_concurrency) as chat_stream:
        yield chat_stream, engine


async def test_a_request_without_a_token_is_requeued_and_answered_after_the_reload(tmp_path: Path) -> None:
    (tmp_path / "block").touch()
    async with serving(tmp_path) as (chat_stream, engine):
        client = Client(chat_stream, "block 5")
        await until((tmp_path / "blocked").exists)
        kill(engine)
        (tmp_path / "block").unlink()
        assert await client.wait_ended() == [Started, Token, Done]
        assert client.num_tokens == 5
        assert chat_stream.stats().requeued == 1


async def test_a_request_with_tokens_gets_an_error_and_the_queue_keeps_its_order(tmp_path: Path) -> None:
    (tmp_path / "block").touch()
    async with serving(tmp_path) as (chat_stream, engine):
        first = Client(chat_stream, "1 block 5")
        await until((tmp_path / "blocked").exists)
        others = [Client(chat_stream, "3") for _ in range(4)]
        await until(lambda: chat_stream.stats().waiting == 4)
        await until(lambda: first.num_tokens == 1)
        (tmp_path / "loading").touch()
        kill(engine)
        (tmp_path / "block").unlink()
        assert await first.wait_ended() == [Started, Token, Failed]
        end = first.events[-1]
        assert isinstance(end, Failed)
        assert isinstance(end.error, EngineUnavailable)
        late = Client(chat_stream, "3")  # a request that arrives during the reload is queued too
        await until(lambda: chat_stream.stats().waiting == 4)
        assert "is being loaded again" in chat_stream.not_ready_because()
        (tmp_path / "loading").unlink()
        await others[0].wait_ended()
        for client in [*others[1:], late]:
            assert await client.wait_ended() == [Queued, Started, Token, Done]
        made = [[int(e.text) for e in client.events if isinstance(e, Token)] for client in [*others, late]]
        assert made == [[0, 1, 2], [3, 4, 5], [6, 7, 8], [9, 10, 11], [12, 13, 14]]
        assert chat_stream.not_ready_because() == ""


async def test_a_request_in_prepare_when_the_child_dies_is_answered_by_the_next_one(tmp_path: Path) -> None:
    async with serving(tmp_path) as (chat_stream, engine):
        kill(engine, signal.SIGSTOP)
        client = Client(chat_stream, "5")
        await until(lambda: chat_stream.stats().running == 1)
        kill(engine)
        assert await client.wait_ended() == [Started, Token, Done]


async def test_a_request_that_kills_two_children_fails_and_the_next_one_is_served(tmp_path: Path) -> None:
    async with serving(tmp_path) as (chat_stream, _):
        (tmp_path / "block").touch()
        deadly = Client(chat_stream, "block die 5")
        for _ in range(2):
            await until((tmp_path / "blocked").exists)
            (tmp_path / "blocked").unlink()
            (tmp_path / "die").touch()
            (tmp_path / "block").unlink()
            await until(lambda: not (tmp_path / "die").exists())
            (tmp_path / "block").touch()
        assert await deadly.wait_ended() == [Started, Failed]
        assert await Client(chat_stream, "5").wait_ended() == [Started, Token, Done]


# --- hangs and deaths -----------------------------------------------------------------------------------------------


async def generate_with_retries(engine: ProcessEngine, commands: str) -> list[TokenDelta]:
    """Retries: on a busy machine a heartbeat may take seconds, and a healthy child may be replaced too."""
    while True:
        try:
            return await generate(engine, commands)
        except EngineUnavailable:
            pass


async def check_replaced(engine: ProcessEngine, folder: Path, command: str, reason: str) -> None:
    pid = engine.pid
    assert pid is not None
    (folder / command).touch()
    with pytest.raises(EngineUnavailable, match=reason):
        await generate(engine, f"2 {command} 2")
    assert len(numbers(await generate_with_retries(engine, "5"))) == 5
    assert engine.pid != pid
    assert not is_alive(pid)


async def test_a_child_with_a_hanging_step_is_replaced(tmp_path: Path) -> None:
    async with running(ProcessEngine(partial(hanging_once, str(tmp_path)))) as engine:
        pid = engine.pid
        assert pid is not None
        other = engine.stream(await request(engine, "other", "other"))
        await anext(other)
        (tmp_path / "hang").touch()
        with pytest.raises(EngineUnavailable, match="a step has not ended for more than"):
            await generate(engine, "hangs")
        with pytest.raises(EngineUnavailable, match="a step has not ended for more than"):
            _ = [delta async for delta in other]
        assert not (tmp_path / "hang").exists()
        assert len(await generate_with_retries(engine, "again")) > 900
        assert engine.pid != pid
        assert not is_alive(pid)


async def test_a_child_without_heartbeats_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path, heartbeat_timeout_s=2.0) as engine:
        await check_replaced(engine, tmp_path, "freeze", "no heartbeat for 2 s")


async def test_a_child_that_dies_is_replaced(tmp_path: Path) -> None:
    async with running(tmp_path) as engine:
        await check_replaced(engine, tmp_path, "die", "its process has died")


@pytest.fixture
async def usual_exception_handler() -> AsyncIterator[None]:
    """Install asyncio's exception handler, which logs; anyio's makes the test fail."""
    loop = asyncio.get_running_loop()
    handler = loop.get_exception_handler()
    loop.set_exception_handler(None)
    yield
    loop.set_exception_handler(handler)


@pytest.mark.usefixtures("usual_exception_handler")
async def test_a_child_whose_messages_cannot_be_read_is_replaced_and_the_reason_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path) as engine:
        await check_replaced(engine, tmp_path, "unloadable", "its message could not be read")
    assert "steered failed: its message could not be read: Can't get attribute 'Text'" in caplog.text


async def test_a_lower_capacity_after_a_reload_is_logged(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running(tmp_path) as engine:
        (tmp_path / "shrink").touch()
        kill(engine)
        await until(lambda: not engine.health().is_ready)
        await generate(engine, "5")
        assert engine.capacity.max_concurrency == 4
        assert "the reloaded engine runs at most 4 sequences (was 8)" in caplog.text
        kill(engine)
        await until(lambda: not engine.health().is_ready)
        await generate(engine, "5")
    assert caplog.text.count("the reloaded engine runs") == 1


# --- loads that fail ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failure_file", "message"),
    [
        ("load fails", "no such checkpoint"),
        ("load breaks", "cannot load steered: the engine failed: ZeroDivisionError"),
        ("load dies", "cannot load steered: its process was ended by SIGSEGV"),
    ],
)
async def test_a_failed_first_load_raises_one_line_and_can_be_repeated(
    tmp_path: Path, failure_file: str, message: str
) -> None:
    (tmp_path / failure_file).touch()
    engine = steered(tmp_path)
    async with asyncio.timeout(60):
        with pytest.raises(ConfigError) as failure:
            await engine.start()
        assert failure.value.message == message
        assert engine.health().detail == f"could not load: {message}"
        with pytest.raises(EngineUnavailable, match=message):
            await generate(engine, "5")
        (tmp_path / failure_file).unlink(missing_ok=True)
        await engine.start()
        assert len(numbers(await generate(engine, "5"))) == 5
        await engine.stop()


async def test_a_load_without_heartbeats_is_killed(tmp_path: Path) -> None:
    (tmp_path / "load freezes").touch()
    async with asyncio.timeout(60):
        with pytest.raises(ConfigError, match="cannot load steered: no heartbeat for 2 s"):
            await steered(tmp_path, heartbeat_timeout_s=0.2).start()


async def test_a_death_is_detected_while_a_grandchild_keeps_the_connection_open(tmp_path: Path) -> None:
    (tmp_path / "load orphans").touch()
    try:
        async with asyncio.timeout(60):
            with pytest.raises(ConfigError, match="cannot load steered: its process was ended by SIGSEGV"):
                await steered(tmp_path).start()
    finally:
        (tmp_path / "load orphans").unlink()


async def test_reloads_are_repeated_with_back_off_until_one_succeeds(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("chatstream.engines.process.engine.MIN_BACKOFF_S", 0.001)
    monkeypatch.setattr("chatstream.engines.process.engine.MAX_BACKOFF_S", 0.005)
    async with running(tmp_path) as engine:
        waiting = await request(engine, "5")
        (tmp_path / "load dies").touch()
        kill(engine)
        await until(lambda: caplog.text.count("cannot load steered: its process was ended by SIGSEGV") == 6)
        assert "is being loaded again" in engine.health().detail
        (tmp_path / "load dies").unlink()
        assert len(numbers([delta async for delta in engine.stream(waiting)])) == 5
    delays = [record.getMessage().rpartition(" in ")[2] for record in caplog.records if record.levelno == logging.ERROR]
    assert delays[:6] == ["0 s", "0.001 s", "0.002 s", "0.004 s", "0.005 s", "0.005 s"]


async def test_a_request_in_a_slot_waits_for_a_reload_up_to_the_timeout(tmp_path: Path) -> None:
    async with running(tmp_path, reload_timeout_s=0.1) as engine:
        waiting = await request(engine, "5")
        (tmp_path / "loading").touch()
        kill(engine)
        await until(lambda: not engine.health().is_ready)
        with pytest.raises(EngineUnavailable, match="it is being loaded again"):
            await anext(engine.stream(waiting))
        with pytest.raises(EngineUnavailable, match="it is being loaded again"):
            await request(engine, "5")
        (tmp_path / "loading").unlink()
        await until(lambda: engine.health().is_ready)
        assert len([delta async for delta in engine.stream(waiting)]) == 6


async def test_a_request_preempted_during_a_reload_generates_nothing_before_it_is_resumed() -> None:
    engine = ProcessEngine(batched)
    async with running(engine):
        waiting = GenerationRequest("preempted", await engine.prepare("a", engine.default_sampling))
        kill(engine)
        await until(lambda: not engine.health().is_ready)
        stream = engine.stream(waiting)
        first = asyncio.create_task(anext(stream))
        await asyncio.sleep(0)
        await engine.preempt("preempted")
        other = GenerationRequest("other", waiting.prompt)
        assert len([delta async for delta in engine.stream(other)]) > 100
        assert not first.done()
        engine.resume("preempted")
        assert (await first).num_tokens == 1
        await stream.aclose()


# --- stop -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_ticks", [0, 1, 2, 3, 10, 1000])
async def test_stop_ends_a_load_at_once(tmp_path: Path, num_ticks: int) -> None:
    (tmp_path / "loading").touch()
    engine = steered(tmp_path)
    starting = asyncio.create_task(engine.start())
    for _ in range(1 + num_ticks):
        await asyncio.sleep(0)
    await engine.stop()
    with pytest.raises(EngineUnavailable, match="the engine was stopped"):
        await starting
    assert engine.health().detail == "stopped"


async def is_alive_after_stop(engine: ProcessEngine, pid: int) -> bool:
    await engine.stop()
    return is_alive(pid)


async def test_stop_ends_open_generations_and_kills_a_child_that_does_not_stop_in_time(tmp_path: Path) -> None:
    (tmp_path / "block").touch()
    async with running(tmp_path, stop_timeout_s=0.5) as engine:
        pid = engine.pid
        assert pid is not None
        (tmp_path / "stop hangs").touch()
        open_one = asyncio.create_task(generate(engine, "3 block 3"))
        await until((tmp_path / "blocked").exists)
        _, alive_after_second_stop = await asyncio.gather(engine.stop(), is_alive_after_stop(engine, pid))
        assert not alive_after_second_stop
        with pytest.raises(EngineUnavailable, match="the engine is gone: it was stopped"):
            await open_one
        assert not is_alive(pid)
        with pytest.raises(EngineUnavailable, match="stopped"):
            await generate(engine, "5")
        await engine.start()
        assert len(numbers(await generate(engine, "5"))) == 5


async def test_a_cancelled_stop_has_stopped_the_engine(tmp_path: Path) -> None:
    async with running(tmp_path, stop_timeout_s=1000.0) as engine:
        pid = engine.pid
        assert pid is not None
        (tmp_path / "stop hangs").touch()
        stopping = asyncio.create_task(engine.stop())
        await until(lambda: not (tmp_path / "stop hangs").exists())
        stopping.cancel()
        await asyncio.wait([stopping])
        assert stopping.cancelled()
        assert not is_alive(pid)
        assert engine.health() == EngineHealth(False, "stopped")
        await engine.start()
        assert len(numbers(await generate(engine, "5"))) == 5


async def test_a_stop_that_fails_is_logged_and_does_not_wait_for_the_timeout(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(tmp_path, stop_timeout_s=1000.0) as engine:
        (tmp_path / "stop breaks").touch()
        await engine.stop()
    assert "ZeroDivisionError: division by zero" in caplog.text


@pytest.mark.parametrize("signal_number", [signal.SIGINT, signal.SIGTERM])
async def test_the_child_ignores_signals_meant_for_the_parent(tmp_path: Path, signal_number: signal.Signals) -> None:
    async with running(tmp_path) as engine:
        pid = kill(engine, signal_number)
        assert len(numbers(await generate(engine, "5"))) == 5
        assert engine.pid == pid
        assert os.getpgid(pid) != os.getpgid(0), "a terminal's Ctrl-C must not reach the child"
