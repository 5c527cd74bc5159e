"""In float32, greedy answers match, token for token, transformers' `generate` with the exported weights."""

from __future__ import annotations

import asyncio
import random
from functools import cache
from typing import Any

import openvino
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from chatstream.types import GenerationRequest, SamplingParams
from tests.engines.openvino.recording import TINY, VOCAB_SIZE, close_after, engine_on, greedy, request_of, run_all

pytestmark = pytest.mark.anyio

NUM_REQUESTS = 12


@cache
def reference() -> LlamaForCausalLM:
    """The exported weights, loaded into transformers."""
    model = LlamaForCausalLM(LlamaConfig.from_pretrained(TINY))
    exported = openvino.Core().read_model(TINY / "openvino_model.xml")
    weights = {
        op.get_friendly_name().removeprefix("self."): torch.tensor(op.data)
        for op in exported.get_ops()
        if op.get_type_name() == "Constant" and op.get_friendly_name().endswith(".weight")
    }
    missing, unexpected = model.load_state_dict(weights, strict=False)
    assert not unexpected
    assert all("norm" in name for name in missing)  # all ones in the file and in a new model
    return model.eval()


def generate_alone(request: GenerationRequest) -> list[int]:
    ids = torch.tensor([request.prompt.token_ids])
    model: Any = reference()
    with torch.inference_mode():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.sampling.max_new_tokens,
            repetition_penalty=request.sampling.repetition_penalty,
            eos_token_id=[1, 3],
            pad_token_id=1,
        )
    return [int(token) for token in output[0, ids.shape[1] :]]


def mixed_requests(**sampling: Any) -> list[GenerationRequest]:
    """Requests whose prompts take one to several steps and whose answers differ in length, so that they start and end
    at all times."""
    rng = random.Random(5)
    requests = []
    for n in range(NUM_REQUESTS):
        prompt = [rng.randrange(4, VOCAB_SIZE) for _ in range((1, 3, 8, 21, 34, 55)[n % 6] + n)]
        requests.append(request_of(prompt, greedy(rng.randint(8, 40), **sampling), f"r{n}"))
    return requests


def test_answers_of_the_random_model_vary_enough_to_detect_errors() -> None:
    answers = [generate_alone(request) for request in mixed_requests()]
    assert len({token for answer in answers for token in answer}) > 50, "the text is nearly constant"
    assert sum(map(len, answers)) > NUM_REQUESTS * 15, "the text ends too early"


@pytest.mark.parametrize("prefix_cache_bytes", [None, 0])
@pytest.mark.parametrize("concurrency", [1, 4, 8])
async def test_greedy_tokens_are_those_of_generate_whatever_other_requests_run(
    concurrency: int, prefix_cache_bytes: int | None
) -> None:
    requests = mixed_requests()
    async with engine_on(step_tokens=16, prefix_cache_bytes=prefix_cache_bytes) as bench:
        await run_all(bench.engine, requests, concurrency)
    assert bench.pipeline.max_running == concurrency
    assert [bench.pipeline.tokens_of(r) for r in requests] == [generate_alone(r) for r in requests]


async def test_disconnects_at_any_moment_change_no_other_answer() -> None:
    requests = mixed_requests()
    disconnecting = [request_of([7 + n] * (1 + 5 * n), greedy(60), f"closed-{n}") for n in range(15)]
    async with engine_on(step_tokens=16) as bench:

        async def connect_and_disconnect() -> None:
            for n, request_to_close in enumerate(disconnecting):
                await close_after(bench.engine, request_to_close, n % 4)

        await asyncio.gather(run_all(bench.engine, requests, 4), connect_and_disconnect())
    assert [bench.pipeline.tokens_of(r) for r in requests] == [generate_alone(r) for r in requests]


async def test_a_conversation_reuses_the_prefix_cache_and_stays_exact() -> None:
    """Earlier turns are in the prefix cache; the answer is the same as without the cache."""
    rng = random.Random(3)
    async with engine_on(step_tokens=16) as bench:
        history: list[int] = []
        steps = []
        for turn in range(3):
            history += [rng.randrange(4, VOCAB_SIZE) for _ in range(33)]
            request = request_of(history, greedy(6), f"turn-{turn}")
            before = bench.pipeline.num_steps
            await run_all(bench.engine, [request], 1)
            steps.append(bench.pipeline.num_steps - before)
            assert bench.pipeline.tokens_of(request) == generate_alone(request)
            history += bench.pipeline.tokens_of(request)
    # With 16 tokens a step the third prompt takes 7 steps; all but its last blocks are cached.
    assert steps[2] < steps[0] + 2, steps


async def test_the_repetition_penalty_is_that_of_generate() -> None:
    requests = mixed_requests(repetition_penalty=1.7)
    expected = [generate_alone(r) for r in requests]
    assert expected != [generate_alone(r) for r in mixed_requests()]
    async with engine_on(step_tokens=16) as bench:
        await run_all(bench.engine, requests, 4)
    assert [bench.pipeline.tokens_of(r) for r in requests] == expected


async def test_the_same_seed_gives_the_same_text_whatever_other_requests_run() -> None:
    def sampled(seed: int) -> GenerationRequest:
        params = SamplingParams(max_new_tokens=30, temperature=1.0, top_k=50, top_p=0.95, min_p=0.01, seed=seed)
        return request_of([9, 8, 7], params, f"seed-{seed}")

    seeds = [0, 1, -1, 2**64 - 1, 2**33]
    async with engine_on(step_tokens=16) as bench:
        alone = [(await run_all(bench.engine, [sampled(seed)], 1))[0] for seed in seeds]
        together = await run_all(bench.engine, [*map(sampled, seeds), *mixed_requests()], 8)
    assert together[: len(seeds)] == alone
    assert len(set(alone)) == 4, "-1 and 2**64 - 1 are one seed, the others are others"


async def test_without_a_seed_all_texts_differ() -> None:
    request = request_of([9, 8, 7], SamplingParams(max_new_tokens=30))
    async with engine_on() as bench:
        assert len(set(await run_all(bench.engine, [request] * 5, 5))) == 5
