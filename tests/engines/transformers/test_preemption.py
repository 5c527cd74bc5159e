"""Preempted generations of models that are batched over slots, and of models that run one by one."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from math import inf
from pathlib import Path

import pytest

from chatstream.engines.transformers import create_engine
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.testing import check_engine
from chatstream.types import SamplingParams
from tests.engines.batching.lockstep import check_play, play_alone, play_at_random
from tests.engines.transformers.recording import prompt_of, request_of

WARM = {"temperature": 1.2, "top_p": 0.95, "repetition_penalty": 1.3}


@pytest.mark.anyio
async def test_the_engine_keeps_the_contract_of_engines(checkpoint: Callable[[str], Path]) -> None:
    await check_engine(create_engine(str(checkpoint("llama")), load=LoadSettings(device="cpu")))


@pytest.mark.parametrize("kind", ["llama", "gemma3", "mamba"])
@pytest.mark.parametrize("sampling", [{"temperature": 0.0}, WARM], ids=["greedy", "seeded"])
def test_preemption_at_random_moments_changes_no_token(
    sampling: dict[str, float], kind: str, checkpoint: Callable[[str], Path]
) -> None:
    model = load(str(checkpoint(kind)), None, LoadSettings(device="cpu"))
    requests = [
        request_of(prompt_of(5 + 4 * n, seed=n), SamplingParams(max_new_tokens=30, seed=n, **sampling), f"r{n}")  # type: ignore[arg-type]
        for n in range(9)
    ]
    expected = asyncio.run(play_alone(model, requests))
    play = asyncio.run(play_at_random(model, requests, seed=1, max_prompt_tokens_per_step=7, itl_target_s=inf))
    check_play(play, expected)
    assert play.most_slots <= play.schedule.MAX_ACTIVE
    assert play.reused_tokens > 0
    assert play.schedule.num_preempted_in_prompt > 0
    assert play.schedule.num_preempted_in_answer > 5
