"""Random schedules of the real engine, exactly repeatable: its thread takes a step when the test says so.

While a step is held, requests join, leave, are preempted and resumed; all of that must count from the next step on. So
the schedule knows, without asking the engine, who has to be in which plan.
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
NUM_TURNS = 20
"""Turns of the event loop in which every reader takes what one step made."""


class LockstepRunner:
    """A `ModelRunner` around another one. `wait_step` and `go` bracket each of its steps."""

    def __init__(self, runner: ModelRunner) -> None:
        self.context_len = runner.context_len
        self.max_slots = runner.max_slots
        self.supports_partial_prefix = runner.supports_partial_prefix
        self.save = runner.save
        self.prompts: dict[int, tuple[int, ...]] = {}
        """By open slot."""
        self.most_slots = 0
        self.taken_over = 0
        """Tokens that were not computed again."""
        self._runner = runner
        self._step: tuple[SlotInput, ...] = ()
        self._has_arrived = threading.Semaphore(0)
        self._may_go = threading.Semaphore(0)
        self._is_held = True

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
        self.taken_over += num_tokens
        self._runner.load(slot, saved, num_tokens)

    def copy(self, source: int, slot: int, num_tokens: int) -> None:
        self.taken_over += num_tokens
        self._runner.copy(source, slot, num_tokens)

    def step(self, inputs: Sequence[SlotInput]) -> Mapping[int, SampledToken | Exception]:
        if self._is_held:
            self._step = tuple(inputs)
            self._has_arrived.release()
            self._may_go.acquire()
        return self._runner.step(inputs)

    def wait_step(self) -> tuple[SlotInput, ...]:
        """The engine stands before its next step."""
        assert self._has_arrived.acquire(timeout=30), "no step, although somebody could go on"
        return self._step

    def go(self) -> None:
        self._may_go.release()

    def let_go(self) -> None:
        self._is_held = False
        self._may_go.release()


@dataclass
class Player:
    """One request of a schedule, as the schedule knows it."""

    request: GenerationRequest
    may_leave: bool = False
    deltas: list[TokenDelta] = field(default_factory=list)
    is_prefilled: bool = False
    is_preempted: bool = False
    has_left: bool = False
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
    """One step of the engine and what it had to be."""

    inputs: tuple[SlotInput, ...]
    active: dict[str, int]
    """Who had to get one token, and the slots of those."""
    reading: int | None
    """The slot whose prompt had to advance: the earliest unfinished one that is not preempted. NO_SLOT: it waits for
    somebody who reads the same beginning, so that one's had to."""
    num_tokens: dict[str, int] = field(default_factory=dict)
    """Tokens each of them had afterwards."""

    @property
    def is_as_expected(self) -> bool:
        """Others' prompts may be read too, where there is room."""
        generating = set(self.active.values())
        read = {item.slot for item in self.inputs} - generating
        advanced = {item.slot for item in self.inputs if item.is_last}
        is_read = {None: True, NO_SLOT: bool(read)}.get(self.reading, self.reading in read)
        return generating <= advanced and is_read


class Schedule:
    """Plays requests on a started engine over a `LockstepRunner`. Their prompts must all be different."""

    MAX_ACTIVE = 3
    """As many as a scheduler with so many slots would let run; the rest is preempted or has not joined."""
    EAGERNESS = 2
    """How much likelier it is that somebody comes than that somebody goes, while there is room."""

    def __init__(self, engine: StepEngine, runner: LockstepRunner, rng: random.Random) -> None:
        self.steps: list[Step] = []
        self.num_preempted_in_prompt = 0
        self.num_preempted_in_answer = 0
        self._engine = engine
        self._runner = runner
        self._rng = rng
        self._waiting: list[Player] = []
        self._live: list[Player] = []

    async def play(self, players: Sequence[Player]) -> None:
        self._waiting = list(players)
        is_in_step = False
        while self._waiting or self._live:
            if is_in_step:
                await self._end_step()
            else:
                await self._act()  # one at a time: here each takes effect at once
                if not self._active():
                    await self._engine.preempt("nobody")  # returns when everything before it has been obeyed
                    await _turns(NUM_TURNS)
            self._live = [player for player in self._live if not _has_ended(player)]
            is_in_step = bool(self._active())
            if is_in_step:
                self._begin_step()

    async def _end_step(self) -> None:
        for _ in range(self._rng.choice((0, 0, 0, 1, 2, 3))):
            await self._act()
        obeyed = asyncio.create_task(self._engine.preempt("nobody"))
        await _turns(1)
        self._runner.go()
        await obeyed
        await _turns(NUM_TURNS)
        self.steps[-1].num_tokens = {player.name: player.num_tokens for player in self._live}

    def _begin_step(self) -> None:
        inputs = self._runner.wait_step()
        slots = {prompt: slot for slot, prompt in self._runner.prompts.items()}
        active = {
            player.name: slots.get(player.request.prompt.token_ids, NO_SLOT)
            for player in self._active()
            if player.is_prefilled
        }
        reading = [player for player in self._active() if not player.is_prefilled][:1]
        slot = slots.get(reading[0].request.prompt.token_ids, NO_SLOT) if reading else None
        self.steps.append(Step(inputs, active, slot))
        complete = {item.slot for item in inputs if item.is_last}
        for player in self._active():
            player.is_prefilled |= slots.get(player.request.prompt.token_ids) in complete

    def _active(self) -> list[Player]:
        return [player for player in self._live if not player.is_preempted]

    async def _act(self) -> None:
        """Something happens to somebody."""
        active, preempted = self._active(), [player for player in self._live if player.is_preempted]
        leaving = [player for player in self._live if player.may_leave and not player.has_left]
        possible: list[tuple[Any, Sequence[Player]]] = [(self._preempt, active), (self._leave, leaving)]
        if len(active) < self.MAX_ACTIVE:
            possible += [(self._join, self._waiting[:1]), (self._resume, preempted)] * self.EAGERNESS
        act, players = self._rng.choice([(act, players) for act, players in possible if players])
        await act(self._rng.choice(players))
        await _turns(NUM_TURNS)

    async def _join(self, player: Player) -> None:
        self._waiting.remove(player)
        self._live.append(player)
        player.task = asyncio.create_task(player.read(self._engine))

    async def _leave(self, player: Player) -> None:
        assert player.task is not None
        player.has_left = True
        player.task.cancel()

    async def _preempt(self, player: Player) -> None:
        player.is_preempted = True
        self.num_preempted_in_answer += player.is_prefilled
        self.num_preempted_in_prompt += not player.is_prefilled
        if self._rng.random() < 0.2:  # undone before it can have taken effect, and done again
            await self._put_preempt(player)
            self._engine.resume(player.name)
        await self._put_preempt(player)

    async def _put_preempt(self, player: Player) -> None:
        """Asked for; it takes effect when the step that is under way has ended."""
        _PARKS.add(preempt := asyncio.create_task(self._engine.preempt(player.name)))
        preempt.add_done_callback(_PARKS.discard)
        await _turns(1)

    async def _resume(self, player: Player) -> None:
        player.is_preempted = False
        self._engine.resume(player.name)


_PARKS: set[asyncio.Task[None]] = set()
"""The event loop itself keeps no task alive."""


def _has_ended(player: Player) -> bool:
    if player.task is None or not player.task.done():
        return False
    if not player.has_left:
        player.task.result()
    return True


async def _turns(count: int) -> None:
    for _ in range(count):
        await asyncio.sleep(0)


def largest_drift(steps: Sequence[Step]) -> int:
    """By how many tokens two of them ever drew apart while both were active."""
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
    """What became of a random schedule."""

    players: list[Player]
    schedule: Schedule
    most_slots: int
    taken_over: int


async def play_at_random(model: LoadedModel, requests: Sequence[GenerationRequest], seed: int, **options: Any) -> Play:
    """All requests on one engine; every third one may leave."""
    runner = LockstepRunner(model.runner)
    engine = StepEngine("lockstep", lambda: replace(model, runner=runner), **options)
    await engine.start()
    players = [Player(request, may_leave=n % 3 == 2) for n, request in enumerate(requests)]
    schedule = Schedule(engine, runner, random.Random(seed))
    try:
        await schedule.play(players)
        assert not runner.prompts, "every slot was given back"
    finally:
        runner.let_go()
        await engine.stop()
    return Play(players, schedule, runner.most_slots, runner.taken_over)


async def play_alone(model: LoadedModel, requests: Sequence[GenerationRequest], **options: Any) -> list[str]:
    """The texts of all requests, one after the other."""
    engine = StepEngine("alone", lambda: model, **options)
    await engine.start()
    players = [Player(request) for request in requests]
    for player in players:
        await player.read(engine)
    await engine.stop()
    return [player.text for player in players]


def check_play(play: Play, expected: Sequence[str]) -> None:
    """Every step was the right one, and everybody said what they say alone, as far as they got."""
    assert [step for step in play.schedule.steps if not step.is_as_expected] == []
    assert largest_drift(play.schedule.steps) <= 1
    check_texts(play, expected)


def check_texts(play: Play, expected: Sequence[str]) -> None:
    for player, whole in zip(play.players, expected, strict=True):
        assert whole.startswith(player.text) if player.has_left else player.text == whole
        prompt_tokens = len(player.request.prompt.token_ids)
        read = sum(delta.num_prompt_tokens for delta in player.deltas)
        assert read == prompt_tokens if player.num_tokens else read <= prompt_tokens
