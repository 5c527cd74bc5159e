"""Ways to generate text for several clients at once, ours and others', each behind one function.

A peer is a context manager over the directory of a checkpoint. It yields a function of prompts and a number of tokens,
which starts all requests at the same time, generates answers of that length and returns the arrival of each token:

    {"times": [[seconds since the requests, one per token], one list per prompt]}

Each peer runs in its own process (engines_worker.py). Libraries are imported where they are used: not every process has
all of them.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

Prompts = list[list[int]]
Timed = dict[str, Any]
Generate = Callable[[Prompts, int], Timed]

PREFILL_TOKENS = 512
"""Prompt tokens per pass of the loops in this file; also the maximum per step of our engine."""


@contextmanager
def round_robin(checkpoint: str, dtype: str) -> Iterator[Generate]:
    """The original ChatStream: a cache per request, a pass per token, one request after the other."""
    import torch
    from transformers import DynamicCache

    model = _load_model(checkpoint, dtype)

    @torch.inference_mode()
    def generate(prompts: Prompts, answer_tokens: int) -> Timed:
        clock = Clock(len(prompts))
        caches = [DynamicCache(config=model.config) for _ in prompts]
        newest = [torch.tensor([prompt]) for prompt in prompts]
        for _ in range(answer_tokens):
            for n, cache in enumerate(caches):
                output = model(input_ids=newest[n], past_key_values=cache, use_cache=True, logits_to_keep=1)
                newest[n] = output.logits[:, -1].argmax(-1, keepdim=True)
                clock.note(n)
        return clock.timed()

    yield generate


@contextmanager
def padded_generate(checkpoint: str, dtype: str) -> Iterator[Generate]:
    """`model.generate` of transformers on one left-padded batch."""
    import torch
    from transformers import GenerationConfig
    from transformers.generation.streamers import BaseStreamer

    model = _load_model(checkpoint, dtype)

    class Watch(BaseStreamer):  # type: ignore[misc]
        """A streamer that gets the prompt first, then each step."""

        def __init__(self, clock: Clock, num_streams: int) -> None:
            self._clock, self._num_streams, self._has_prompt = clock, num_streams, False

        def put(self, value: object) -> None:
            if self._has_prompt:
                self._clock.note(*range(self._num_streams))
            self._has_prompt = True

        def end(self) -> None:
            pass

    def generate(prompts: Prompts, answer_tokens: int) -> Timed:
        longest = max(map(len, prompts))
        ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts])
        mask = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        config = GenerationConfig(max_new_tokens=answer_tokens, do_sample=False, pad_token_id=0)
        clock = Clock(len(prompts))
        model.generate(ids, attention_mask=mask, generation_config=config, streamer=Watch(clock, len(prompts)))
        return clock.timed()

    yield generate


@contextmanager
def continuous_batching(checkpoint: str, dtype: str, num_blocks: int) -> Iterator[Generate]:
    """The continuous batching of transformers."""
    with through(HuggingFaceEngine(checkpoint, dtype, num_blocks)) as generate:
        yield generate


@contextmanager
def openvino_steps(exported: str, dtype: str, context_len: int) -> Iterator[Generate]:
    """The bare steps of OpenVINO GenAI's continuous batching."""
    from chatstream.engines.openvino.loader import load
    from chatstream.engines.openvino.settings import OpenVINOSettings
    from chatstream.types import SamplingParams

    loaded = load(Path(exported), OpenVINOSettings(context_len=context_len, dtype=dtype))
    pipeline = loaded.pipeline
    greedy = SamplingParams(temperature=0.0)

    def generate(prompts: Prompts, answer_tokens: int) -> Timed:
        _check_capacity(loaded.max_concurrency, prompts)
        clock = Clock(len(prompts))
        generations = [
            pipeline.add(prompt, greedy, max_new_tokens=answer_tokens, eos_token_ids=frozenset()) for prompt in prompts
        ]
        while pipeline.has_requests:
            pipeline.step()
            for n, generation in enumerate(generations):
                clock.note(*[n] * len(generation.take()))
        return clock.timed()

    yield generate


@contextmanager
def openvino_engine(exported: str, dtype: str, context_len: int) -> Iterator[Generate]:
    """Our OpenVINO engine in its own process, as in `chatstream serve`."""
    from chatstream.engines.openvino import create_engine
    from chatstream.engines.process import ProcessEngine

    make = partial(create_engine, exported, dtype=dtype, context_len=context_len)
    with through(ProcessEngine(make, heartbeat_timeout_s=120.0)) as generate:
        yield generate


@contextmanager
def our_steps(checkpoint: str, context_len: int) -> Iterator[Generate]:
    """The bare steps of the Transformers engine: all prompts first, then one token per sequence and step."""
    from chatstream.engines.batching.model import SlotInput
    from chatstream.engines.loading.settings import LoadSettings
    from chatstream.engines.text.codec import SampledToken
    from chatstream.engines.transformers.loader import load
    from chatstream.types import SamplingParams

    runner = load(checkpoint, None, LoadSettings(context_len=context_len)).runner
    greedy = SamplingParams(temperature=0.0, seed=0)

    def generate(prompts: Prompts, answer_tokens: int) -> Timed:
        _check_capacity(runner.max_slots, prompts)
        clock = Clock(len(prompts))
        newest: dict[int, int] = {}

        def step(inputs: Sequence[SlotInput]) -> None:
            for slot, token in runner.step(inputs).items():
                assert isinstance(token, SampledToken), token
                newest[slot] = token.token_id
            clock.note(*(item.slot for item in inputs))

        lengths = [len(prompt) for prompt in prompts]
        for slot, prompt in enumerate(prompts):
            runner.open_slot(slot, runner.new_sampler(prompt, greedy, None))
        for slots in _in_parts(lengths, PREFILL_TOKENS):
            step([SlotInput(slot, 0, tuple(prompts[slot]), is_last=True) for slot in slots])
        for n in range(answer_tokens - 1):
            step([SlotInput(slot, lengths[slot] + n, (newest[slot],), is_last=True) for slot in range(len(prompts))])
        for slot in range(len(prompts)):
            runner.close_slot(slot)
        return clock.timed()

    yield generate


@contextmanager
def our_engine(checkpoint: str, context_len: int, *, in_process: bool) -> Iterator[Generate]:
    """The step loop in a thread, as embedded in `ChatStream`, or in a process, as in `chatstream serve`."""
    from chatstream.engines.loading.settings import LoadSettings
    from chatstream.engines.process import ProcessEngine
    from chatstream.engines.transformers import create_engine

    make = partial(create_engine, checkpoint, load=LoadSettings(context_len=context_len))
    with through(ProcessEngine(make) if in_process else make()) as generate:
        yield generate


class HuggingFaceEngine:
    """The continuous batching of transformers behind the part of the `Engine` interface that is used here."""

    def __init__(self, checkpoint: str, dtype: str, num_blocks: int) -> None:
        """`num_blocks` of 256 tokens: by default the cache takes most of the memory on a CPU."""
        from transformers import ContinuousBatchingConfig, GenerationConfig

        from chatstream.engines.base import Capacity

        self.capacity = Capacity()
        self._ids = itertools.count()
        self._manager = _load_model(checkpoint, dtype).init_continuous_batching(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0, max_new_tokens=1),
            continuous_batching_config=ContinuousBatchingConfig(num_blocks=num_blocks, max_batch_tokens=PREFILL_TOKENS),
        )

    async def start(self) -> None:
        from chatstream.engines.transformers.threads import end_idle_workers

        end_idle_workers()  # workers of this loading thread would slow down those of the manager
        self._manager.start()

    async def stop(self) -> None:
        await asyncio.to_thread(self._manager.stop, block=True, hard_stop=True)

    async def stream(self, request: Any) -> AsyncGenerator[Any, None]:
        from chatstream.types import TokenDelta

        outputs: asyncio.Queue[Any] = asyncio.Queue()
        id_, most = f"{next(self._ids)}", request.sampling.max_new_tokens
        self._manager.register_result_handler(id_, outputs.put_nowait)
        self._manager.add_request(list(request.prompt.token_ids), id_, max_new_tokens=most, streaming=True)
        num_tokens, is_finished = 0, False
        try:
            while not is_finished:
                output = await asyncio.wait_for(outputs.get(), 120.0)
                if output.error:
                    raise RuntimeError(output.error)
                is_finished = output.is_finished()
                num_new, num_tokens = len(output.generated_tokens) - num_tokens, len(output.generated_tokens)
                yield TokenDelta("", num_tokens=num_new)
        finally:
            if not is_finished:
                self._manager.cancel_request(id_)


class Clock:
    """Records the arrival of each token of each answer."""

    def __init__(self, num_streams: int) -> None:
        self._started_s = time.perf_counter()
        self._times: list[list[float]] = [[] for _ in range(num_streams)]

    def note(self, *streams: int) -> None:
        """Record a token of each of these streams at the current time."""
        at_s = time.perf_counter() - self._started_s
        for stream in streams:
            self._times[stream].append(at_s)

    def timed(self) -> Timed:
        return {"times": self._times}


@contextmanager
def through(engine: Any) -> Iterator[Generate]:
    """Yield the generate function of an engine, with one reader per stream on one event loop."""
    from chatstream.types import GenerationRequest, PreparedPrompt, SamplingParams

    async def read(clock: Clock, n: int, prompt: list[int], answer_tokens: int) -> None:
        sampling = SamplingParams(temperature=0.0, max_new_tokens=answer_tokens)
        request = GenerationRequest(f"{n}", PreparedPrompt(tuple(prompt)), sampling)
        async with aclosing(engine.stream(request)) as deltas:
            async for delta in deltas:
                clock.note(*[n] * delta.num_tokens)

    async def read_all(prompts: Prompts, answer_tokens: int) -> Timed:
        _check_capacity(engine.capacity.max_concurrency, prompts)
        clock = Clock(len(prompts))
        await asyncio.gather(*(read(clock, n, prompt, answer_tokens) for n, prompt in enumerate(prompts)))
        return clock.timed()

    with asyncio.Runner() as runner:
        runner.run(engine.start())
        try:
            yield lambda prompts, answer_tokens: runner.run(read_all(prompts, answer_tokens))
        finally:
            runner.run(engine.stop())


def _check_capacity(max_concurrency: int | None, prompts: Prompts) -> None:
    """Raise `RuntimeError` if the engine runs fewer sequences, because the others would wait inside it."""
    if max_concurrency is not None and max_concurrency < len(prompts):
        raise RuntimeError(f"has memory for {max_concurrency} at once, not for {len(prompts)}")


def _in_parts(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Group the prompts by index, in order, into parts of at most `most` tokens."""
    parts: list[list[int]] = [[]]
    for number, length in enumerate(lengths):
        if parts[-1] and sum(lengths[n] for n in parts[-1]) + length > most:
            parts.append([])
        parts[-1].append(number)
    return parts


def _load_model(checkpoint: str, dtype: str) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype)).eval()
