"""A runner that records its steps, and helpers that run requests through the real engine."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel, ModelRunner, Saved, SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.engines.transformers import create_engine
from chatstream.engines.transformers.loader import LoadSettings, load
from chatstream.errors import ConfigError
from chatstream.types import FinishReason, GenerationRequest, PreparedPrompt, SamplingParams, TokenDelta, TokenMask

NUM_MIXED = 16


@dataclass
class Answer:
    """The tokens of one request, with the end token."""

    prompt_ids: tuple[int, ...]
    sampler: Any
    token_ids: list[int] = field(default_factory=list)
    slot: int | None = None


@dataclass(frozen=True)
class Step:
    inputs: tuple[SlotInput, ...]
    results: Mapping[int, SampledToken | Exception]
    generating: set[int]
    """Slots with a complete prompt and an incomplete answer."""

    @property
    def slots(self) -> list[int]:
        return [item.slot for item in self.inputs]


class RecordingRunner:
    """A `ModelRunner` that records the calls of another one."""

    def __init__(self, runner: ModelRunner) -> None:
        self.runner = runner
        self.context_len = runner.context_len
        self.max_slots = runner.max_slots
        self.supports_partial_prefix = runner.supports_partial_prefix
        self.save = runner.save
        self.steps: list[Step] = []
        self.answers: list[Answer] = []
        self.open: dict[int, Answer] = {}
        self.taken_over: list[int] = []
        """Numbers of tokens that were loaded or copied, not computed."""

    def new_sampler(self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None) -> Any:
        answer = Answer(tuple(prompt_ids), self.runner.new_sampler(prompt_ids, sampling, token_mask))
        self.answers.append(answer)
        return answer

    def open_slot(self, slot: int, sampler: Answer) -> None:
        assert slot not in self.open
        self.open[slot] = sampler
        sampler.slot = slot
        self.runner.open_slot(slot, sampler.sampler)

    def load(self, slot: int, saved: Saved, num_tokens: int) -> None:
        self.taken_over.append(num_tokens)
        self.runner.load(slot, saved, num_tokens)

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        self.taken_over.append(num_tokens)
        self.runner.copy(source, slot, num_tokens)

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        generating = {slot for slot, answer in self.open.items() if answer.token_ids}
        results = self.runner.step(inputs)
        self.steps.append(Step(tuple(inputs), results, generating))
        for slot, token in results.items():
            if isinstance(token, SampledToken):
                self.open[slot].token_ids.append(token.token_id)
        return results

    def close_slot(self, slot: int) -> None:
        self.open.pop(slot)
        self.runner.close_slot(slot)

    def tokens_of(self, prompt_ids: Sequence[int]) -> list[int]:
        """The tokens of the one request with this prompt."""
        (answer,) = [a for a in self.answers if a.prompt_ids == tuple(prompt_ids)]
        return answer.token_ids


@dataclass
class Bench:
    """A started engine over a checkpoint, and its recorder."""

    engine: StepEngine
    recorder: RecordingRunner
    model: LoadedModel


@asynccontextmanager
async def engine_on(path: Path, settings: LoadSettings | None = None, **options: Any) -> AsyncIterator[Bench]:
    """Start an engine on the CPU, in the checkpoint's dtype, with the real loader."""
    loaded: list[LoadedModel] = []

    def load_recorded() -> LoadedModel:
        model = load(str(path), None, settings or LoadSettings(device="cpu"))
        loaded.append(replace(model, runner=RecordingRunner(model.runner)))
        return loaded[0]

    engine = StepEngine("tiny", load_recorded, **options)
    await engine.start()
    try:
        recorder = loaded[0].runner
        assert isinstance(recorder, RecordingRunner)
        yield Bench(engine, recorder, loaded[0])
    finally:
        await engine.stop()


def greedy(max_new_tokens: int | None = None, **more: Any) -> SamplingParams:
    return SamplingParams(max_new_tokens=max_new_tokens, temperature=0, **more)


def request_of(prompt_ids: Sequence[int], sampling: SamplingParams, name: str = "r") -> GenerationRequest:
    return GenerationRequest(name, PreparedPrompt(tuple(prompt_ids)), sampling)


async def collect(engine: StepEngine, request: GenerationRequest) -> list[TokenDelta]:
    return [delta async for delta in engine.stream(request)]


async def answer(engine: StepEngine, request: GenerationRequest) -> tuple[str, FinishReason | None]:
    deltas = await collect(engine, request)
    return "".join(delta.text for delta in deltas), deltas[-1].finish_reason


async def run_all(engine: StepEngine, requests: Sequence[GenerationRequest], concurrency: int) -> list[str]:
    """Run all requests, at most `concurrency` at a time, and return their texts."""
    slots = asyncio.Semaphore(concurrency)

    async def one(request: GenerationRequest) -> str:
        async with slots:
            return (await answer(engine, request))[0]

    return list(await asyncio.gather(*map(one, requests)))


def prompt_of(length: int, seed: int = 0) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(100, 300) for _ in range(length)]


def mixed_requests(vocab_size: int, **sampling: float) -> list[GenerationRequest]:
    """Prompts from one token to several chunks, and answers of different lengths, so that requests start and end in
    many steps."""
    rng = random.Random(5)
    requests = []
    for n in range(NUM_MIXED):
        prompt = [rng.randrange(4, vocab_size) for _ in range((1, 3, 8, 13, 21, 34)[n % 6] + n)]
        requests.append(request_of(prompt, greedy(rng.randint(6, 26), **sampling), f"r{n}"))
    return requests


def generate_alone(model: PreTrainedModel, request: GenerationRequest) -> list[int]:
    ids = torch.tensor([request.prompt.token_ids])
    with torch.inference_mode():
        output = model.generate(  # type: ignore[operator]
            ids,
            attention_mask=torch.ones_like(ids),
            do_sample=False,
            max_new_tokens=request.sampling.max_new_tokens,
            repetition_penalty=request.sampling.repetition_penalty,
            pad_token_id=1,
        )
    return [int(token) for token in output[0, ids.shape[1] :]]


async def refusal_of(model: Any, *args: Any, **options: Any) -> str:
    """The one-line `ConfigError` of `start`."""
    engine = create_engine(model, *args, **options)
    with pytest.raises(ConfigError) as caught:
        await engine.start()
    assert not engine.health().is_ready
    assert "\n" not in caught.value.message
    assert len(caught.value.message) < 450
    return caught.value.message
