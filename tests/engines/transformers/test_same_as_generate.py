"""Greedy answers have exactly the tokens that `model.generate` gives each request alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from chatstream.engines.transformers import kv_cache, slot_memory
from chatstream.engines.transformers.slot_memory import GrowingMemory
from tests.engines.transformers import checkpoints
from tests.engines.transformers.recording import NUM_MIXED, engine_on, mixed_requests, run_all

pytestmark = pytest.mark.anyio


@pytest.fixture(autouse=True)
def _slots_that_must_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Growing memory, as on a GPU. Prompts and answers outgrow their slots twice."""
    monkeypatch.setattr(kv_cache, "slot_memory", lambda states, max_slots, max_len: GrowingMemory(states, max_len))
    monkeypatch.setattr(slot_memory, "CAPACITY_STEP_TOKENS", 16)


@pytest.mark.parametrize("kind", checkpoints.BATCHED + checkpoints.ONE_BY_ONE)
def test_the_texts_of_the_checkpoints_vary(kind: str, expected: Callable[..., list[list[int]]]) -> None:
    answers = expected(kind)
    assert len({token for answer in answers for token in answer}) > 20, "the text is nearly constant"
    assert sum(map(len, answers)) > NUM_MIXED * 10, "the text ends too early"


@pytest.mark.parametrize("kind", checkpoints.BATCHED + checkpoints.ONE_BY_ONE)
async def test_a_model_that_cannot_be_batched_is_detected_and_logged(
    kind: str, checkpoint: Callable[[str], Path], caplog: pytest.LogCaptureFixture
) -> None:
    async with engine_on(checkpoint(kind)):
        lines = [record.message for record in caplog.records if "one request at a time" in record.message]
        assert len(lines) == (kind in checkpoints.ONE_BY_ONE), lines


@pytest.mark.parametrize(("concurrency", "max_prompt_tokens_per_step"), [(1, 7), (4, 7), (16, 512)])
@pytest.mark.parametrize("kind", checkpoints.BATCHED + checkpoints.ONE_BY_ONE)
async def test_greedy_tokens_are_those_of_generate_at_any_concurrency(
    kind: str,
    concurrency: int,
    max_prompt_tokens_per_step: int,
    checkpoint: Callable[[str], Path],
    expected: Callable[..., list[list[int]]],
) -> None:
    async with engine_on(checkpoint(kind), max_prompt_tokens_per_step=max_prompt_tokens_per_step) as bench:
        vocab_size = len(checkpoints.train_tokenizer())
        requests = mixed_requests(vocab_size)
        await run_all(bench.engine, requests, concurrency)
        assert [bench.recorder.tokens_of(r.prompt.token_ids) for r in requests] == expected(kind)
    assert max(len(step.generating) for step in bench.recorder.steps) == concurrency


@pytest.mark.parametrize("kind", ["llama", "mamba"])
async def test_a_repetition_penalty_is_that_of_generate(
    kind: str, checkpoint: Callable[[str], Path], expected: Callable[..., list[list[int]]]
) -> None:
    assert expected(kind, 1.7) != expected(kind)
    async with engine_on(checkpoint(kind), max_prompt_tokens_per_step=7) as bench:
        requests = mixed_requests(len(checkpoints.train_tokenizer()), repetition_penalty=1.7)
        await run_all(bench.engine, requests, 4)
        assert [bench.recorder.tokens_of(r.prompt.token_ids) for r in requests] == expected(kind, 1.7)
