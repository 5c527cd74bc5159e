"""An event loop that does whatever a real one might: late timers, and what is ready in any order. A seed chooses."""

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
    """Virtual time, and a schedule of its own for each seed; the same one for the same seed, in any process.

    Of all callbacks and tasks that are ready a random one is next, so whatever depends on who was first shows itself.
    A real loop keeps the order of `call_soon`: code that relies on that must not run here. Timers are late by up to
    `max_late_s`, as on a busy machine. For code without threads and sockets.
    """

    def __init__(self, seed: int, *, max_late_s: float = 0.005) -> None:
        super().__init__()
        self._rng = random.Random(seed)
        self._max_late_s = max_late_s
        self._ready = _AnyOrder(self._rng)
        numbers = count()

        def make_task(loop: asyncio.AbstractEventLoop, coro: Any, **options: Any) -> asyncio.Task[Any]:
            return _NumberedTask(next(numbers), coro, loop=loop, **options)

        self.set_task_factory(make_task)

    def call_at(
        self, when: float, callback: Callable[[*Ts], object], *args: *Ts, context: Context | None = None
    ) -> asyncio.TimerHandle:
        return super().call_at(when + self._rng.random() * self._max_late_s, callback, *args, context=context)


class _AnyOrder(deque[asyncio.Handle]):
    """The loop's queue of what is ready; whoever takes the first one gets any."""

    def __init__(self, rng: random.Random) -> None:
        super().__init__()
        self._rng = rng

    def popleft(self) -> asyncio.Handle:
        if len(self) > 1:
            index = self._rng.randrange(len(self))
            self[0], self[index] = self[index], self[0]
        return super().popleft()


class _NumberedTask(asyncio.Task[Any]):
    """Hashes by its number, not by its address: a set of tasks has the same order in every process."""

    def __init__(self, number: int, coro: Any, **options: Any) -> None:
        self._number = number  # first, because a task hashes itself when it is made
        super().__init__(coro, **options)

    def __hash__(self) -> int:
        return self._number


def run_shuffled(main: Coroutine[Any, Any, T], seed: int) -> T:
    """Like `asyncio.run`, in virtual time and in an order that the seed chooses."""
    with asyncio.Runner(loop_factory=lambda: ShuffledLoop(seed)) as runner:
        return runner.run(main)
