"""The real engine with the real library and `tiny/`, recording the generated tokens."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from chatstream.engines.base import Engine
from chatstream.engines.openvino.engine import OpenVINOEngine
from chatstream.engines.openvino.loader import Loaded, load
from chatstream.engines.openvino.pipeline import Generation, Pipeline
from chatstream.engines.openvino.settings import OpenVINOSettings
from chatstream.types import GenerationRequest, PreparedPrompt, SamplingParams, TokenDelta

TINY = Path(__file__).parent / "tiny"
CONTEXT_LEN = 160
VOCAB_SIZE = 384
EXACT = OpenVINOSettings(dtype="float32", kv_memory_gib=0.01, num_threads=1)
CONTEXT_GIB = CONTEXT_LEN * 2 * 2 * 8 * 4 / 2**30
"""Keys and values of one context: two layers, one head of eight features, in float32."""


class RecordingPipeline:
    """A `Pipeline` that records the tokens of each prompt."""

    def __init__(self, pipeline: Pipeline) -> None:
        self._pipeline = pipeline
        self.generations: list[RecordingGeneration] = []
        self.num_steps = 0
        self.max_running = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pipeline, name)

    def add(self, prompt_ids: Sequence[int], *args: Any, **kwargs: Any) -> RecordingGeneration:
        generation = RecordingGeneration(tuple(prompt_ids), self._pipeline.add(prompt_ids, *args, **kwargs))
        self.generations.append(generation)
        return generation

    def step(self) -> None:
        self.num_steps += 1
        running = [generation for generation in self.generations if generation.status == "RUNNING"]
        self.max_running = max(self.max_running, len(running))
        self._pipeline.step()

    def tokens_of(self, request: GenerationRequest) -> list[int]:
        """The tokens of the one request with this prompt."""
        (generation,) = [g for g in self.generations if g.prompt_ids == request.prompt.token_ids]
        return generation.tokens


class RecordingGeneration:
    """A `Generation` that records its tokens."""

    def __init__(self, prompt_ids: tuple[int, ...], generation: Generation) -> None:
        self.prompt_ids = prompt_ids
        self.tokens: list[int] = []
        self._generation = generation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._generation, name)

    def take(self) -> list[int]:
        new = self._generation.take()
        self.tokens += new
        return new


@dataclass
class Bench:
    engine: OpenVINOEngine
    pipelines: list[RecordingPipeline]
    """The pipelines loaded so far; each restart of the engine adds one."""

    @property
    def pipeline(self) -> RecordingPipeline:
        return self.pipelines[-1]


@asynccontextmanager
async def engine_on(directory: Path = TINY, settings: OpenVINOSettings = EXACT, **more: Any) -> AsyncIterator[Bench]:
    """A started engine. `more` are further settings."""
    pipelines: list[RecordingPipeline] = []

    def load_recorded() -> Loaded:
        loaded = load(directory, replace(settings, **more))
        pipelines.append(RecordingPipeline(loaded.pipeline))
        return replace(loaded, pipeline=pipelines[-1])  # type: ignore[arg-type]

    engine = OpenVINOEngine("tiny", load_recorded)
    await engine.start()
    try:
        yield Bench(engine, pipelines)
    finally:
        await engine.stop()


def engine_that_fails_once(flag: Path) -> OpenVINOEngine:
    """An engine whose third step fails, unless the file `flag` exists; it creates the file at the load."""

    def load_failing() -> Loaded:
        loaded = load(TINY, EXACT)
        if not flag.exists():
            flag.touch()
            steps, step = itertools.count(1), loaded.pipeline.step

            def step_or_fail() -> None:
                if next(steps) == 3:
                    raise RuntimeError("Internal error")
                step()

            loaded.pipeline.step = step_or_fail  # type: ignore[method-assign]
        return loaded

    return OpenVINOEngine("tiny", load_failing)


def greedy(max_new_tokens: int | None = None, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0, **more)


def request_of(prompt_ids: Sequence[int], sampling: SamplingParams, name: str = "r", **more: Any) -> GenerationRequest:
    return GenerationRequest(name, PreparedPrompt(tuple(prompt_ids)), sampling, **more)


async def collect(engine: Engine, request: GenerationRequest) -> list[TokenDelta]:
    async with aclosing(engine.stream(request)) as stream:
        return [delta async for delta in stream]


async def read_to_the_end(stream: AsyncGenerator[TokenDelta, None]) -> None:
    async for _ in stream:
        pass


async def text_of(engine: OpenVINOEngine, request: GenerationRequest) -> str:
    return "".join(delta.text for delta in await collect(engine, request))


async def close_after(engine: OpenVINOEngine, request: GenerationRequest, num_deltas: int) -> None:
    async with aclosing(engine.stream(request)) as stream:
        for _ in range(num_deltas):
            await anext(stream, None)  # None if the stream has ended


async def run_all(engine: OpenVINOEngine, requests: Sequence[GenerationRequest], concurrency: int) -> list[str]:
    """The texts of all requests, at most `concurrency` at a time."""
    slots = asyncio.Semaphore(concurrency)

    async def one(request: GenerationRequest) -> str:
        async with slots:
            return await text_of(engine, request)

    return await asyncio.gather(*map(one, requests))
