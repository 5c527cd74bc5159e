"""Checks any engine against the contract in `chatstream.engines.base`."""

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
"""A generation may be over before `preempt` takes effect; so often in a row it is not."""
NUM_IDLE_TURNS = 20
"""Turns of the event loop in which a reader takes what can be read without waiting."""


async def check_engine(engine: Engine, prompt: PromptInput = HELLO) -> None:
    """Start the engine, generate alone and side by side, leave early at every stage, stop it.

    An engine that says it can preempt is preempted and resumed, too; one that does not refuse `logprobs` must tell
    them. The answer to `prompt` must be at least two tokens long. Raises `AssertionError` saying what is broken.
    """
    await engine.start()
    assert engine.health().is_ready, "ready after start"
    alone = await _generate(engine, prompt, "alone")
    assert len(alone) >= 2, "the prompt must give at least two tokens for these checks"

    await _leave_after(engine, prompt, 0)
    await _leave_after(engine, prompt, 1)
    await _cancel_while_it_waits(engine, prompt)
    if engine.capacity.can_preempt:
        await _check_preempting(engine, prompt)
    await _check_logprobs(engine, prompt)

    together = await asyncio.gather(*(_generate(engine, prompt, f"together-{n}") for n in range(3)))
    for deltas in together:
        assert deltas[-1].usage is not None, "usage is told while others run, too"
    assert engine.health().is_ready, "still ready after clients have left"
    preempted = await _leave_preempted(engine, prompt) if engine.capacity.can_preempt else None
    await engine.stop()
    await engine.stop()
    assert not engine.health().is_ready, "not ready after stop"
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
    assert all(d.finish_reason is None and d.usage is None for d in deltas[:-1]), "only the last delta ends the stream"
    assert deltas[-1].finish_reason is not None, "the last delta says why the stream ended"
    assert deltas[-1].usage is not None, "the last delta carries the usage"
    assert sum(d.num_tokens for d in deltas) == deltas[-1].usage.completion_tokens, "token counts add up"
    first = next((n for n, delta in enumerate(deltas) if delta.num_tokens), len(deltas) - 1)
    read = sum(delta.num_prompt_tokens for delta in deltas)
    assert read == sum(delta.num_prompt_tokens for delta in deltas[: first + 1]), "a prompt is read before the answer"
    assert read in (0, deltas[-1].usage.prompt_tokens), "prompt token counts add up, or are not told"


async def _check_logprobs(engine: Engine, prompt: PromptInput) -> None:
    try:
        deltas = await _generate(engine, prompt, "logprobs", replace(SEEDED, logprobs=2))
    except UnsupportedParameter:
        return
    for delta in deltas:
        assert len(delta.logprobs) == delta.num_tokens, "a log probability for each token, or logprobs are refused"


async def _leave_after(engine: Engine, prompt: PromptInput, num_deltas: int) -> None:
    stream = engine.stream(await _request(engine, prompt, f"leaves-after-{num_deltas}"))
    for _ in range(num_deltas):
        await anext(stream)
    await stream.aclose()


async def _cancel_while_it_waits(engine: Engine, prompt: PromptInput) -> None:
    reader = _Reader(engine, await _request(engine, prompt, "cancelled"))
    await reader.wait_deltas(0)
    await reader.cancel()


async def _request(
    engine: Engine, prompt: PromptInput, request_id: str, sampling: SamplingParams = SEEDED
) -> GenerationRequest:
    return GenerationRequest(request_id, await engine.prepare(prompt, sampling), sampling)


class _Reader:
    """Reads one stream in a task of its own, whose first step asks for the first delta."""

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
        """Returns when there are so many, or when the stream has ended. With 0: when it was asked for the first."""
        await asyncio.sleep(0)
        while len(self.deltas) < count and not self.has_ended:
            self._progress.clear()
            await self._progress.wait()

    async def catch_up(self) -> None:
        """Take what can be read without waiting."""
        num_before = -1
        while num_before < len(self.deltas):
            num_before = len(self.deltas)
            for _ in range(NUM_IDLE_TURNS):
                await asyncio.sleep(0)

    async def wait_ended(self) -> str:
        """The whole text."""
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
        raise AssertionError("a cancelled stream lets CancelledError pass")

    async def check_stopped(self) -> None:
        try:
            await self._task
        except EngineUnavailable:
            return
        raise AssertionError("stop ends a preempted stream with EngineUnavailable")


# --- preemption ------------------------------------------------------------------------------------------------------

PREEMPTED = "preempted"
MANY = 64
"""Of an engine whose capacity only its memory bounds, not all of it is tried."""


async def _check_preempting(engine: Engine, prompt: PromptInput) -> None:
    for sampling in (SEEDED, GREEDY):
        expected = "".join(delta.text for delta in await _generate(engine, prompt, "alone", sampling))
        for num_deltas in range(3):
            reader = _Reader(engine, await _request(engine, prompt, PREEMPTED, sampling))
            try:
                await reader.wait_deltas(num_deltas)
                assert await _preempted_again_and_again(engine, prompt, reader) == expected, (
                    "preempting changes no answer"
                )
            finally:
                await reader.cancel()
    preemptible = cast(Preemptible, engine)
    for request_id in (PREEMPTED, "never-heard-of"):
        await preemptible.preempt(request_id)
        preemptible.resume(request_id)
    for _ in range(1 + min(engine.capacity.max_concurrency or 0, MANY)):
        await (await _leave_preempted(engine, prompt)).cancel()
    await _generate(engine, prompt, PREEMPTED)  # nothing is left of those who were cancelled while preempted


async def _preempted_again_and_again(engine: Engine, prompt: PromptInput, reader: _Reader) -> str:
    preemptible = cast(Preemptible, engine)
    for _ in range(2):
        await _preempt(preemptible, reader)
        num_deltas = len(reader.deltas)
        await _generate(engine, prompt, "beside")  # a whole answer's time
        await reader.catch_up()
        assert len(reader.deltas) == num_deltas, "nothing is generated while preempted"
        preemptible.resume(PREEMPTED)
    preempt = asyncio.create_task(preemptible.preempt(PREEMPTED))
    await asyncio.sleep(0)
    preemptible.resume(PREEMPTED)  # before it took effect or after: the last word counts
    await preempt
    return await reader.wait_ended()


async def _preempt(preemptible: Preemptible, reader: _Reader) -> None:
    await preemptible.preempt(PREEMPTED)
    await preemptible.preempt(PREEMPTED)
    await reader.catch_up()


async def _leave_preempted(engine: Engine, prompt: PromptInput) -> _Reader:
    """A stream that is preempted before its end."""
    for _ in range(MAX_ATTEMPTS):
        reader = _Reader(engine, await _request(engine, prompt, PREEMPTED))
        await reader.wait_deltas(0)
        await _preempt(cast(Preemptible, engine), reader)
        if not reader.has_ended:
            return reader
        await reader.wait_ended()
    raise AssertionError("preempt holds a generation")
