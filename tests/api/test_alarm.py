"""`Alarm`, the deadline of a response, in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from chatstream.api.streaming import Alarm
from chatstream.testing import run_virtual


def run_task(main: Callable[[Alarm], Awaitable[None]]) -> float:
    """Run `main` as the alarm's task; return the time at which it ended, in seconds."""

    async def run() -> float:
        started = asyncio.Event()

        async def body() -> None:
            await started.wait()
            await main(alarm)

        task = asyncio.create_task(body())
        alarm = Alarm(task)
        started.set()
        try:
            await task
        finally:
            alarm.close()
        return asyncio.get_running_loop().time()

    return run_virtual(run())


def test_a_task_past_its_deadline_is_interrupted() -> None:
    async def main(alarm: Alarm) -> None:
        with pytest.raises(TimeoutError), alarm.after(10.0):
            await asyncio.Event().wait()

    assert run_task(main) == pytest.approx(10.0)


def test_a_task_within_its_deadline_is_not_interrupted() -> None:
    async def main(alarm: Alarm) -> None:
        for _ in range(5):
            with alarm.after(10.0):
                await asyncio.sleep(9.0)
        await asyncio.sleep(100.0)  # outside of any block

    assert run_task(main) == pytest.approx(145.0)


def test_a_deadline_counts_from_the_start_of_its_block() -> None:
    async def main(alarm: Alarm) -> None:
        with alarm.after(10.0):
            await asyncio.sleep(9.0)
        with pytest.raises(TimeoutError), alarm.after(10.0):
            await asyncio.sleep(11.0)

    assert run_task(main) == pytest.approx(19.0)


def test_a_later_shorter_deadline_is_kept() -> None:
    async def main(alarm: Alarm) -> None:
        with alarm.after(10.0):
            pass
        with pytest.raises(TimeoutError), alarm.after(1.0):
            await asyncio.sleep(5.0)

    assert run_task(main) == pytest.approx(1.0)


def test_the_alarm_can_fire_again() -> None:
    async def main(alarm: Alarm) -> None:
        for _ in range(3):
            with pytest.raises(TimeoutError), alarm.after(2.0):
                await asyncio.sleep(5.0)

    assert run_task(main) == pytest.approx(6.0)


def test_none_is_no_deadline() -> None:
    async def main(alarm: Alarm) -> None:
        with alarm.after(None):
            await asyncio.sleep(1e6)

    assert run_task(main) == pytest.approx(1e6)


def test_a_simultaneous_cancellation_has_precedence() -> None:
    async def main(alarm: Alarm) -> None:
        task = asyncio.current_task()
        assert task is not None
        asyncio.get_running_loop().call_at(10.0, task.cancel)
        with alarm.after(10.0):
            await asyncio.Event().wait()

    with pytest.raises(asyncio.CancelledError):
        run_task(main)
