"""Runs 1, 2, 4, 8, … streams on an engine and takes their times. Knows the engine by its contract alone.

Streams stay while more of them join, and who ends asks again at once, so that in each window as many run as it says.
Their ends are spread evenly over time: joins are as frequent as in real traffic with answers of that length, never all
at once, and the gaps that they cause are in the figures. No two prompts begin alike, so that none is read from memory.
"""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from chatstream.checks import check_int, check_seconds
from chatstream.engines.base import Engine
from chatstream.errors import ChatStreamError, ConfigError, EngineError
from chatstream.tuning.curve import MIN_LEVELS, Level
from chatstream.tuning.recommend import Recommendation, Tail, recommend
from chatstream.types import GenerationRequest, PreparedPrompt, SamplingParams

MIN_TOKENS_PER_STREAM = 8
"""A window has at least so many of each, on average, however little time there is."""
SETTLING_TOKENS = 2
"""Of each, before a window: the step in which the number changed belongs to neither."""
MIN_GAIN = 0.05
"""Twice as many streams that bring less, twice in a row, are the last ones tried."""
FAR_BEYOND = 2.0
"""So are those of whom half of the gaps are above so many times the target."""
MAX_EMPTY = 20
"""Answers of one stream without a token, in a row: a prompt of chance words may be ended at once, not all of them."""
MAX_REFINEMENTS = 2
"""So often a number that was recommended without being measured is measured after all."""
MAX_STREAMS, MAX_SECONDS, MAX_TOKENS = 4096, 3600.0, 100_000
GOLDEN = (5**0.5 - 1) / 2
"""Its multiples modulo 1 are spread evenly, however many there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """Checked when built; a wrong value raises `ConfigError` that names it."""

    max_streams: int = 64
    """The highest number tried."""
    prompt_tokens: int = 64
    answer_tokens: int = 128
    """At most; a model that ends its answers earlier gets new prompts earlier."""
    seconds: float = 30.0
    """For everything but loading. Fewer levels are measured when it is over, and nothing runs on."""
    itl_target_s: float = 0.1
    tail: Tail = "p99"
    """Which of the gaps must keep the target."""
    temperature: float | None = None
    """Of all requests; None: the engine's own."""

    def __post_init__(self) -> None:
        for name, value, limit in (
            ("max_streams", self.max_streams, MAX_STREAMS),
            ("prompt_tokens", self.prompt_tokens, MAX_TOKENS),
            ("answer_tokens", self.answer_tokens, MAX_TOKENS),
        ):
            check_int(name, value, at_least=1, at_most=limit)
        check_seconds("seconds", self.seconds, at_most=MAX_SECONDS)
        check_seconds("itl_target_s", self.itl_target_s, at_most=MAX_SECONDS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What was measured and what follows from it."""

    levels: tuple[Level, ...]
    """In ascending order; at least one."""
    why_ended: str
    recommendation: Recommendation
    engine_failed: bool
    """That is why it ended: a healthy engine might have carried more."""


async def sweep(
    engine: Engine, settings: SweepSettings, *, on_level: Callable[[int], object] = lambda _: None
) -> Sweep:
    """Measure a started engine that does nothing else. `on_level` is told how many streams are measured next.

    Returns at most `settings.seconds` later, plus what the engine needs to let go of its streams: one step. Cancelling
    it leaves nothing running. Raises `ConfigError` when a prompt and an answer do not fit or the time is too short for
    one stream, and the engine's error when it fails with one stream.
    """
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + settings.seconds
    levels: list[Level] = []
    why_ended, engine_failed = "the time was used up", False
    try:
        async with asyncio.timeout_at(ends_s), _open_streams(engine, settings) as streams:

            async def measure(num_streams: int, window_ends_s: float) -> None:
                on_level(num_streams)
                levels.append(await streams.measure(num_streams, window_ends_s))
                levels.sort(key=lambda level: level.num_streams)

            await streams.warm_up()
            numbers, why_ended_at_last = _numbers(engine, settings)
            for i, number in enumerate(numbers):
                share = 1 / (len(numbers) - i + 1)  # one more than are left, for a refinement
                await measure(number, loop.time() + share * (ends_s - loop.time()))
                if reason := _reason_to_end(levels, settings):
                    why_ended = reason
                    break
            else:
                why_ended = why_ended_at_last
            for _ in range(MAX_REFINEMENTS):
                chosen = _recommend(levels, settings, why_ended)
                if chosen.is_measured:
                    break
                await measure(chosen.max_concurrency, loop.time() + (ends_s - loop.time()) / 2)
    except TimeoutError:
        if not levels:
            raise ConfigError(
                f"seconds: {settings.seconds:g} are too few, one stream alone had not generated "
                f"{MIN_TOKENS_PER_STREAM} tokens by then",
                param="seconds",
            ) from None
    except ChatStreamError as error:
        if not levels:
            raise
        why_ended, engine_failed = f"the engine failed: {error.message}", True
    return Sweep(
        levels=tuple(levels),
        why_ended=why_ended,
        recommendation=_recommend(levels, settings, why_ended),
        engine_failed=engine_failed,
    )


def _recommend(levels: list[Level], settings: SweepSettings, why_ended: str) -> Recommendation:
    return recommend(levels, itl_target_s=settings.itl_target_s, tail=settings.tail, why_no_more=why_ended)


def _numbers(engine: Engine, settings: SweepSettings) -> tuple[list[int], str]:
    """1, 2, 4, 8, … up to the highest, itself among them; and what makes that the highest."""
    highest, why = settings.max_streams, "it is the highest that was to be tried"
    limit = engine.capacity.max_concurrency
    if limit is not None and limit < highest:
        highest, why = limit, "it is the most that the engine can run"
    powers = itertools.takewhile(lambda number: number < highest, (2**i for i in itertools.count()))
    return [*powers, highest], why


def _reason_to_end(levels: list[Level], settings: SweepSettings) -> str:
    """Empty: go on. The fit needs some levels, so the first ones are always measured."""
    if len(levels) < MIN_LEVELS:
        return ""
    rates = [level.tokens_per_s for level in levels[-3:]]
    if all(after < (1 + MIN_GAIN) * before for before, after in itertools.pairwise(rates)):
        return "twice as many had brought nothing, twice in a row"
    if levels[-1].itl_p50_s > FAR_BEYOND * settings.itl_target_s:
        return f"half of the gaps were above {FAR_BEYOND:g} times the target"
    return ""


# --- the streams ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _open_streams(engine: Engine, settings: SweepSettings) -> AsyncIterator[_Streams]:
    """None of them runs any more when the context ends."""
    context_len = engine.capacity.context_len
    if context_len is not None and settings.prompt_tokens + settings.answer_tokens > context_len:
        raise ConfigError(
            f"prompt_tokens and answer_tokens must fit into the context of {context_len} tokens together",
            param="prompt_tokens",
        )
    sampling = replace(engine.default_sampling, max_new_tokens=settings.answer_tokens)
    if settings.temperature is not None:
        sampling = replace(sampling, temperature=settings.temperature)
    # As long as wanted for engines that do not tokenise. Of the others only the ids are taken, which are drawn from.
    num_words = settings.prompt_tokens if context_len is None else max(1, min(settings.prompt_tokens, context_len // 8))
    prepared = await engine.prepare(_text(num_words), sampling)
    streams = _Streams(engine, prepared, sampling, settings)
    try:
        yield streams
    finally:
        await streams.resize(0)


def _text(num_words: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(TEXT.split()), num_words))


TEXT = "the river was low that summer and every evening two children walked down to see how far it had gone"


@dataclass(slots=True)
class _Window:
    """What is taken down between two moments."""

    began_s: float
    min_tokens: int
    last_s: float = 0.0
    """Of the last token: a window ends with a step, like it began."""
    num_tokens: int = 0
    gaps_s: list[float] = field(default_factory=list)
    ttfts_s: list[float] = field(default_factory=list)
    has_enough: asyncio.Event = field(default_factory=asyncio.Event)

    def add_tokens(self, count: int, now_s: float) -> None:
        self.last_s = now_s
        self.num_tokens += count
        if self.num_tokens >= self.min_tokens and self.gaps_s:
            self.has_enough.set()


class _Streams:
    """So many generations at the same time, each of which begins again when it ends."""

    def __init__(
        self, engine: Engine, prompt: PreparedPrompt, sampling: SamplingParams, settings: SweepSettings
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._sampling = sampling
        self._settings = settings
        self._random = random.Random(0)
        self._num_asked = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._window: _Window | None = None

    async def warm_up(self) -> None:
        """What happens once: memory, code that is compiled when it is first needed, clocks that rise."""
        await self.resize(1)
        await self._take_down(SETTLING_TOKENS)
        await self.resize(0)

    async def measure(self, num_streams: int, ends_s: float) -> Level:
        """The window begins when all have joined and ends at `ends_s`, or later when it has too few tokens."""
        ttft_s = await self.resize(num_streams)
        await self._take_down(SETTLING_TOKENS * num_streams)
        window = await self._take_down(MIN_TOKENS_PER_STREAM * num_streams, ends_s)
        window_s = window.last_s - window.began_s
        p50, p90, p99 = (float(gap_s) for gap_s in np.quantile(window.gaps_s, [0.5, 0.9, 0.99]))
        ttfts_s = window.ttfts_s + ([] if ttft_s is None else [ttft_s])
        return Level(
            num_streams=num_streams,
            tokens_per_s=window.num_tokens / window_s,
            itl_p50_s=p50,
            itl_p90_s=p90,
            itl_p99_s=p99,
            ttft_s=float(np.median(ttfts_s)) if ttfts_s else float("nan"),
            num_joined=len(ttfts_s),
            num_gaps=len(window.gaps_s),
            window_s=window_s,
        )

    async def _take_down(self, min_tokens: int, ends_s: float = 0.0) -> _Window:
        loop = asyncio.get_running_loop()
        self._window = window = _Window(loop.time(), min_tokens)
        try:
            await self._wait(asyncio.sleep(max(0.0, ends_s - loop.time())))
            await self._wait(window.has_enough.wait())
        finally:
            self._window = None
        return window

    async def resize(self, num_streams: int) -> float | None:
        """Returns when so many generate. The time to first token of the last one who joined, beside all others."""
        surplus, self._tasks = self._tasks[num_streams:], self._tasks[:num_streams]
        for task in surplus:
            task.cancel()
        if surplus:
            await asyncio.gather(*surplus, return_exceptions=True)
        if (missing := num_streams - len(self._tasks)) <= 0:
            return None
        await self._join(missing - 1)
        return await self._join(1)

    async def _join(self, count: int) -> float:
        """Returns when all of them have their first token; the time to the last of these."""
        loop = asyncio.get_running_loop()
        began_s = loop.time()
        newcomers = [asyncio.Event() for _ in range(count)]
        for has_joined in newcomers:
            number = len(self._tasks)
            self._tasks.append(asyncio.create_task(self._keep_asking(number, has_joined), name=f"tune-{number}"))
        for has_joined in newcomers:
            await self._wait(has_joined.wait())
        return loop.time() - began_s

    async def _wait(self, awaitable: Coroutine[Any, Any, object]) -> None:
        """Raises what a stream raised meanwhile: none of them ends by itself."""
        waiter = asyncio.create_task(awaitable)
        try:
            done, _ = await asyncio.wait([waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        for task in done - {waiter}:
            task.result()

    async def _keep_asking(self, number: int, has_joined: asyncio.Event) -> None:
        # So that the ends, and with them the joins, are spread over the length of an answer.
        first_tokens = 1 + int(self._settings.answer_tokens * ((number + 1) * GOLDEN % 1))
        sampling = replace(self._sampling, max_new_tokens=first_tokens)
        num_empty = 0
        while num_empty < MAX_EMPTY:
            num_empty = 0 if await self._ask(sampling, has_joined) else num_empty + 1
            sampling = self._sampling
        raise EngineError("the engine ends its answers without a token: there is nothing to measure")

    async def _ask(self, sampling: SamplingParams, has_joined: asyncio.Event) -> bool:
        """One answer from its prompt to its end; False when it had no token."""
        loop = asyncio.get_running_loop()
        self._num_asked += 1
        request = GenerationRequest(f"tune-{self._num_asked}", self._next_prompt(), sampling)
        began_s, last_s = loop.time(), None
        try:
            async with aclosing(self._engine.stream(request)) as deltas:
                async for delta in deltas:
                    if not delta.num_tokens:
                        continue
                    now_s, window = loop.time(), self._window
                    if window is not None:
                        if last_s is None:
                            if began_s >= window.began_s:
                                window.ttfts_s.append(now_s - began_s)
                        elif last_s >= window.began_s:
                            # Several tokens that come together are so many equal gaps.
                            window.gaps_s += [(now_s - last_s) / delta.num_tokens] * delta.num_tokens
                        window.add_tokens(delta.num_tokens, now_s)
                    last_s = now_s
                    has_joined.set()
        except ChatStreamError:
            raise
        except Exception as error:
            raise EngineError(f"the engine failed: {type(error).__name__}: {error}") from error
        return last_s is not None

    def _next_prompt(self) -> PreparedPrompt:
        ids = self._prompt.token_ids
        if not ids:
            return self._prompt
        return replace(self._prompt, token_ids=tuple(self._random.choices(ids, k=self._settings.prompt_tokens)))
