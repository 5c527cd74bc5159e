"""`ShuffledLoop` exposes races, and the same seed reproduces them."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys

from chatstream.testing import ShuffledLoop, run_shuffled, run_virtual


async def order_of_tasks() -> list[int]:
    order: list[int] = []

    async def runner(number: int) -> None:
        for _ in range(3):
            order.append(number)
            await asyncio.sleep(0)

    await asyncio.gather(*map(runner, range(4)))
    return order


def test_the_seed_chooses_the_order() -> None:
    assert run_shuffled(order_of_tasks(), seed=1) == run_shuffled(order_of_tasks(), seed=1)
    assert len({tuple(run_shuffled(order_of_tasks(), seed)) for seed in range(20)}) > 15


async def lose_an_update() -> int:
    """A race: two tasks read, yield, and write. In the order of a plain loop it never shows."""
    total = 0

    async def add(delay: int) -> None:
        nonlocal total
        for _ in range(delay):
            await asyncio.sleep(0)
        read = total
        await asyncio.sleep(0)
        total = read + 1

    await asyncio.gather(add(0), add(2))
    return total


def test_a_race_that_a_plain_loop_hides_is_found() -> None:
    assert run_virtual(lose_an_update()) == 2
    assert {run_shuffled(lose_an_update(), seed) for seed in range(50)} == {1, 2}


def test_timers_are_late_but_never_early() -> None:
    async def run() -> list[float]:
        loop = asyncio.get_running_loop()
        woken_s = []
        for _ in range(20):
            due_s = loop.time() + 1.0
            await asyncio.sleep(1.0)
            woken_s.append(loop.time() - due_s)
        return woken_s

    late_s = run_shuffled(run(), seed=3)
    assert min(late_s) >= -1e-9
    assert 0.001 < max(late_s) <= 0.0051


def test_pending_timers_are_counted() -> None:
    async def run() -> tuple[int, int]:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, ShuffledLoop)
        timer = loop.call_later(5.0, print)
        before = loop.num_timers
        timer.cancel()
        return before, loop.num_timers

    assert run_shuffled(run(), seed=1) == (1, 0)


PROGRAM = """
import asyncio
from chatstream.testing import run_shuffled

async def main():
    order = []
    async def one(n):
        await asyncio.sleep(0)
        order.append(n)
    tasks = {asyncio.ensure_future(one(n)) for n in range(30)}
    for task in tasks:  # a set: its order depends on the hashes
        task.add_done_callback(lambda t: order.append(-1))
        await asyncio.sleep(0)
    await asyncio.wait(tasks)
    print([t.result() for t in tasks], order)

run_shuffled(main(), seed=7)
"""


def test_the_order_does_not_depend_on_the_process() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM],
            env={**os.environ, "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("0", "1")
    }
    assert len(outputs) == 1
