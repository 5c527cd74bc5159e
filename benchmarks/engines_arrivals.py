"""The cost of a new prompt for the generating sequences, and the cost of a prompt with a cached prefix.

Our engine runs in a thread; each variant of its settings is a separate part (engines_worker.py).
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
"""Tokens of each other sequence before the new request arrives; they define the usual gap."""
USER_TOKENS, ANSWER_TOKENS = 64, 128
"""Lengths of the user message and the answer in a turn."""
SYSTEM_TOKENS, NUM_NEWCOMERS = 500, 8


@contextmanager
def long_prompt(engine_of: str, model: str, dtype: str, vocab_size: int) -> Iterator[Callable[..., Any]]:
    """`answer(seed)`: a prompt of 1,024 tokens arrives while 8 sequences generate.

    `engine_of` names a function of this file. `model` is a checkpoint, or its export for OpenVINO. Returns, in seconds,
    the largest gap of the other sequences until the first token of the new request, their usual gap, the time to first
    token of the new request, and that of an equal request without other load.
    """
    with asyncio.Runner() as runner:
        engine = globals()[engine_of](model, dtype)
        runner.run(engine.start())

        async def measure(seed: int) -> dict[str, float]:
            rng = random.Random(f"{seed}")  # a negative int would seed like its absolute value
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
                        other.result()  # raises the error of a failed one
            arrival_s = time.perf_counter()
            ttft_s = (await _read(engine, _words(rng, LONG_PROMPT_TOKENS, vocab_size), 1))[0]
            # Wait for the tokens of the other sequences from the same step.
            await asyncio.sleep(0.005)
            for other in others:
                other.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            all_started_s = max(stream[0] for stream in times)
            before = [b - a for stream in times for a, b in pairwise(stream) if a >= all_started_s and b <= arrival_s]
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
            runner.run(measure(-1))  # warm-up: new shapes, and the step times of the prompt budget
            yield lambda seed: runner.run(measure(seed))
        finally:
            runner.run(engine.stop())


def ours(checkpoint: str, dtype: str) -> Any:
    return create_engine(checkpoint, load=LoadSettings(dtype=dtype, context_len=CONTEXT_LEN))


def ours_whole(checkpoint: str, dtype: str) -> Any:
    """Compute the prompt in one step, as the comparison for short steps."""
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
    """`answer(seed, num_turns)`: a chat, then 8 simultaneous requests with a shared system prompt.

    A turn has 64 user tokens and 128 answer tokens; the system prompt has 500 tokens, followed by 64 tokens of each
    request. Returns the time to first token of each turn and of each of the 8 requests, and the number of computed
    prompt tokens of the 8 requests.
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
                answer = _RecordingMask()
                # The mask gets a token when the next one is due, so it never gets the last one.
                turns.append((await _read(engine, history, ANSWER_TOKENS + 1, token_mask=answer))[0])
                history += answer.token_ids
            system = _words(rng, SYSTEM_TOKENS, vocab_size)
            before = engine.stats()
            simultaneous = await asyncio.gather(
                *(_read(engine, system + _words(rng, USER_TOKENS, vocab_size), 1) for _ in range(NUM_NEWCOMERS))
            )
            after = engine.stats()
            read, reused = (
                after.prompt_tokens - before.prompt_tokens,
                after.reused_prompt_tokens - before.reused_prompt_tokens,
            )
            return {
                "turn_ttft_s": turns,
                "arrival_ttft_s": [times[0] for times in simultaneous],
                "computed_tokens": read - reused,
            }

        try:
            runner.run(measure(-1, 1))
            yield lambda seed, num_turns: runner.run(measure(seed, num_turns))
        finally:
            runner.run(engine.stop())


class _RecordingMask:
    """A token mask that allows every token and records the generated ids."""

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
    """Read an answer and return the arrival of each token: clock times in `times` if given, else since the request."""
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
