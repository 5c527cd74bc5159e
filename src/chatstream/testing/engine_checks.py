"""Check an engine against the contract in `chatstream.engines.base`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from dataclasses import replace
from typing import cast

from chatstream.engines.base import Engine, Preemptible
from chatstream.errors import EngineUnavailable, UnsupportedParameter
from chatstream.types import GenerationRequest, Message, PromptInput, SamplingParams, TokenDelta

HELLO: PromptInput = (Message("user", "Hello"),)
SEEDED = SamplingParams(max_new_tokens=8, seed=1)
GREEDY = SamplingParams(max_new_tokens=8, temperature=0.0)
MAX_ATTEMPTS = 50
"""Attempts to preempt a generation before its end. Each one fails if the generation ends first."""
NUM_IDLE_TICKS = 20
"""Event loop ticks without a delta after which no delta is available without waiting."""


async def check_engine(engine: Engine, prompt: PromptInput = HELLO) -> None:
    """Start the engine, run generations alone and concurrently, cancel some at every stage, and stop it.

    If `capacity.can_preempt`, generations are preempted and resumed too. An engine that does not refuse `logprobs` must
    deliver them. The answer to `prompt` must have at least two deltas. Raises `AssertionError` with the broken rule.
    """
    await engine.start()
    assert engine.health().is_ready, "health().is_ready is true after start()"
    alone = await _generate(engine, prompt, "alone")
    assert len(alone) >= 2, "the answer to the prompt has at least two deltas (otherwise pass another prompt)"

    await _close_after(engine, prompt, 0)
    await _close_after(engine, prompt, 1)
    await _cancel_before_first_delta(engine, prompt)
    if engine.capacity.can_preempt:
        await _check_preemption(engine, prompt)
    await _check_logprobs(engine, prompt)

    together = await asyncio.gather(*(_generate(engine, prompt, f"together-{n}") for n in range(3)))
    for deltas in together:
        assert deltas[-1].usage is not None, "the last delta has usage, also with concurrent requests"
    assert engine.health().is_ready, "health().is_ready is true after streams were closed and cancelled"
    preempted = await _preempted_reader(engine, prompt) if engine.capacity.can_preempt else None
    await engine.stop()
    await engine.stop()
    assert not engine.health().is_ready, "health().is_ready is false after stop()"
    if preempted is not None:
        await preempted.check_stopped()


async def _generate(
    engine: Engine, prompt: PromptInput, request_id: str, sampling: SamplingParams = SEEDED
) -> list[TokenDelta]:
    request = await _request(engine, prompt, request_id, sampling)
    async with aclosing(engine.stream(request)) as stream:
        deltas = [delta async for delta in stream]
    _check_deltas(deltas)
    return deltas


def _check_deltas(deltas: list[TokenDelta]) -> None:
    assert deltas, "a stream yields at least one delta"
    assert all(d.finish_reason is None and d.usage is None for d in deltas[:-1]), (
        "only the last delta has a finish_reason and usage"
    )
    assert deltas[-1].finish_reason is not None, "the last delta has a finish_reason"
    assert deltas[-1].usage is not None, "the last delta has usage"
    assert sum(d.num_tokens for d in deltas) == deltas[-1].usage.completion_tokens, (
        "the num_tokens of all deltas add up to usage.completion_tokens"
    )
    first = next((n for n, delta in enumerate(deltas) if delta.num_tokens), len(deltas) - 1)
    num_prompt_tokens = sum(delta.num_prompt_tokens for delta in deltas)
    assert num_prompt_tokens == sum(delta.num_prompt_tokens for delta in deltas[: first + 1]), (
        "no delta after the first answer token has num_prompt_tokens"
    )
    assert num_prompt_tokens in (0, deltas[-1].usage.prompt_tokens), (
        "the num_prompt_tokens of all deltas add up to usage.prompt_tokens, or are all 0"
    )


async def _check_logprobs(engine: Engine, prompt: PromptInput) -> None:
    try:
        deltas = await _generate(engine, prompt, "logprobs", replace(SEEDED, logprobs=2))
    except UnsupportedParameter:
        return
    for delta in deltas:
        assert len(delta.logprobs) == delta.num_tokens, (
            "each token has a log probability, or prepare() refuses logprobs with UnsupportedParameter"
        )


async def _close_after(engine: Engine, prompt: PromptInput, num_deltas: int) -> None:
    stream = engine.stream(await _request(engine, prompt, f"closed-after-{num_deltas}"))
    for _ in range(num_deltas):
        await anext(stream)
    await stream.aclose()


async def _cancel_before_first_delta(engine: Engine, prompt: PromptInput) -> None:
    reader = _Reader(engine, await _request(engine, prompt, "cancelled"))
    await reader.wait_deltas(0)
    await reader.cancel()


async def _request(
    engine: Engine, prompt: PromptInput, request_id: str, sampling: SamplingParams = SEEDED
) -> GenerationRequest:
    return GenerationRequest(request_id, await engine.prepare(prompt, sampling), sampling)


class _Reader:
    """Reads one stream in its own task."""

    def __init__(self, engine: Engine, request: GenerationRequest) -> None:
        self.deltas: list[TokenDelta] = []
        self.has_ended = False
        self._progress = asyncio.Event()
        self._stream = engine.stream(request)
        self._task = asyncio.create_task(self._read())

    async def _read(self) -> None:
        try:
            async with aclosing(self._stream):
                async for delta in self._stream:
                    self.deltas.append(delta)
                    self._progress.set()
        finally:
            self.has_ended = True
            self._progress.set()

    async def wait_deltas(self, count: int) -> None:
        """Wait for `count` deltas or the end of the stream. With 0, only until the first delta has been requested."""
        await asyncio.sleep(0)  # the first step of the task requests it
        while len(self.deltas) < count and not self.has_ended:
            self._progress.clear()
            await self._progress.wait()

    async def read_available(self) -> None:
        """Read the deltas that are available without waiting."""
        num_before = -1
        while num_before < len(self.deltas):
            num_before = len(self.deltas)
            for _ in range(NUM_IDLE_TICKS):
                await asyncio.sleep(0)

    async def wait_ended(self) -> str:
        """Wait for the end of the stream; returns the whole text."""
        await self._task
        _check_deltas(self.deltas)
        return "".join(delta.text for delta in self.deltas)

    async def cancel(self) -> None:
        if self._task.done():
            return
        self._task.cancel()
        try:
            await self._task
        except asyncio.CancelledError:
            return
        raise AssertionError("a cancelled stream raises CancelledError")

    async def check_stopped(self) -> None:
        try:
            await self._task
        except EngineUnavailable:
            return
        raise AssertionError("stop() ends a preempted stream with EngineUnavailable")


# --- preemption ------------------------------------------------------------------------------------------------------

PREEMPTED = "preempted"
MAX_PREEMPTED = 64
"""Limit of the streams that are preempted and cancelled, for an engine with a large `max_concurrency`."""


async def _check_preemption(engine: Engine, prompt: PromptInput) -> None:
    for sampling in (SEEDED, GREEDY):
        expected = "".join(delta.text for delta in await _generate(engine, prompt, "alone", sampling))
        for num_deltas in range(3):
            reader = _Reader(engine, await _request(engine, prompt, PREEMPTED, sampling))
            try:
                await reader.wait_deltas(num_deltas)
                assert await _read_with_preemptions(engine, prompt, reader) == expected, (
                    "preemption does not change the answer"
                )
            finally:
                await reader.cancel()
    preemptible = cast(Preemptible, engine)
    for request_id in (PREEMPTED, "unknown"):
        await preemptible.preempt(request_id)
        preemptible.resume(request_id)
    for _ in range(1 + min(engine.capacity.max_concurrency or 0, MAX_PREEMPTED)):
        await (await _preempted_reader(engine, prompt)).cancel()
    await _generate(engine, prompt, PREEMPTED)  # the cancelled streams with this id left no state


async def _read_with_preemptions(engine: Engine, prompt: PromptInput, reader: _Reader) -> str:
    preemptible = cast(Preemptible, engine)
    for _ in range(2):
        await _preempt(preemptible, reader)
        num_deltas = len(reader.deltas)
        await _generate(engine, prompt, "other")  # gives the preempted request the time of a whole answer
        await reader.read_available()
        assert len(reader.deltas) == num_deltas, "a preempted request generates no tokens"
        preemptible.resume(PREEMPTED)
    preempt = asyncio.create_task(preemptible.preempt(PREEMPTED))
    await asyncio.sleep(0)
    preemptible.resume(PREEMPTED)  # overrides `preempt`, whether that has taken effect or not
    await preempt
    return await reader.wait_ended()


async def _preempt(preemptible: Preemptible, reader: _Reader) -> None:
    await preemptible.preempt(PREEMPTED)
    await preemptible.preempt(PREEMPTED)
    await reader.read_available()


async def _preempted_reader(engine: Engine, prompt: PromptInput) -> _Reader:
    """Open a stream and preempt it before its end."""
    for _ in range(MAX_ATTEMPTS):
        reader = _Reader(engine, await _request(engine, prompt, PREEMPTED))
        await reader.wait_deltas(0)
        await _preempt(cast(Preemptible, engine), reader)
        if not reader.has_ended:
            return reader
        await reader.wait_ended()
    raise AssertionError(f"preempt() suspends a generation ({MAX_ATTEMPTS} streams ended in spite of it)")
