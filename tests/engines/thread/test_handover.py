"""The lock-free buffer between the engine thread and the event loop."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from chatstream.engines.thread.handover import DeltaBuffer
from chatstream.types import TokenDelta

pytestmark = pytest.mark.anyio


class Interrupted(DeltaBuffer):
    """Runs the engine thread's side just before the reader counts a token, or just after."""

    def __init__(self, when: str) -> None:
        self.wake_ups = 0
        self.is_engine_asleep = False
        super().__init__(asyncio.get_running_loop(), 4, self._on_wake_up)
        self._when = when

    def _on_wake_up(self) -> None:
        self.wake_ups += 1
        self.is_engine_asleep = False

    def send(self) -> None:
        self.tokens_sent += 1
        self.put(TokenDelta("x"))

    def _engine_fills_it(self) -> None:
        self.send()
        self.is_engine_asleep = self.is_full

    def __setattr__(self, name: str, value: Any) -> None:
        counts = name == "_tokens_taken" and value == 1
        if counts and self._when == "before":
            self._engine_fills_it()
        super().__setattr__(name, value)
        if counts and self._when == "after":
            self._engine_fills_it()


@pytest.mark.parametrize("when", ["before", "after"])
async def test_a_reader_that_makes_room_while_the_engine_goes_idle_wakes_it(when: str) -> None:
    buffer = Interrupted(when)
    for _ in range(3):
        buffer.send()
    for _ in range(4):
        await buffer.get()
    assert not buffer.is_engine_asleep


async def test_a_buffer_with_room_does_not_wake_the_engine() -> None:
    buffer = Interrupted("never")
    for _ in range(3):
        buffer.send()
        await buffer.get()
    assert buffer.wake_ups == 0
