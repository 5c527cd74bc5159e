"""Random, reproducible schedules on the real engine: the test decides when the engine thread runs a step.

While a step is stopped, requests start, are cancelled, preempted and resumed; all of that must take effect in the next
step. So the schedule knows the expected inputs of each step without asking the engine.
"""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from itertools import combinations, pairwise
from typing import Any

from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.batching.model import LoadedModel, ModelRunner, Saved, SlotInput
from chatstream.engines.text.codec import SampledToken
from chatstream.types import GenerationRequest, SamplingParams, TokenDelta, TokenMask

NO_SLOT = -1
NUM_TICKS = 20
"""Ticks of the event loop in which every reader receives the deltas of one step."""


class LockstepRunner:
    """Wraps a `ModelRunner` and stops it before each step: `wait_step` waits for a step, `run_step` lets it run."""

    def __init__(self, runner: ModelRunner) -> None:
        self.context_len = runner.context_len
        self.max_slots = runner.max_slots
        self.supports_partial_prefix = runner.supports_partial_prefix
        self.save = runner.save
        self.prompts: dict[int, tuple[int, ...]] = {}
        """The prompt of each open slot."""
        self.most_slots = 0
        self.reused_tokens = 0
        """Tokens whose state was loaded or copied."""
        self._runner = runner
        self._step: tuple[SlotInput, ...] = ()
        self._has_arrived = threading.Semaphore(0)
        self._may_go = threading.Semaphore(0)
        self._is_stepwise = True

    def new_sampler(self, prompt_ids: Sequence[int], sampling: SamplingParams, token_mask: TokenMask | None) -> Any:
        return tuple(prompt_ids), self._runner.new_sampler(prompt_ids, sampling, token_mask)

    def open_slot(self, slot: int, sampler: Any) -> None:
        self.prompts[slot], inner = sampler
        self.most_slots = max(self.most_slots, len(self.prompts))
        self._runner.open_slot(slot, inner)

    def close_slot(self, slot: int) -> None:
        del self.prompts[slot]
        self._runner.close_slot(slot)

    def load(self, slot: int, saved: Saved, num_tokens: int) -> None:
        self.reused_tokens += num_tokens
        self._runner.load(slot, saved, num_tokens)

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        self.reused_tokens += num_tokens
        self._runner.copy(source, slot, num_tokens)

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        if self._is_stepwise:
            self._step = tuple(inputs)
            self._has_arrived.release()
            self._may_go.acquire()
        return self._runner.step(inputs)

    def wait_step(self) -> tuple[SlotInput, ...]:
        """The inputs of the next step, once the engine has stopped before it."""
        assert self._has_arrived.acquire(timeout=30), "no step, although a request is running"
        return self._step

    def run_step(self) -> None:
        self._may_go.release()

    def run_freely(self) -> None:
        self._is_stepwise = False
        self._may_go.release()


@dataclass
class Reader:
    """The reader of one request, and the expected state of the request."""

    request: GenerationRequest
    may_cancel: bool = False
    deltas: list[TokenDelta] = field(default_factory=list)
    is_prefilled: bool = False
    is_preempted: bool = False
    is_cancelled: bool = False
    task: asyncio.Task[None] | None = None

    @property
    def name(self) -> str:
        return self.request.request_id

    @property
    def text(self) -> str:
        return "".join(delta.text for delta in self.deltas)

    @property
    def num_tokens(self) -> int:
        return sum(delta.num_tokens for delta in self.deltas)

    async def read(self, engine: StepEngine) -> None:
        async with aclosing(engine.stream(self.request)) as stream:
            async for delta in stream:
                self.deltas.append(delta)


@dataclass
class Step:
    """One step of the engine, and its expected inputs."""

    inputs: tuple[SlotInput, ...]
    active: dict[str, int]
    """The requests that had to get one token, with their slots."""
    in_prefill: int | None
    """The slot whose prompt had to advance: of the running requests, the earliest one in its prefill. NO_SLOT: that
    request waits for another one to compute the same prefix, which then had to advance."""
    num_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens of each request after the step."""

    @property
    def is_as_expected(self) -> bool:
        """Whether the inputs are as expected. Other prompts may advance too, if the budget allows."""
        generating = set(self.active.values())
        prefilled = {item.slot for item in self.inputs} - generating
        advanced = {item.slot for item in self.inputs if item.is_last}
        has_prefill = {None: True, NO_SLOT: bool(prefilled)}.get(self.in_prefill, self.in_prefill in prefilled)
        return generating <= advanced and has_prefill


class Schedule:
    """Runs requests with distinct prompts on a started engine over a `LockstepRunner`."""

    MAX_ACTIVE = 3
    """The limit of running requests; the others are preempted or not started."""
    START_WEIGHT = 2
    """Weight of starts and resumes, relative to preemptions and cancellations, below the limit."""

    def __init__(self, engine: StepEngine, runner: LockstepRunner, rng: random.Random) -> None:
        self.steps: list[Step] = []
        self.num_preempted_in_prompt = 0
        self.num_preempted_in_answer = 0
        self._engine = engine
        self._runner = runner
        self._rng = rng
        self._waiting: list[Reader] = []
        self._live: list[Reader] = []

    async def play(self, readers: Sequence[Reader]) -> None:
        self._waiting = list(readers)
        is_in_step = False
        while self._waiting or self._live:
            if is_in_step:
                await self._end_step()
            else:
                await self._act_at_random()  # one action: outside a step, it takes effect at once
                if not self._active():
                    await self._engine.preempt("unknown")  # returns when all earlier commands have run
                    await _ticks(NUM_TICKS)
            self._live = [reader for reader in self._live if not _has_ended(reader)]
            is_in_step = bool(self._active())
            if is_in_step:
                self._begin_step()

    async def _end_step(self) -> None:
        for _ in range(self._rng.choice((0, 0, 0, 1, 2, 3))):
            await self._act_at_random()
        barrier = asyncio.create_task(self._engine.preempt("unknown"))
        await _ticks(1)
        self._runner.run_step()
        await barrier
        await _ticks(NUM_TICKS)
        self.steps[-1].num_tokens = {reader.name: reader.num_tokens for reader in self._live}

    def _begin_step(self) -> None:
        inputs = self._runner.wait_step()
        slots = {prompt: slot for slot, prompt in self._runner.prompts.items()}
        active = {
            reader.name: slots.get(reader.request.prompt.token_ids, NO_SLOT)
            for reader in self._active()
            if reader.is_prefilled
        }
        in_prefill = [reader for reader in self._active() if not reader.is_prefilled][:1]
        slot = slots.get(in_prefill[0].request.prompt.token_ids, NO_SLOT) if in_prefill else None
        self.steps.append(Step(inputs, active, slot))
        complete = {item.slot for item in inputs if item.is_last}
        for reader in self._active():
            reader.is_prefilled |= slots.get(reader.request.prompt.token_ids) in complete

    def _active(self) -> list[Reader]:
        return [reader for reader in self._live if not reader.is_preempted]

    async def _act_at_random(self) -> None:
        """A random action on a random request."""
        active, preempted = self._active(), [reader for reader in self._live if reader.is_preempted]
        cancellable = [reader for reader in self._live if reader.may_cancel and not reader.is_cancelled]
        possible: list[tuple[Any, Sequence[Reader]]] = [(self._preempt, active), (self._cancel, cancellable)]
        if len(active) < self.MAX_ACTIVE:
            possible += [(self._start, self._waiting[:1]), (self._resume, preempted)] * self.START_WEIGHT
        act, readers = self._rng.choice([(act, readers) for act, readers in possible if readers])
        await act(self._rng.choice(readers))
        await _ticks(NUM_TICKS)

    async def _start(self, reader: Reader) -> None:
        self._waiting.remove(reader)
        self._live.append(reader)
        reader.task = asyncio.create_task(reader.read(self._engine))

    async def _cancel(self, reader: Reader) -> None:
        assert reader.task is not None
        reader.is_cancelled = True
        reader.task.cancel()

    async def _preempt(self, reader: Reader) -> None:
        reader.is_preempted = True
        self.num_preempted_in_answer += reader.is_prefilled
        self.num_preempted_in_prompt += not reader.is_prefilled
        if self._rng.random() < 0.2:  # resume before the preemption takes effect, then preempt again
            await self._call_preempt(reader)
            self._engine.resume(reader.name)
        await self._call_preempt(reader)

    async def _call_preempt(self, reader: Reader) -> None:
        """Call `preempt` without waiting. It takes effect when the running step has ended."""
        _PREEMPT_CALLS.add(preempt := asyncio.create_task(self._engine.preempt(reader.name)))
        preempt.add_done_callback(_PREEMPT_CALLS.discard)
        await _ticks(1)

    async def _resume(self, reader: Reader) -> None:
        reader.is_preempted = False
        self._engine.resume(reader.name)


_PREEMPT_CALLS: set[asyncio.Task[None]] = set()
"""Strong references; the event loop has only weak ones."""


def _has_ended(reader: Reader) -> bool:
    if reader.task is None or not reader.task.done():
        return False
    if not reader.is_cancelled:
        reader.task.result()
    return True


async def _ticks(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def largest_drift(steps: Sequence[Step]) -> int:
    """The largest difference, in tokens, that arose between two requests while both were active."""
    largest = 0
    names = {name for step in steps for name in step.active}
    for a, b in combinations(sorted(names), 2):
        window: list[int] = []
        for before, step in pairwise(steps):
            if not {a, b} <= step.active.keys():
                window = []
                continue
            for at in [before, step] if not window else [step]:
                window += [at.num_tokens[a] - at.num_tokens[b]] if {a, b} <= at.num_tokens.keys() else []
            largest = max(largest, max(window) - min(window)) if window else largest
    return largest


@dataclass(frozen=True)
class Play:
    """The result of a random schedule."""

    readers: list[Reader]
    schedule: Schedule
    most_slots: int
    reused_tokens: int


async def play_at_random(model: LoadedModel, requests: Sequence[GenerationRequest], seed: int, **options: Any) -> Play:
    """Run all requests on one engine in a random schedule; every third request may be cancelled."""
    runner = LockstepRunner(model.runner)
    engine = StepEngine("lockstep", lambda: replace(model, runner=runner), **options)
    await engine.start()
    readers = [Reader(request, may_cancel=n % 3 == 2) for n, request in enumerate(requests)]
    schedule = Schedule(engine, runner, random.Random(seed))
    try:
        await schedule.play(readers)
        assert not runner.prompts, "a slot was not closed"
    finally:
        runner.run_freely()
        await engine.stop()
    return Play(readers, schedule, runner.most_slots, runner.reused_tokens)


async def play_alone(model: LoadedModel, requests: Sequence[GenerationRequest], **options: Any) -> list[str]:
    """Run the requests one after the other and return their texts."""
    engine = StepEngine("alone", lambda: model, **options)
    await engine.start()
    readers = [Reader(request) for request in requests]
    for reader in readers:
        await reader.read(engine)
    await engine.stop()
    return [reader.text for reader in readers]


def check_play(play: Play, expected: Sequence[str]) -> None:
    """Check every step against its expected inputs, and every answer against the answer of the request alone."""
    assert [step for step in play.schedule.steps if not step.is_as_expected] == []
    assert largest_drift(play.schedule.steps) <= 1
    check_texts(play, expected)


def check_texts(play: Play, expected: Sequence[str]) -> None:
    for reader, whole in zip(play.readers, expected, strict=True):
        assert whole.startswith(reader.text) if reader.is_cancelled else reader.text == whole
        prompt_tokens = len(reader.request.prompt.token_ids)
        reported = sum(delta.num_prompt_tokens for delta in reader.deltas)
        assert reported == prompt_tokens if reader.num_tokens else reported <= prompt_tokens
