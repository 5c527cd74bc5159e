"""An event loop whose clock jumps: hours pass in milliseconds, and the same run gives the same order twice."""

from __future__ import annotations

import asyncio
import selectors
from collections.abc import Coroutine
from typing import Any, TypeVar

T = TypeVar("T")


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """`time()` starts at 0 and moves only when nothing is ready, straight to the next timer.

    For code without threads and sockets: what arrives from outside arrives at no particular virtual time.
    Raises `RuntimeError` when everybody waits and no timer is set, where a real loop would hang for ever.
    """

    def __init__(self) -> None:
        self._virtual_s = 0.0
        super().__init__(_JumpingSelector(self))

    def time(self) -> float:
        return self._virtual_s

    @property
    def num_timers(self) -> int:
        """Set and neither fired nor cancelled: what is still there at the end of a test was left behind."""
        return sum(not handle.cancelled() for handle in self._scheduled)  # type: ignore[attr-defined]

    def jump(self, seconds: float) -> None:
        self._virtual_s += seconds


class _JumpingSelector(selectors.SelectSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = super().select(0)
        if events:
            return events
        if timeout is None:
            raise RuntimeError("everybody waits and no timer is set: nothing will ever happen")
        if timeout > 0:
            self._loop.jump(timeout)
        return []


def run_virtual(main: Coroutine[Any, Any, T]) -> T:
    """Like `asyncio.run`, in virtual time."""
    with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        return runner.run(main)
