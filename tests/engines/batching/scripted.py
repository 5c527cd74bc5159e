"""A model whose next token is a rule, so that everything around a model can be tested without one."""

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
"""(prompt, number of tokens generated so far) -> the next token."""


def counting(prompt: tuple[int, ...], n: int) -> int:
    """Letters from a on, beginning where the prompt's last character says."""
    return ord("a") + (prompt[-1] + n) % 26


class Panic(BaseException):
    """What libraries written in Rust raise when they panic."""


@dataclass
class Script:
    """A request's sampler: its rule needs the prompt and how far it is."""

    prompt: tuple[int, ...]
    logprob: float | None = None
    """Of every token: each is certain."""
    num_generated: int = 0


@dataclass(frozen=True)
class SavedTokens:
    """One byte a token."""

    token_ids: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return len(self.token_ids)


class ScriptedRunner:
    """A `ModelRunner` that records every step. `gate` holds its thread at each one until it is opened."""

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
        self.worked_on: list[set[str]] = []
        """In each step, by the first character of their prompts."""
        self.open_slots: dict[int, Script] = {}
        self.held: dict[int, tuple[int, ...]] = {}
        """The tokens in each open slot."""
        self.chosen_in: dict[str, list[int]] = {}
        """The steps in which a request got its tokens, by the first character of its prompt."""
        self.taken_over: list[tuple[str, int]] = []
        """How many tokens were not computed again, and where they came from."""
        self.sampling: list[SamplingParams] = []
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()

    def new_sampler(self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None) -> Script:
        self.sampling.append(sampling)
        return Script(tuple(prompt_ids), None if sampling.logprobs is None else 0.0)

    def open_slot(self, slot: int, sampler: Script) -> None:
        assert slot not in self.open_slots, "a slot has one user"
        self.open_slots[slot] = sampler
        self.held[slot] = ()

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        self.gate.wait()
        self.threads.add(threading.current_thread().name)
        self.steps.append(tuple(inputs))
        self.worked_on.append({chr(self.open_slots[item.slot].prompt[0]) for item in inputs})
        assert len({item.slot for item in inputs}) == len(inputs), "nobody comes twice"
        for item in inputs:
            assert item.start == len(self.held[item.slot])
            self.held[item.slot] += item.token_ids
        return {item.slot: self._next(item.slot) for item in inputs if item.is_last}

    def _next(self, slot: int) -> SampledToken | Exception:
        script = self.open_slots[slot]
        so_far = script.prompt + tuple(_scripted(self.rule, script.prompt, script.num_generated))
        assert self.held[slot] == so_far, "the slot holds just what was said"
        self.chosen_in.setdefault(chr(script.prompt[0]), []).append(len(self.steps))
        token = self.rule(script.prompt, script.num_generated)
        script.num_generated += 1
        return token if isinstance(token, Exception) else SampledToken(token, script.logprob)

    def close_slot(self, slot: int) -> None:
        del self.open_slots[slot], self.held[slot]

    def save(self, slot: int) -> SavedTokens:
        return SavedTokens(self.held[slot])

    def load(self, slot: int, saved: SavedTokens, num_tokens: int) -> None:
        assert self.supports_partial_prefix or num_tokens == len(saved.token_ids)
        self._take_over("pool", slot, saved.token_ids, num_tokens)

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        assert self.supports_partial_prefix
        self._take_over("slot", slot, self.held[source], num_tokens)

    def _take_over(self, where: str, slot: int, token_ids: tuple[int, ...], num_tokens: int) -> None:
        assert not self.held[slot]
        assert num_tokens <= len(token_ids)
        self.held[slot] = token_ids[:num_tokens]
        self.taken_over.append((where, num_tokens))


def _scripted(rule: Rule, prompt: tuple[int, ...], num_tokens: int) -> Iterator[int]:
    for n in range(num_tokens):
        token = rule(prompt, n)
        assert isinstance(token, int)
        yield token


def advanced(step: Sequence[SlotInput]) -> list[int]:
    """The slots that this step gave a token."""
    return [item.slot for item in step if item.is_last]


def parts_of(runner: ScriptedRunner, slot: int) -> list[SlotInput]:
    """Everything but the newest token that was fed to a slot."""
    return [item for step in runner.steps for item in step if item.slot == slot and _is_part(item)]


def _is_part(item: SlotInput) -> bool:
    return len(item.token_ids) > 1 or not item.is_last


class CharCodec:
    """One token a character."""

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
    """Keeps nothing of ended sequences where a test does not say so."""
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
        assert not runner.open_slots, "every slot was given back"


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
    """`generate` in a task. Returns when the engine's thread has been handed the request, also while a step hangs."""
    params = SamplingParams(**{"max_new_tokens": 5, **sampling})  # type: ignore[arg-type]
    request = GenerationRequest(request_id, await engine.prepare(prompt, params), params)
    reading = asyncio.create_task(_read(engine.stream(request)))
    await asyncio.sleep(0)
    return reading


async def _read(stream: AsyncGenerator[TokenDelta, None]) -> list[TokenDelta]:
    return [delta async for delta in stream]


def text(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)
