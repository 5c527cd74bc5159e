"""The shipped test doubles: virtual time, `FakeEngine` and `check_engine`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from dataclasses import replace

import pytest

from chatstream.engines.base import Capacity
from chatstream.errors import EngineUnavailable, UnsupportedParameter
from chatstream.testing import FakeEngine, Fault, check_engine, run_virtual
from chatstream.types import (
    FinishReason,
    GenerationRequest,
    PreparedPrompt,
    PromptInput,
    SamplingParams,
    TokenDelta,
    TokenLogprob,
    Usage,
)


def test_virtual_time_skips_an_hour_at_once() -> None:
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


def test_a_deadlock_in_virtual_time_raises() -> None:
    async def run() -> None:
        await asyncio.get_running_loop().create_future()

    with pytest.raises(RuntimeError, match="nothing will ever happen"):
        run_virtual(run())


@pytest.mark.anyio
async def test_the_fake_engine_passes_check_engine() -> None:
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


def test_the_fake_engine_reports_log_probabilities_of_0() -> None:
    async def run() -> None:
        for num_best, best in ((0, ()), (3, (("a", 0.0),))):
            asked = GenerationRequest("r", PreparedPrompt(), SamplingParams(logprobs=num_best))
            (delta,) = [delta async for delta in FakeEngine(["a"]).stream(asked)]
            assert delta.logprobs == (TokenLogprob("a", 0.0, best),)

    run_virtual(run())


def test_the_fake_engine_raises_at_the_scripted_position() -> None:
    async def run() -> None:
        engine = FakeEngine(["a", ValueError("here")])
        stream = engine.stream(request())
        assert (await anext(stream)).text == "a"
        with pytest.raises(ValueError, match="here"):
            await anext(stream)
        assert not engine.active

    run_virtual(run())


def test_hang_can_be_cancelled_and_deaf_cannot() -> None:
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


def test_the_clock_of_the_fake_engine_stands_still_while_preempted() -> None:
    async def run() -> None:
        engine = FakeEngine(["a", "b"], step_s=1.0, prefill_s=2.0)
        await engine.preempt("r")  # before the stream: no effect
        reading = asyncio.create_task(read(engine, "r"))
        for preempt_s, resume_s in ((1.5, 11.5), (12.5, 22.5), (23.25, 33.25), (33.25, 33.75), (33.75, 34.0)):
            await asyncio.sleep(preempt_s - asyncio.get_running_loop().time())
            await engine.preempt("r")
            assert (engine.preempted, engine.active) == ({"r"}, set())
            await asyncio.sleep(resume_s - preempt_s)
            engine.resume("r")
            assert (engine.preempted, engine.active) == (set(), {"r"})
        assert [delta.text for delta in await reading] == ["a", "b"]
        # The first token takes 3 s and 20 s preempted; the second takes 1 s and 10.75 s preempted.
        assert engine.log == [(pytest.approx(23.0), "r"), (pytest.approx(34.75), "r")]

    run_virtual(run())


async def read(engine: FakeEngine, request_id: str) -> list[TokenDelta]:
    return [delta async for delta in engine.stream(request(request_id))]


def test_the_fake_engine_counts_concurrent_generations_without_preempted_ones() -> None:
    async def run() -> None:
        engine = FakeEngine(["a"] * 5, step_s=1.0)
        reading = [asyncio.create_task(read(engine, "a"))]
        await asyncio.sleep(1.5)
        await engine.preempt("a")
        reading.append(asyncio.create_task(read(engine, "b")))
        await asyncio.sleep(10.0)
        engine.resume("a")
        await asyncio.gather(*reading)
        assert engine.peak_active == 1
        assert [request_id for _, request_id in engine.log] == [*"a", *"bbbbb", *"aaaa"]

    run_virtual(run())


@pytest.mark.parametrize("end", ["cancel", "stop"])
def test_a_preempted_generation_of_the_fake_engine_can_be_cancelled_or_stopped(end: str) -> None:
    async def run() -> None:
        engine = FakeEngine(step_s=1.0)
        await engine.start()
        reading = asyncio.create_task(read(engine, "r"))
        await asyncio.sleep(1.5)
        await engine.preempt("r")
        if end == "stop":
            await engine.stop()
        else:
            reading.cancel()
        with pytest.raises(asyncio.CancelledError if end == "cancel" else EngineUnavailable):
            await reading
        assert (engine.preempted, engine.active) == (set(), set())
        engine.resume("r")
        assert len(await read(engine, "r")) == 3

    run_virtual(run())


class Broken(FakeEngine):
    """Breaks one rule of the contract."""

    capacity = Capacity()

    def __init__(self, rule: str) -> None:
        super().__init__()
        self.rule = rule

    async def prepare(
        self, prompt: PromptInput, sampling: SamplingParams, *, may_drop_history: bool = False
    ) -> PreparedPrompt:
        if sampling.logprobs is not None and self.rule != "has no log probabilities":
            raise UnsupportedParameter("not here", param="logprobs")
        return await super().prepare(prompt, sampling)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        usage = Usage(1, 2)
        if self.rule == "finishes twice":
            yield TokenDelta("a", finish_reason=FinishReason.STOP, usage=usage)
        if self.rule == "counts wrong":
            yield TokenDelta("a", num_tokens=2)
        elif self.rule == "counts the prompt wrong":
            yield TokenDelta("a", num_prompt_tokens=2)
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
        is_late = self.rule == "reports prompt tokens after the first token"
        yield TokenDelta("b", finish_reason=FinishReason.STOP, usage=usage, num_prompt_tokens=int(is_late))

    def health(self):  # type: ignore[no-untyped-def]
        health = super().health()
        return type(health)(True) if self.rule == "is always ready" else health


@pytest.mark.anyio
@pytest.mark.parametrize(
    "rule",
    [
        "finishes twice",
        "counts wrong",
        "counts the prompt wrong",
        "reports prompt tokens after the first token",
        "never finishes",
        "has no usage",
        "swallows cancellation",
        "is always ready",
        "has no log probabilities",
    ],
)
async def test_check_engine_rejects_an_engine_that_breaks_the_contract(rule: str) -> None:
    with pytest.raises(AssertionError):
        await check_engine(Broken(rule))


class WronglyPreempting(FakeEngine):
    """Breaks one rule of `Preemptible`."""

    def __init__(self, rule: str) -> None:
        super().__init__(["a", "b", "c", "d"], step_s=1.0 if rule == "continues" else 0.0)
        self.rule = rule

    async def preempt(self, request_id: str) -> None:
        if self.rule == "refuses unknown ids" and request_id not in self.active | self.preempted:
            raise KeyError(request_id)
        if self.rule not in ("does not preempt", "continues"):
            await super().preempt(request_id)
        if self.rule == "resumes by itself":
            self.resume(request_id)

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TokenDelta, None]:
        async for delta in super().stream(request):
            is_lost = self.rule == "loses text" and request.request_id == "preempted"
            yield replace(delta, text="") if is_lost else delta

    async def stop(self) -> None:
        if self.rule == "ends preempted streams":
            for request_id in self.preempted:
                self.resume(request_id)
            self._generations.clear()
        await super().stop()


@pytest.mark.parametrize(
    "rule",
    [
        "does not preempt",
        "continues",
        "resumes by itself",
        "loses text",
        "refuses unknown ids",
        "ends preempted streams",
    ],
)
def test_check_engine_rejects_an_engine_that_preempts_wrongly(rule: str) -> None:
    with pytest.raises(KeyError if rule == "refuses unknown ids" else AssertionError):
        run_virtual(check_engine(WronglyPreempting(rule)))


def test_the_fake_engine_passes_check_engine_at_any_pace() -> None:
    for step_s, prefill_s in ((0.0, 0.0), (1.0, 0.0), (0.5, 2.0)):
        run_virtual(check_engine(FakeEngine(["a", "b", "c", "d"], step_s=step_s, prefill_s=prefill_s)))
