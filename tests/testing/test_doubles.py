"""What is shipped for tests keeps its word."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator

import pytest

from chatstream.testing import FakeEngine, Fault, check_engine, run_virtual
from chatstream.types import FinishReason, GenerationRequest, PreparedPrompt, TokenDelta, Usage


def test_an_hour_passes_in_no_time() -> None:
    async def run() -> float:
        await asyncio.sleep(3600.0)
        return asyncio.get_running_loop().time()

    begin_s = time.monotonic()
    assert run_virtual(run()) == pytest.approx(3600.0)
    assert time.monotonic() - begin_s < 60.0


def test_timers_fire_in_the_order_of_their_times() -> None:
    order: list[float] = []

    async def nap(seconds: float) -> None:
        await asyncio.sleep(seconds)
        order.append(seconds)

    async def run() -> None:
        await asyncio.gather(*map(nap, (3.0, 1.0, 2.0)))

    run_virtual(run())
    assert order == [1.0, 2.0, 3.0]


def test_a_deadlock_is_an_error_instead_of_a_hang() -> None:
    async def run() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        run_virtual(run())


@pytest.mark.anyio
async def test_the_fake_engine_keeps_the_contract_of_engines() -> None:
    await check_engine(FakeEngine())


def request(request_id: str = "r") -> GenerationRequest:
    return GenerationRequest(request_id, PreparedPrompt())


def test_the_fake_engine_plays_its_script_at_its_pace() -> None:
    async def run() -> None:
        engine = FakeEngine(["a", "b"], step_s=0.5, prefill_s=2.0, finish_reason=FinishReason.LENGTH)
        deltas = [delta async for delta in engine.stream(request())]
        assert deltas == [TokenDelta("a"), TokenDelta("b", 1, FinishReason.LENGTH, Usage(0, 2))]
        assert engine.log == [(pytest.approx(2.5), "r"), (pytest.approx(3.0), "r")]

    run_virtual(run())


def test_the_fake_engine_fails_where_the_script_says() -> None:
    async def run() -> None:
        engine = FakeEngine(["a", ValueError("here")])
        stream = engine.stream(request())
        assert (await anext(stream)).text == "a"
        with pytest.raises(ValueError, match="here"):
            await anext(stream)
        assert not engine.active

    run_virtual(run())


def test_a_hang_can_be_cancelled_and_deafness_cannot() -> None:
    async def run() -> None:
        for fault, ends in ((Fault.HANG, True), (Fault.DEAF, False)):
            engine = FakeEngine([fault, "a"])
            task = asyncio.create_task(anext(engine.stream(request())))  # type: ignore[arg-type]
            await asyncio.sleep(1.0)
            task.cancel()
            await asyncio.sleep(1.0)
            assert task.done() is ends
            engine.heal()
            await asyncio.gather(task, return_exceptions=True)

    run_virtual(run())


class Broken(FakeEngine):
    """Breaks one rule of the contract."""

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        usage = Usage(1, 2)
        if self.rule == "finishes twice":
            yield TokenDelta("a", finish_reason=FinishReason.STOP, usage=usage)
        if self.rule == "counts wrong":
            yield TokenDelta("a", num_tokens=2)
        else:
            yield TokenDelta("a")
        if self.rule == "never finishes":
            yield TokenDelta("b")
            return
        if self.rule == "has no usage":
            yield TokenDelta("b", finish_reason=FinishReason.STOP)
            return
        if self.rule == "swallows cancellation":
            try:
                await asyncio.sleep(0.01)
            except asyncio.CancelledError:
                pass
        yield TokenDelta("b", finish_reason=FinishReason.STOP, usage=usage)

    def health(self):  # type: ignore[no-untyped-def]
        health = super().health()
        return type(health)(True) if self.rule == "is always ready" else health


@pytest.mark.anyio
@pytest.mark.parametrize(
    "rule",
    [
        "finishes twice",
        "counts wrong",
        "never finishes",
        "has no usage",
        "swallows cancellation",
        "is always ready",
    ],
)
async def test_an_engine_that_breaks_the_contract_is_found_out(rule: str) -> None:
    with pytest.raises(AssertionError):
        await check_engine(Broken(rule))
