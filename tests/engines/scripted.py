"""A model whose next token is a rule, so that everything around a model can be tested without one."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager

from chatstream.engines.model import LoadedModel, NextToken, StepPlan
from chatstream.engines.step_loop import StepEngine
from chatstream.errors import InvalidRequest
from chatstream.types import GenerationRequest, Message, SamplingParams, TokenDelta

EOS = 0

Rule = Callable[[tuple[int, ...], int], "int | Exception"]
"""(prompt, number of tokens generated so far) -> the next token."""


def counting(prompt: tuple[int, ...], n: int) -> int:
    """Letters from a on, beginning where the prompt's last character says."""
    return ord("a") + (prompt[-1] + n) % 26


class Panic(BaseException):
    """What libraries written in Rust raise when they panic."""


class ScriptedRunner:
    """A `ModelRunner` that records every plan. `gate` holds its thread at each step until it is opened."""

    def __init__(self, rule: Rule = counting, context_len: int = 1000) -> None:
        self.context_len = context_len
        self.rule = rule
        self.plans: list[StepPlan] = []
        self.open_slots: dict[int, tuple[int, ...]] = {}
        self.sampling: dict[int, SamplingParams] = {}
        self.threads: set[str] = set()
        self.gate = threading.Event()
        self.gate.set()
        self._fed: dict[int, int] = {}
        self._generated: dict[int, int] = {}

    def open_slot(self, slot: int, prompt_ids: Sequence[int], sampling: SamplingParams) -> None:
        assert slot not in self.open_slots, "a slot has one user"
        self.open_slots[slot] = tuple(prompt_ids)
        self.sampling[slot] = sampling
        self._fed[slot] = self._generated[slot] = 0

    def step(self, plan: StepPlan) -> Mapping[int, NextToken | Exception]:
        self.gate.wait()
        self.threads.add(threading.current_thread().name)
        self.plans.append(plan)
        rows = list(plan.decode_slots)
        chunk = plan.prefill
        if chunk is not None:
            assert chunk.start == self._fed[chunk.slot]
            assert chunk.token_ids == self.open_slots[chunk.slot][chunk.start : chunk.start + len(chunk.token_ids)]
            self._fed[chunk.slot] += len(chunk.token_ids)
            rows += [chunk.slot] if chunk.is_last else []
        return {slot: _as_next(self._next(slot)) for slot in rows}

    def _next(self, slot: int) -> int | Exception:
        assert self._fed[slot] == len(self.open_slots[slot]), "nobody generates before the prompt is complete"
        token = self.rule(self.open_slots[slot], self._generated[slot])
        self._generated[slot] += 1
        return token

    def close_slot(self, slot: int) -> None:
        del self.open_slots[slot]


def _as_next(token: int | Exception) -> NextToken | Exception:
    return token if isinstance(token, Exception) else NextToken(token)


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


def scripted_engine(runner: ScriptedRunner, **options: int) -> StepEngine:
    return StepEngine("scripted", lambda: LoadedModel(runner, CharCodec()), **options)


@asynccontextmanager
async def running(runner: ScriptedRunner, **options: int) -> AsyncIterator[StepEngine]:
    engine = scripted_engine(runner, **options)
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
    return [delta async for delta in engine.stream(request)]


def text(deltas: list[TokenDelta]) -> str:
    return "".join(delta.text for delta in deltas)
