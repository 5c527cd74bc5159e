"""A scripted model: a rule gives the next token, so that the step loop can be tested without a real model."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel, SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.errors import InvalidRequest
from chatstream.types import GenerationRequest, Message, SamplingParams, TokenDelta, TokenMask

EOS = 0

Rule = Callable[[tuple[int, ...], int], "int | Exception"]
"""(prompt, number of generated tokens) -> the next token."""


def counting(prompt: tuple[int, ...], n: int) -> int:
    """Letters in alphabetical order; the last character of the prompt selects the first one."""
    return ord("a") + (prompt[-1] + n) % 26


class Panic(BaseException):
    """Stands for the exception of a library written in Rust that panics."""


@dataclass
class Script:
    """The sampler of one request: the arguments of its rule."""

    prompt: tuple[int, ...]
    logprob: float | None = None
    """Log probability of every token."""
    num_generated: int = 0


@dataclass(frozen=True)
class SavedTokens:
    """Saved state of one byte per token."""

    token_ids: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.token_ids)


class ScriptedRunner:
    """A `ModelRunner` that records every step. While `gate` is cleared, each step waits for it."""

    def __init__(
        self,
        rule: Rule = counting,
        context_len: int = 1000,
        max_slots: int | None = None,
        *,
        supports_partial_prefix: bool = True,
    ) -> None:
        self.context_len = context_len
        self.max_slots = max_slots
        self.supports_partial_prefix = supports_partial_prefix
        self.rule = rule
        self.steps: list[tuple[SlotInput, ...]] = []
        self.requests_in_step: list[set[str]] = []
        """The requests in each step, by the first character of their prompts."""
        self.open_slots: dict[int, Script] = {}
        self.slot_tokens: dict[int, tuple[int, ...]] = {}
        """The tokens in each open slot."""
        self.sampled_in: dict[str, list[int]] = {}
        """Numbers of the steps that sampled a token of a request, by the first character of its prompt."""
        self.reused: list[tuple[str, int]] = []
        """Reused state: its source, and its number of tokens."""
        self.sampling: list[SamplingParams] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def new_sampler(self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None) -> Script:
        self.sampling.append(sampling)
        return Script(tuple(prompt_ids), None if sampling.logprobs is None else 0.0)

    def open_slot(self, slot: int, sampler: Script) -> None:
        assert slot not in self.open_slots, "the slot is in use"
        self.open_slots[slot] = sampler
        self.slot_tokens[slot] = ()

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        self.gate.wait()
        self.threads.add(threading.current_thread().name)
        self.steps.append(tuple(inputs))
        self.requests_in_step.append({chr(self.open_slots[item.slot].prompt[0]) for item in inputs})
        assert len({item.slot for item in inputs}) == len(inputs), "two inputs of one slot"
        for item in inputs:
            assert item.start == len(self.slot_tokens[item.slot])
            self.slot_tokens[item.slot] += item.token_ids
        return {item.slot: self._next(item.slot) for item in inputs if item.is_last}

    def _next(self, slot: int) -> SampledToken | Exception:
        script = self.open_slots[slot]
        so_far = script.prompt + tuple(_scripted(self.rule, script.prompt, script.num_generated))
        assert self.slot_tokens[slot] == so_far, "the slot has the tokens of the prompt and the answer"
        self.sampled_in.setdefault(chr(script.prompt[0]), []).append(len(self.steps))
        token = self.rule(script.prompt, script.num_generated)
        script.num_generated += 1
        return token if isinstance(token, Exception) else SampledToken(token, script.logprob)

    def close_slot(self, slot: int) -> None:
        del self.open_slots[slot], self.slot_tokens[slot]

    def save(self, slot: int) -> SavedTokens:
        return SavedTokens(self.slot_tokens[slot])

    def load(self, slot: int, saved: SavedTokens, num_tokens: int) -> None:
        assert self.supports_partial_prefix or num_tokens == len(saved.token_ids)
        self._reuse("cache", slot, saved.token_ids, num_tokens)

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        assert self.supports_partial_prefix
        self._reuse("slot", slot, self.slot_tokens[source], num_tokens)

    def _reuse(self, where: str, slot: int, token_ids: tuple[int, ...], num_tokens: int) -> None:
        assert not self.slot_tokens[slot]
        assert num_tokens <= len(token_ids)
        self.slot_tokens[slot] = token_ids[:num_tokens]
        self.reused.append((where, num_tokens))


def _scripted(rule: Rule, prompt: tuple[int, ...], num_tokens: int) -> Iterator[int]:
    for n in range(num_tokens):
        token = rule(prompt, n)
        assert isinstance(token, int)
        yield token


def advanced(step: Sequence[SlotInput]) -> list[int]:
    """The slots for which this step sampled a token."""
    return [item.slot for item in step if item.is_last]


def prefill_inputs(runner: ScriptedRunner, slot: int) -> list[SlotInput]:
    """The inputs of a slot that belong to its prefill."""
    return [item for step in runner.steps for item in step if item.slot == slot and _is_prefill(item)]


def _is_prefill(item: SlotInput) -> bool:
    return len(item.token_ids) > 1 or not item.is_last


class CharCodec:
    """One token per character."""

    eos_token_ids = frozenset({EOS})

    def encode_text(self, text: str) -> list[int]:
        return [ord(c) for c in text]

    def encode_chat(self, messages: Sequence[Message]) -> list[int]:
        if any(message.content == "unspeakable" for message in messages):
            raise InvalidRequest("the template refuses this")
        return self.encode_text("".join(f"{m.role[0]}:{m.content};" for m in messages) + "a:")

    def open_decoder(self) -> CharDecoder:
        return CharDecoder()

    def token_text(self, token_id: int) -> str:
        return chr(token_id)


class CharDecoder:
    def push(self, token_id: int) -> str:
        return chr(token_id)


def scripted_engine(runner: ScriptedRunner, *, prefix_cache_bytes: int = 0, **options: Any) -> StepEngine:
    """A `StepEngine` over the runner, without a prefix cache unless a test requests one."""
    return StepEngine(
        "scripted", lambda: LoadedModel(runner, CharCodec(), prefix_cache_bytes=prefix_cache_bytes), **options
    )


def running(runner: ScriptedRunner, **options: Any) -> AbstractAsyncContextManager[StepEngine]:
    return use(scripted_engine(runner, **options), runner)


@asynccontextmanager
async def use(engine: StepEngine, runner: ScriptedRunner) -> AsyncIterator[StepEngine]:
    await engine.start()
    try:
        async with asyncio.timeout(60):  # a hang is a failure
            yield engine
    finally:
        runner.gate.set()
        await engine.stop()
        assert not runner.open_slots, "a slot was not closed"


async def until(condition) -> None:  # type: ignore[no-untyped-def]
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.001)


async def generate(engine: StepEngine, prompt: str, request_id: str = "r", **sampling: object) -> list[TokenDelta]:
    params = SamplingParams(**{"max_new_tokens": 5, **sampling})  # type: ignore[arg-type]
    request = GenerationRequest(request_id, await engine.prepare(prompt, params), params)
    return await _read(engine.stream(request))


async def begin(
    engine: StepEngine, prompt: str, request_id: str = "r", **sampling: object
) -> asyncio.Task[list[TokenDelta]]:
    """`generate` in a task. Returns when the request was passed to the engine thread, even while a step hangs."""
    params = SamplingParams(**{"max_new_tokens": 5, **sampling})  # type: ignore[arg-type]
    request = GenerationRequest(request_id, await engine.prepare(prompt, params), params)
    reading = asyncio.create_task(_read(engine.stream(request)))
    await asyncio.sleep(0)
    return reading


async def _read(stream: AsyncGenerator[TokenDelta, None]) -> list[TokenDelta]:
    return [delta async for delta in stream]


def text(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)
