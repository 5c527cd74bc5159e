"""Preempted requests of the bundled model: the same tokens, and memory for the open slots only."""

from __future__ import annotations

import asyncio
from math import inf

import pytest

from chatstream.engines.demo import create_engine, load
from chatstream.testing import check_engine
from chatstream.types import GenerationRequest, Message, PreparedPrompt, SamplingParams
from tests.engines.batching.lockstep import check_play, play_alone, play_at_random
from tests.engines.demo.test_runner import QUESTIONS

WARM = {"temperature": 1.5, "top_p": 0.99, "top_k": 500, "repetition_penalty": 1.2}


@pytest.mark.anyio
async def test_the_engine_keeps_the_contract() -> None:
    await check_engine(create_engine(), "Once upon a time")


@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, WARM], ids=["greedy", "seeded"])
def test_preempting_at_random_moments_changes_no_token(sampling: dict[str, float]) -> None:
    model = load()
    requests = [
        GenerationRequest(
            f"r{n}",
            PreparedPrompt(tuple(model.codec.encode_chat([Message("user", question)]))),
            SamplingParams(max_new_tokens=15 + 3 * n, seed=n, **sampling),  # type: ignore[arg-type]
        )
        for n, question in enumerate(QUESTIONS)
    ]
    expected = asyncio.run(play_alone(model, requests))
    play = asyncio.run(play_at_random(model, requests, seed=1, max_prompt_tokens_per_step=7, itl_target_s=inf))
    check_play(play, expected)
    assert play.most_slots <= play.schedule.MAX_ACTIVE
    assert play.reused_tokens > 0
    assert play.schedule.num_preempted_in_prompt > 0
    assert play.schedule.num_preempted_in_answer > 5
