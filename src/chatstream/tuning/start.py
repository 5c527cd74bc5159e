"""The initial limit of `max_concurrency="auto"`: measured at startup, then cached."""

from __future__ import annotations

import asyncio
import logging
from dataclasses import dataclass
from importlib.metadata import version

from chatstream.engines.base import Engine
from chatstream.errors import ChatStreamError
from chatstream.tuning.cache import Key, LimitCache, this_machine
from chatstream.tuning.sweep import SweepSettings, sweep

logger = logging.getLogger(__name__)

SECONDS = 5.0
"""Maximum additional startup time, once for each model and machine."""
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128
"""Lengths of the measured requests; shorter for a short context."""


@dataclass(frozen=True, slots=True)
class FoundLimit:
    """The initial concurrency limit, and its explanation for the log."""

    max_concurrency: int
    why: str


async def find_limit(
    engine: Engine, *, itl_target_s: float, highest: int, lowest: int = 1, cache: LimitCache | None = None
) -> FoundLimit | None:
    """Return the cached limit of a started, idle engine, or measure it.

    This is the sweep of `chatstream tune` judged by p90 instead of p99, like adaptive concurrency: a short window
    has too few gaps for a p99. Return None for an engine without a `Capacity.speed_key`, or for one that cannot be
    measured in time; the reason is logged. The limit is at least `lowest`. Cancellation leaves nothing running.
    """
    capacity = engine.capacity
    if capacity.speed_key is None:
        return None
    cache = cache or LimitCache()
    key = await asyncio.to_thread(_key, engine, itl_target_s, highest)
    cached = await asyncio.to_thread(cache.read, key)
    if cached is not None:
        # The capacity of the engine may depend on the memory that is free now.
        cached = min(cached, capacity.max_concurrency or cached)
        return FoundLimit(max(cached, lowest), "measured at an earlier start, with the same model on this machine")
    context_len = capacity.context_len or 4 * ANSWER_TOKENS
    settings = SweepSettings(
        max_streams=highest,
        prompt_tokens=max(1, min(PROMPT_TOKENS, context_len // 4)),
        answer_tokens=max(1, min(ANSWER_TOKENS, context_len // 4)),
        seconds=SECONDS,
        itl_target_s=itl_target_s,
        tail="p90",
    )
    logger.info("%s: measuring the concurrency limit, at most %g s", engine.model_name, SECONDS)
    try:
        found = await sweep(engine, settings)
    except ChatStreamError as error:
        logger.warning("the concurrency limit could not be measured: %s", error.message)
        return None
    limit, why = found.recommendation.max_concurrency, found.recommendation.why
    if not found.engine_failed:  # a healthy engine may carry more
        await asyncio.to_thread(cache.write, key, limit)
    return FoundLimit(max(limit, lowest), f"measured: {' '.join(why[:2])}")


def _key(engine: Engine, itl_target_s: float, highest: int) -> Key:
    return {
        "model": engine.model_name,
        "engine": engine.capacity.speed_key,
        "context_len": engine.capacity.context_len,
        "highest": highest,
        "itl_target_s": itl_target_s,
        "chatstream": version("openchatstream"),
        **this_machine(),
    }
