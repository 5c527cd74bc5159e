"""What a newcomer's prompt costs those who generate, and what a prompt costs that begins as an earlier one.

Our engine is in a thread; each variant of its settings is a part of its own (engines_worker.py).
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterator
from contextlib import aclosing, contextmanager
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

from engines_checkpoints import CONTEXT_LEN, FIRST_WORD_ID
from engines_peers import HuggingFaceEngine

from chatstream.engines.loading.settings import LoadSettings
from chatstream.engines.transformers import create_engine
from chatstream.types import GenerationRequest, PreparedPrompt, SamplingParams, TokenMask

LONG_PROMPT_TOKENS = 1024
NUM_OTHERS = 8
OTHERS_PROMPT_TOKENS = 64
TOKENS_BEFORE = 24
"""That each of the others has when the newcomer arrives: their usual pace."""
USER_TOKENS, ANSWER_TOKENS = 64, 128
"""Of a turn of a chat."""
SYSTEM_TOKENS, NUM_NEWCOMERS = 500, 8


@contextmanager
def long_prompt(engine_of: str, model: str, dtype: str, vocab_size: int) -> Iterator[Callable[..., Any]]:
    """`answer(seed)`: a prompt of 1,024 tokens arrives beside 8 who generate.

    `engine_of` is a function of this file. `model` is a checkpoint, or for OpenVINO what was exported from it.
    Returns the largest gap of the others until the newcomer's first token, their usual time between two tokens, the
    newcomer's time to first token, and that of one like it with nobody else there; all in seconds.
    """
    with asyncio.Runner() as runner:
        engine = globals()[engine_of](model, dtype)
        runner.run(engine.start())

        async def measure(seed: int) -> dict[str, float]:
            rng = random.Random(f"{seed}")  # of a number the sign would not count
            alone_s = (await _read(engine, _words(rng, LONG_PROMPT_TOKENS, vocab_size), 1))[0]
            times: list[list[float]] = [[] for _ in range(NUM_OTHERS)]
            others = [
                asyncio.create_task(_read(engine, _words(rng, OTHERS_PROMPT_TOKENS, vocab_size), 1024, into))
                for into in times
            ]
            while min(map(len, times)) < TOKENS_BEFORE:
                await asyncio.sleep(0.005)
                for other in others:
                    if other.done():
                        other.result()  # says why, if it failed
            arrival_s = time.perf_counter()
            ttft_s = (await _read(engine, _words(rng, LONG_PROMPT_TOKENS, vocab_size), 1))[0]
            # The others' tokens of the step that gave the newcomer its first one arrive with it.
            await asyncio.sleep(0.005)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            began = max(stream[0] for stream in times)
            before = [b - a for stream in times for a, b in pairwise(stream) if a >= began and b <= arrival_s]
            during = [
                b - a for stream in times for a, b in pairwise(stream) if b > arrival_s and a < arrival_s + ttft_s
            ]
            return {
                "largest_gap_s": max(during),
                "usual_gap_s": sorted(before)[len(before) // 2],
                "ttft_s": ttft_s,
                "ttft_alone_s": alone_s,
            }

        try:
            runner.run(measure(-1))  # shapes that were never computed before, and what a step takes
            yield lambda seed: runner.run(measure(seed))
        finally:
            runner.run(engine.stop())


def ours(checkpoint: str, dtype: str) -> Any:
    return create_engine(checkpoint, load=LoadSettings(dtype=dtype, context_len=CONTEXT_LEN))


def ours_whole(checkpoint: str, dtype: str) -> Any:
    """The prompt in one step, whatever that costs the others: what a goal of short steps is compared with."""
    load = LoadSettings(dtype=dtype, context_len=CONTEXT_LEN)
    return create_engine(checkpoint, load=load, max_prompt_tokens_per_step=100_000, itl_target_s=inf)


def continuous_batching(checkpoint: str, dtype: str) -> Any:
    return HuggingFaceEngine(checkpoint, dtype, num_blocks=(NUM_OTHERS + 1) * CONTEXT_LEN // 256)


def openvino(exported: str, dtype: str) -> Any:
    from chatstream.engines import openvino
    from chatstream.engines.process import ProcessEngine

    make = partial(openvino.create_engine, exported, dtype=dtype, context_len=CONTEXT_LEN)
    return ProcessEngine(make, heartbeat_timeout_s=120.0)


@contextmanager
def conversation(model: str, dtype: str, vocab_size: int, *, prefix_cache: bool) -> Iterator[Callable[..., Any]]:
    """`answer(seed, num_turns)`: a chat, 64 tokens of the user's and 128 of the answer a turn; then 8 who come at once
    with the same system prompt of 500 tokens and 64 of their own.

    Returns the time to first token of each turn, that of each newcomer, and how many tokens of the newcomers' prompts
    were computed.
    """
    with asyncio.Runner() as runner:
        load = LoadSettings(dtype=dtype, context_len=CONTEXT_LEN, prefix_cache_bytes=None if prefix_cache else 0)
        engine = create_engine(model, load=load)
        runner.run(engine.start())

        async def measure(seed: int, num_turns: int) -> dict[str, Any]:
            rng = random.Random(f"{seed}")
            history: list[int] = []
            turns: list[float] = []
            for _ in range(num_turns):
                history += _words(rng, USER_TOKENS, vocab_size)
                answer = _Listener()
                # The mask is told of a token when the next one is due: the last one stays unknown.
                turns.append((await _read(engine, history, ANSWER_TOKENS + 1, token_mask=answer))[0])
                history += answer.token_ids
            system = _words(rng, SYSTEM_TOKENS, vocab_size)
            before = engine.stats()
            newcomers = await asyncio.gather(
                *(_read(engine, system + _words(rng, USER_TOKENS, vocab_size), 1) for _ in range(NUM_NEWCOMERS))
            )
            after = engine.stats()
            read, reused = (
                after.prompt_tokens - before.prompt_tokens,
                after.reused_prompt_tokens - before.reused_prompt_tokens,
            )
            return {
                "turn_ttft_s": turns,
                "newcomer_ttft_s": [times[0] for times in newcomers],
                "computed_tokens": read - reused,
            }

        try:
            runner.run(measure(-1, 1))
            yield lambda seed, num_turns: runner.run(measure(seed, num_turns))
        finally:
            runner.run(engine.stop())


class _Listener:
    """A token mask that allows everything, for the ids that it is told."""

    token_ids: tuple[int, ...] = ()

    def __call__(self, generated_ids: Any, /) -> None:
        self.token_ids = tuple(generated_ids)


async def _read(
    engine: Any,
    prompt: list[int],
    answer_tokens: int,
    times: list[float] | None = None,
    token_mask: TokenMask | None = None,
) -> list[float]:
    """When each token came: on the clock if `times` is there to be filled, otherwise since the question."""
    began_s = 0.0 if times is not None else time.perf_counter()
    times = [] if times is None else times
    sampling = SamplingParams(temperature=0.0, max_new_tokens=answer_tokens)
    request = GenerationRequest(f"{id(times)}", PreparedPrompt(tuple(prompt)), sampling, token_mask)
    async with aclosing(engine.stream(request)) as deltas:
        async for delta in deltas:
            times += [time.perf_counter() - began_s] * delta.num_tokens
    return times


def _words(rng: random.Random, num_tokens: int, vocab_size: int) -> list[int]:
    return [rng.randrange(FIRST_WORD_ID, vocab_size) for _ in range(num_tokens)]
