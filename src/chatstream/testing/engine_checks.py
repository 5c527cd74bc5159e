"""Checks any engine against the contract in `chatstream.engines.base`."""

from __future__ import annotations

import asyncio
from contextlib import aclosing

from chatstream.engines.base import Engine
from chatstream.types import GenerationRequest, Message, PromptInput, SamplingParams, TokenDelta

HELLO: PromptInput = (Message("user", "Hello"),)


async def check_engine(engine: Engine, prompt: PromptInput = HELLO) -> None:
    """Start the engine, generate alone and side by side, leave early at every stage, stop it.

    The answer to `prompt` must be at least two tokens long. Raises `AssertionError` saying what is broken.
    """
    await engine.start()
    assert engine.health().is_ready, "ready after start"
    alone = await _generate(engine, prompt, "alone")
    assert len(alone) >= 2, "the prompt must give at least two tokens for these checks"

    await _leave_after(engine, prompt, 0)
    await _leave_after(engine, prompt, 1)
    await _cancel_while_it_waits(engine, prompt)

    together = await asyncio.gather(*(_generate(engine, prompt, f"together-{n}") for n in range(3)))
    for deltas in together:
        assert deltas[-1].usage is not None, "usage is told while others run, too"
    assert engine.health().is_ready, "still ready after clients have left"
    await engine.stop()
    await engine.stop()
    assert not engine.health().is_ready, "not ready after stop"


async def _generate(engine: Engine, prompt: PromptInput, request_id: str) -> list[TokenDelta]:
    request = await _request(engine, prompt, request_id)
    async with aclosing(engine.stream(request)) as stream:
        deltas = [delta async for delta in stream]
    assert deltas, "a stream yields at least one delta"
    assert all(d.finish_reason is None and d.usage is None for d in deltas[:-1]), "only the last delta ends the stream"
    assert deltas[-1].finish_reason is not None, "the last delta says why the stream ended"
    assert deltas[-1].usage is not None, "the last delta carries the usage"
    assert sum(d.num_tokens for d in deltas) == deltas[-1].usage.completion_tokens, "token counts add up"
    return deltas


async def _leave_after(engine: Engine, prompt: PromptInput, num_deltas: int) -> None:
    stream = engine.stream(await _request(engine, prompt, f"leaves-after-{num_deltas}"))
    for _ in range(num_deltas):
        await anext(stream)
    await stream.aclose()


async def _cancel_while_it_waits(engine: Engine, prompt: PromptInput) -> None:
    stream = engine.stream(await _request(engine, prompt, "cancelled"))

    async def read() -> None:
        async with aclosing(stream):
            async for _ in stream:
                pass

    task = asyncio.create_task(read())
    await asyncio.sleep(0)
    task.cancel()
    try:
        await task
    except asyncio.CancelledError:
        return
    raise AssertionError("a cancelled stream lets CancelledError pass")


async def _request(engine: Engine, prompt: PromptInput, request_id: str) -> GenerationRequest:
    sampling = SamplingParams(max_new_tokens=8, seed=1)
    return GenerationRequest(request_id, await engine.prepare(prompt, sampling), sampling)
