"""A hundred bad requests of each kind in a row: each fails with its error, others are unaffected, no memory leaks."""

from __future__ import annotations

import gc
import logging
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.transformers import create_engine, kv_cache
from chatstream.engines.transformers.slot_memory import GrowingMemory
from chatstream.errors import ChatStreamError, EngineError, InvalidRequest, PromptTooLong
from chatstream.types import TokenDelta
from tests.engines.transformers.checkpoints import CONTEXT_LEN
from tests.engines.transformers.recording import collect, greedy, prompt_of, request_of

pytestmark = pytest.mark.anyio

NUM_BAD = 100
STEP_BYTES = 16 * 1024
"""More than the tensors of one step of these models, and less than a leak of 90 requests."""
NAN, HUGE = 30, 31
"""Tokens that give NaN logits, and that fail with out of memory. Other requests do not have them."""


@asynccontextmanager
async def engine_with_bad_tokens(path: Path, tokenizer: PreTrainedTokenizerFast) -> AsyncIterator[StepEngine]:
    """An engine with prompts in parts and a window of one delta: a request generates only while it is read."""
    model: Any = AutoModelForCausalLM.from_pretrained(path)
    model.get_input_embeddings().weight.data[NAN] = float("nan")

    def refuse(_module: object, _args: object, kwargs: dict[str, Any]) -> None:
        if (kwargs["input_ids"] == HUGE).any():
            raise torch.OutOfMemoryError("out of memory")

    model.register_forward_pre_hook(refuse, with_kwargs=True)
    engine = create_engine(model, tokenizer, max_prompt_tokens_per_step=5, max_undelivered=1)
    await engine.start()
    try:
        yield engine
    finally:
        await engine.stop()


@pytest.fixture(autouse=True)
def _no_records(caplog: pytest.LogCaptureFixture) -> None:
    """Log records that pytest keeps reference tracebacks, and so tensors."""
    caplog.set_level(logging.CRITICAL, "chatstream")


def tensor_bytes() -> int:
    gc.collect()
    return sum(thing.nbytes for thing in gc.get_objects() if issubclass(type(thing), torch.Tensor))


async def tensor_bytes_after_a_command(engine: StepEngine) -> int:
    """Tensor bytes after a round trip to the engine thread, when the tensors of the last step are released."""
    await engine.preempt("unknown")
    return tensor_bytes()


def text_of(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)


async def check_a_hundred_fail_alone(
    engine: StepEngine,
    bad_prompt: list[int],
    message: str,
    error: type[ChatStreamError] = EngineError,
    *,
    bytes_per_token: int = 0,
) -> None:
    """Run bad requests one by one while two others generate, and compare the texts of those with texts alone.

    `bytes_per_token`: growth of the two others' memory.
    """
    good = [request_of(prompt_of(6 + n, seed=n), greedy(140), f"good {n}") for n in range(3)]
    alone = [await collect(engine, request) for request in good]
    assert min(map(len, alone[:2])) > NUM_BAD + 1, "the other requests would end before the last failure"
    streams = [engine.stream(request) for request in good[:2]]
    texts = ["", ""]
    prefix_cache_bytes: list[int] = []
    used_bytes: list[int] = []
    for n in range(NUM_BAD):
        for i, stream in enumerate(streams):
            texts[i] += (await anext(stream)).text
        with pytest.raises(error) as caught:
            await collect(engine, request_of(bad_prompt, greedy(20), f"bad {n}"))
        assert message in str(caught.value)
        del caught
        if n in (9, NUM_BAD - 1):  # the first requests may have allocated another slot
            prefix_cache_bytes.append(engine.stats().prefix_cache_bytes)
            used_bytes.append(min([await tensor_bytes_after_a_command(engine) for _ in range(2)]))
    assert engine.stats().num_slots == 2
    assert prefix_cache_bytes[0] == prefix_cache_bytes[1]
    assert used_bytes[1] < used_bytes[0] + 2 * (NUM_BAD - 10) * bytes_per_token + STEP_BYTES
    for i, stream in enumerate(streams):
        texts[i] += text_of([delta async for delta in stream])
    assert texts == [text_of(deltas) for deltas in alone[:2]]
    assert text_of(await collect(engine, good[2])) == text_of(alone[2])
    assert engine.stats().num_slots == 0
    assert engine.health().is_ready


@pytest.mark.parametrize(
    ("bad_prompt", "message", "error"),
    [
        ([5, -1], "outside the model's vocabulary", InvalidRequest),
        ([5, 10**6], "outside the model's vocabulary", InvalidRequest),
        ([5, 2**70], "refused", EngineError),
        ([], "the prompt is empty", InvalidRequest),
        (prompt_of(CONTEXT_LEN, seed=9), f"the prompt has {CONTEXT_LEN} tokens", PromptTooLong),
        ([*prompt_of(8, seed=4), NAN], "not finite", EngineError),
        ([*prompt_of(8, seed=4), HUGE, *prompt_of(4, seed=5)], "out of memory", EngineError),
    ],
    ids=["negative", "unknown", "beyond 64 bits", "empty", "too long", "nan", "out of memory"],
)
async def test_a_hundred_bad_requests_in_a_row_fail_alone(
    bad_prompt: list[int],
    message: str,
    error: type[ChatStreamError],
    checkpoint: Callable[[str], Path],
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    async with engine_with_bad_tokens(checkpoint("llama"), tokenizer) as engine:
        await check_a_hundred_fail_alone(engine, bad_prompt, message, error)


async def test_a_hundred_bad_requests_fail_alone_in_an_engine_that_is_not_batched(
    checkpoint: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast
) -> None:
    async with engine_with_bad_tokens(checkpoint("llama_dynamic_rope"), tokenizer) as engine:
        assert not engine.stats().is_batched
        await check_a_hundred_fail_alone(engine, [*prompt_of(8, seed=4), NAN], "not finite", bytes_per_token=256)


async def test_a_hundred_requests_fail_alone_when_the_slots_cannot_grow(
    checkpoint: Callable[[str], Path], tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No memory for a third slot: neither to compute in it nor to load a cached prefix into it."""

    class AtMostTwo(GrowingMemory):
        def reserve(self, num_slots: int, num_tokens: int) -> None:
            if num_slots > 2:
                raise torch.OutOfMemoryError("no memory for another slot")
            super().reserve(num_slots, num_tokens)

    monkeypatch.setattr(kv_cache, "slot_memory", lambda states, max_slots, max_len: AtMostTwo(states, max_len))
    async with engine_with_bad_tokens(checkpoint("llama"), tokenizer) as engine:
        await check_a_hundred_fail_alone(engine, prompt_of(12, seed=9), "no memory for another slot")
        cached_prompt = prompt_of(60, seed=9)
        _ = await collect(engine, request_of(cached_prompt, greedy(2)))
        await check_a_hundred_fail_alone(engine, cached_prompt, "no memory for another slot")
