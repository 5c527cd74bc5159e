"""`max_concurrency="auto"`: where adaptive concurrency begins, measured before anybody is served, and kept."""

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
"""A start may take so much longer, once for each model and machine."""
PROMPT_TOKENS, ANSWER_TOKENS = 64, 128
"""Less where the context is short."""


@dataclass(frozen=True, slots=True)
class FoundLimit:
    """How many should run at once to begin with."""

    max_concurrency: int
    why: str


async def find_limit(
    engine: Engine, *, itl_target_s: float, highest: int, lowest: int = 1, cache: LimitCache | None = None
) -> FoundLimit | None:
    """Measure a started engine that serves nobody yet, unless it was measured before.

    It is the sweep of `chatstream tune` with 9 of 10 gaps instead of 99 of 100, as adaptive concurrency judges too: a
    hundredth of what comes in so short a time is chance. None for an engine without a `Capacity.speed_key`, and for one
    that cannot be measured in that time; a reason is then in the log. Never below `lowest`, whatever was found.
    Cancelling it leaves nothing running.
    """
    capacity = engine.capacity
    if capacity.speed_key is None:
        return None
    cache = cache or LimitCache()
    key = await asyncio.to_thread(_key, engine, itl_target_s, highest)
    kept = await asyncio.to_thread(cache.read, key)
    if kept is not None:
        # How many the engine can hold may depend on how much memory is free today.
        kept = min(kept, capacity.max_concurrency or kept)
        return FoundLimit(max(kept, lowest), "found at an earlier start, with the same model on this machine")
    context_len = capacity.context_len or 4 * ANSWER_TOKENS
    settings = SweepSettings(
        max_streams=highest,
        prompt_tokens=max(1, min(PROMPT_TOKENS, context_len // 4)),
        answer_tokens=max(1, min(ANSWER_TOKENS, context_len // 4)),
        seconds=SECONDS,
        itl_target_s=itl_target_s,
        tail="p90",
    )
    logger.info("%s: measuring how many may run at once, %g s at most", engine.model_name, SECONDS)
    try:
        found = await sweep(engine, settings)
    except ChatStreamError as error:
        logger.warning("how many may run at once could not be measured: %s", error.message)
        return None
    limit, why = found.recommendation.max_concurrency, found.recommendation.why
    if not found.engine_failed:  # the next one may carry more
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
