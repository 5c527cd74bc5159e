"""An event loop that runs ready callbacks in a random order and fires timers late, both determined by a seed."""

from __future__ import annotations

import asyncio
import random
from collections import deque
from collections.abc import Callable, Coroutine
from contextvars import Context
from itertools import count
from typing import Any, TypeVar, TypeVarTuple

from chatstream.testing.virtual_time import VirtualTimeLoop

T = TypeVar("T")
Ts = TypeVarTuple("Ts")


class ShuffledLoop(VirtualTimeLoop):
    """Virtual time with a random schedule for each seed; the same seed gives the same schedule, in every process.

    Of all ready callbacks and tasks a random one runs next, which exposes race conditions. Timers fire up to
    `max_late_s` late, as on a busy machine. For code without threads and sockets, and without code that relies on the
    order of `call_soon`, which only a real loop guarantees.
    """

    def __init__(self, seed: int, *, max_late_s: float = 0.005) -> None:
        super().__init__()
        self._rng = random.Random(seed)
        self._max_late_s = max_late_s
        self._ready = _RandomOrder(self._rng)
        numbers = count()

        def make_task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
            return _NumberedTask(next(numbers), coro, loop=loop, **options)

        self.set_task_factory(make_task)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when + self._rng.random() * self._max_late_s, callback, *args, context=context)


class _RandomOrder(deque[asyncio.Handle]):
    """The loop's queue of ready callbacks: `popleft` returns a random one."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def popleft(self) -> asyncio.Handle:
        if len(self) > 1:
            index = self._rng.randrange(len(self))
            self[0], self[index] = self[index], self[0]
        return super().popleft()


class _NumberedTask(asyncio.Task[Any]):
    """Hashes by number, not by address, so that a set of tasks has the same order in every process."""

    def __init__(self, number: int, coro: Any, **options: Any) -> None:
        self._number = number  # before `super().__init__`, which hashes the task
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


def run_shuffled(main: Coroutine[Any, Any, T], seed: int) -> T:
    """Like `asyncio.run`, in a `ShuffledLoop` with this seed."""
    with asyncio.Runner(loop_factory=lambda: ShuffledLoop(seed)) as runner:
        return runner.run(main)
