"""The server collects cycles only if there are more objects than live requests can have."""

from __future__ import annotations

import asyncio
import gc
import weakref

import pytest

from chatstream import ChatStream, server
from chatstream.testing import FakeEngine, run_virtual


@pytest.fixture(autouse=True)
def _refreeze_existing_objects() -> None:
    """`collect_garbage` unfreezes all objects, also those frozen by `conftest`."""
    gc.collect()
    gc.freeze()


class Node:
    """An object in a reference cycle with itself."""

    def __init__(self, objects: int) -> None:
        self.itself = self
        self.objects = [[] for _ in range(objects)]  # type: ignore[var-annotated]


def is_collected(objects: int, seconds: float) -> bool:
    async def run() -> bool:
        task = asyncio.create_task(server.collect_garbage(ChatStream(engine=FakeEngine())))
        await asyncio.sleep(0)
        node = weakref.ref(Node(objects))
        await asyncio.sleep(seconds)
        try:
            return node() is None
        finally:
            task.cancel()
            await asyncio.wait((task,))

    return run_virtual(run())


def test_many_unreachable_objects_are_collected_within_a_second() -> None:
    assert is_collected(2 * server.MAX_GARBAGE, seconds=2 * server.GARBAGE_INTERVAL_S)


def test_cycles_of_the_last_requests_are_collected_when_the_server_is_idle() -> None:
    """A few cycles may keep much memory alive, such as tracebacks with tensors."""

    async def run() -> bool:
        chat_stream = ChatStream(engine=FakeEngine())
        task = asyncio.create_task(server.collect_garbage(chat_stream))
        async with chat_stream:
            async for _ in chat_stream.stream("hello"):
                pass
            node = weakref.ref(Node(10))
            await asyncio.sleep(2 * server.GARBAGE_INTERVAL_S)
            is_collected_now = node() is None
        task.cancel()
        await asyncio.wait((task,))
        return is_collected_now

    assert run_virtual(run())


def test_a_few_objects_trigger_no_collection() -> None:
    assert not is_collected(100, seconds=100.0)


def test_automatic_collection_is_restored_afterwards() -> None:
    is_collected(100, seconds=1.0)
    assert gc.isenabled()
    assert gc.get_freeze_count() == 0
