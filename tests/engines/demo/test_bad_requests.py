"""A hundred bad requests of each kind in a row on the demo model: each gets its error, and other requests are
unaffected."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import numpy as np
import pytest

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.demo import load
from chatstream.engines.demo.kv_cache import KVCache
from chatstream.errors import ChatStreamError, EngineError, InvalidRequest, PromptTooLong
from chatstream.types import GenerationRequest, PreparedPrompt, SamplingParams

pytestmark = pytest.mark.anyio

NUM_BAD = 100
NAN = 900
"""A token whose logits are not finite; no other request has it."""
QUESTIONS = ("Explain ChatStream in detail, please.", "What happens when I leave?")
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=120)


@asynccontextmanager
async def fragile_engine() -> AsyncIterator[StepEngine]:
    """An engine that waits for its readers, with answers that end only at their maximum length."""
    loaded = load()
    loaded.runner.model.embedding[NAN] = np.nan  # type: ignore[attr-defined]
    loaded.codec.eos_token_ids = frozenset()
    engine = StepEngine("fragile", lambda: loaded, max_prompt_tokens_per_step=64, max_undelivered=1)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


async def generate(engine: StepEngine, prompt: PreparedPrompt) -> str:
    return "".join([delta.text async for delta in engine.stream(GenerationRequest("r", prompt, GREEDY))])


async def check_a_hundred_fail_alone(
    engine: StepEngine, bad: PreparedPrompt, error: type[ChatStreamError], message: str
) -> None:
    good = [await engine.prepare(question, GREEDY) for question in QUESTIONS]
    alone = [await generate(engine, prompt) for prompt in good]
    streams = [engine.stream(GenerationRequest(f"good {n}", prompt, GREEDY)) for n, prompt in enumerate(good)]
    texts = ["", ""]
    for n in range(NUM_BAD):
        for i, stream in enumerate(streams):
            texts[i] += (await anext(stream)).text
        with pytest.raises(error, match=message):
            await generate(engine, bad)
        if n == 9:
            before = engine.stats().prefix_cache_bytes
    assert engine.stats().num_slots == 2
    assert engine.stats().prefix_cache_bytes == before
    for i, stream in enumerate(streams):
        texts[i] += "".join([delta.text async for delta in stream])
    assert texts == alone
    assert engine.stats().num_slots == 0


@pytest.mark.parametrize(
    ("token_ids", "error", "message"),
    [
        ((5, -1), InvalidRequest, "outside the model's vocabulary"),
        ((5, 10**6), InvalidRequest, "outside the model's vocabulary"),
        ((), InvalidRequest, "the prompt is empty"),
        ((5,) * 5000, PromptTooLong, "the prompt has 5000 tokens"),
        ((5, 6, 7, NAN), EngineError, "not finite"),
    ],
    ids=["negative", "unknown", "empty", "too long", "nan"],
)
async def test_a_hundred_bad_requests_in_a_row_fail_alone(
    token_ids: tuple[int, ...], error: type[ChatStreamError], message: str
) -> None:
    async with fragile_engine() as engine:
        await check_a_hundred_fail_alone(engine, PreparedPrompt(token_ids), error, message)


async def test_a_hundred_requests_without_memory_in_a_row_fail_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    reserve = KVCache.reserve

    def limited_reserve(cache: KVCache, num_tokens: int) -> None:
        if num_tokens > KVCache.FIRST_TOKENS:
            raise MemoryError("no memory for this prompt")
        reserve(cache, num_tokens)

    monkeypatch.setattr(KVCache, "reserve", limited_reserve)
    async with fragile_engine() as engine:
        await check_a_hundred_fail_alone(engine, PreparedPrompt((5,) * 300), EngineError, "no memory")
