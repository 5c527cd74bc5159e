"""Measures an engine with 1, 2, 4, 8, … concurrent streams, through `engines.base` only.

The streams of a level continue while those of the next one join. A stream that ends starts its next request at once, so
each window has its full number of streams. The ends are spread evenly over time: requests join as often as in real
traffic with answers of this length, never all at once, and the gaps that they cause are measured. No two prompts share
a prefix, so the prefix cache has no effect.
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
"""Minimum mean number of tokens per stream in a window, even after its time is over."""
SETTLING_TOKENS = 2
"""Tokens per stream before a window, so that the change of the number of streams is in no window."""
MIN_GAIN = 0.05
"""The sweep ends after two doublings in a row with a smaller gain of throughput."""
MAX_GAP_RATIO = 2.0
"""The sweep ends when the median gap exceeds this multiple of the target."""
MAX_EMPTY = 20
"""Maximum number of consecutive answers of a stream without a token; random prompts cause a few of them."""
MAX_REFINEMENTS = 2
"""Maximum number of additional measurements of a recommended but unmeasured number of streams."""
MAX_STREAMS, MAX_SECONDS, MAX_TOKENS = 4096, 3600.0, 100_000
GOLDEN = (5**0.5 - 1) / 2
"""Golden ratio - 1: its multiples modulo 1 are evenly spread for any count."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SweepSettings:
    """Settings of a sweep. An invalid value raises `ConfigError` with the name of the setting."""

    max_streams: int = 64
    """The highest number of streams to measure."""
    prompt_tokens: int = 64
    answer_tokens: int = 128
    """Maximum length of an answer; a model may end its answers earlier."""
    seconds: float = 30.0
    """Time limit of the sweep, without loading; a short limit measures fewer levels."""
    itl_target_s: float = 0.1
    tail: Tail = "p99"
    """The quantile of the gaps that must stay within the target."""
    temperature: float | None = None
    """Temperature of all requests; None: the default of the engine."""

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
    """The measured levels and the recommendation."""

    levels: tuple[Level, ...]
    """In ascending order; at least one."""
    why_ended: str
    recommendation: Recommendation
    engine_failed: bool
    """The sweep ended because the engine failed; a healthy engine may carry more streams."""


async def sweep(
    engine: Engine, settings: SweepSettings, *, on_level: Callable[[int], object] = lambda _: None
) -> Sweep:
    """Measure a started, idle engine. `on_level` is called with the number of streams of each level before it runs.

    Returns within `settings.seconds`, plus the step that the engine needs to release its streams. Cancellation leaves
    nothing running. Raises `ConfigError` if prompt and answer exceed the context or the time is too short for one
    stream, and the error of the engine if it fails with one stream.
    """
    loop = asyncio.get_running_loop()
    ends_s = loop.time() + settings.seconds
    levels: list[Level] = []
    why_ended, engine_failed = "the time limit was reached", False
    try:
        async with asyncio.timeout_at(ends_s), _open_streams(engine, settings) as streams:

            async def measure(num_streams: int, window_ends_s: float) -> None:
                on_level(num_streams)
                levels.append(await streams.measure(num_streams, window_ends_s))
                levels.sort(key=lambda level: level.num_streams)

            await streams.warm_up()
            numbers, why_highest = _levels_to_try(engine, settings)
            for i, number in enumerate(numbers):
                share = 1 / (len(numbers) - i + 1)  # reserve one share for a refinement
                await measure(number, loop.time() + share * (ends_s - loop.time()))
                if reason := _early_end(levels, settings):
                    why_ended = reason
                    break
            else:
                why_ended = why_highest
            for _ in range(MAX_REFINEMENTS):
                chosen = _recommend(levels, settings, why_ended)
                if chosen.is_measured:
                    break
                await measure(chosen.max_concurrency, loop.time() + (ends_s - loop.time()) / 2)
    except TimeoutError:
        if not levels:
            raise ConfigError(
                f"seconds: {settings.seconds:g} are too few: one stream alone did not generate "
                f"{MIN_TOKENS_PER_STREAM} tokens in this time",
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


def _levels_to_try(engine: Engine, settings: SweepSettings) -> tuple[list[int], str]:
    """Return the levels 1, 2, 4, 8, … up to and including the highest one, and the reason for that limit."""
    highest, why = settings.max_streams, "this is the value of max_streams"
    limit = engine.capacity.max_concurrency
    if limit is not None and limit < highest:
        highest, why = limit, "this is the capacity of the engine"
    powers = itertools.takewhile(lambda number: number < highest, (2**i for i in itertools.count()))
    return [*powers, highest], why


def _early_end(levels: list[Level], settings: SweepSettings) -> str:
    """Return the reason to end the sweep early, or "". The first `MIN_LEVELS` levels are always measured."""
    if len(levels) < MIN_LEVELS:
        return ""
    rates = [level.tokens_per_s for level in levels[-3:]]
    if all(after < (1 + MIN_GAIN) * before for before, after in itertools.pairwise(rates)):
        return f"two doublings in a row gained less than {MIN_GAIN:.0%} tokens/s"
    if levels[-1].itl_p50_s > MAX_GAP_RATIO * settings.itl_target_s:
        return f"the median gap exceeded {MAX_GAP_RATIO:g} times the target"
    return ""


# --- the streams ------------------------------------------------------------------------------------------------------


@asynccontextmanager
async def _open_streams(engine: Engine, settings: SweepSettings) -> AsyncIterator[_Streams]:
    """Yield the streams of the sweep; all of them have ended when the context exits."""
    context_len = engine.capacity.context_len
    if context_len is not None and settings.prompt_tokens + settings.answer_tokens > context_len:
        raise ConfigError(
            f"prompt_tokens plus answer_tokens must not exceed the context of {context_len} tokens",
            param="prompt_tokens",
        )
    sampling = replace(engine.default_sampling, max_new_tokens=settings.answer_tokens)
    if settings.temperature is not None:
        sampling = replace(sampling, temperature=settings.temperature)
    # Engines without a tokenizer use this text as the prompt; for the others it is the pool of token ids to draw from.
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
    """The tokens and gaps of a measured interval."""

    started_s: float
    min_tokens: int
    last_s: float = 0.0
    """Time of the last token; a window starts and ends with a step."""
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
    """A number of concurrent streams. Each starts its next request when an answer ends."""

    def __init__(
        self, engine: Engine, prompt: PreparedPrompt, sampling: SamplingParams, settings: SweepSettings
    ) -> None:
        self._engine = engine
        self._prompt = prompt
        self._sampling = sampling
        self._settings = settings
        self._random = random.Random(0)
        self._num_requests = 0
        self._tasks: list[asyncio.Task[None]] = []
        self._window: _Window | None = None

    async def warm_up(self) -> None:
        """Run one stream for the one-time costs: memory, lazy compilation, processor clocks."""
        await self.resize(1)
        await self._record(SETTLING_TOKENS)
        await self.resize(0)

    async def measure(self, num_streams: int, ends_s: float) -> Level:
        """Measure a window that starts when all streams run and ends at `ends_s`, or later if it has too few tokens."""
        ttft_s = await self.resize(num_streams)
        await self._record(SETTLING_TOKENS * num_streams)
        window = await self._record(MIN_TOKENS_PER_STREAM * num_streams, ends_s)
        window_s = window.last_s - window.started_s
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

    async def _record(self, min_tokens: int, ends_s: float = 0.0) -> _Window:
        loop = asyncio.get_running_loop()
        self._window = window = _Window(loop.time(), min_tokens)
        try:
            await self._wait(asyncio.sleep(max(0.0, ends_s - loop.time())))
            await self._wait(window.has_enough.wait())
        finally:
            self._window = None
        return window

    async def resize(self, num_streams: int) -> float | None:
        """Start or cancel streams, and return when all `num_streams` of them generate.

        The result is the time to first token of the last one that joined, None if none joined.
        """
        excess, self._tasks = self._tasks[num_streams:], self._tasks[:num_streams]
        for task in excess:
            task.cancel()
        if excess:
            await asyncio.gather(*excess, return_exceptions=True)
        if (missing := num_streams - len(self._tasks)) <= 0:
            return None
        await self._join(missing - 1)
        return await self._join(1)

    async def _join(self, count: int) -> float:
        """Start `count` streams, wait for all first tokens and return the time to the last one."""
        loop = asyncio.get_running_loop()
        started_s = loop.time()
        joined_events = [asyncio.Event() for _ in range(count)]
        for has_joined in joined_events:
            number = len(self._tasks)
            self._tasks.append(
                asyncio.create_task(self._generate_repeatedly(number, has_joined), name=f"tune-{number}")
            )
        for has_joined in joined_events:
            await self._wait(has_joined.wait())
        return loop.time() - started_s

    async def _wait(self, awaitable: Coroutine[Any, Any, object]) -> None:
        """Wait for `awaitable`, or raise the error of a stream; a stream ends only with an error."""
        waiter = asyncio.create_task(awaitable)
        try:
            done, _ = await asyncio.wait([waiter, *self._tasks], return_when=asyncio.FIRST_COMPLETED)
        finally:
            waiter.cancel()
        for task in done - {waiter}:
            task.result()

    async def _generate_repeatedly(self, number: int, has_joined: asyncio.Event) -> None:
        # The first answers have different lengths, which spreads the ends and joins evenly.
        first_tokens = 1 + int(self._settings.answer_tokens * ((number + 1) * GOLDEN % 1))
        sampling = replace(self._sampling, max_new_tokens=first_tokens)
        num_empty = 0
        while num_empty < MAX_EMPTY:
            num_empty = 0 if await self._generate(sampling, has_joined) else num_empty + 1
            sampling = self._sampling
        raise EngineError("the engine ends its answers without a token and cannot be measured")

    async def _generate(self, sampling: SamplingParams, has_joined: asyncio.Event) -> bool:
        """Generate one answer; return False if it had no token."""
        loop = asyncio.get_running_loop()
        self._num_requests += 1
        request = GenerationRequest(f"tune-{self._num_requests}", self._next_prompt(), sampling)
        started_s, last_s = loop.time(), None
        try:
            async with aclosing(self._engine.stream(request)) as deltas:
                async for delta in deltas:
                    if not delta.num_tokens:
                        continue
                    now_s, window = loop.time(), self._window
                    if window is not None:
                        if last_s is None:
                            if started_s >= window.started_s:
                                window.ttfts_s.append(now_s - started_s)
                        elif last_s >= window.started_s:
                            # Count several tokens in one delta as equal gaps.
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
