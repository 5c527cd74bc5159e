"""Measures the initial limit of adaptive concurrency, once per server."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from chatstream.engines.base import Engine

if TYPE_CHECKING:
    from chatstream.tuning.start import FoundLimit


class FirstLimit:
    """Measures the limit at most once; concurrent callers share one measurement."""

    def __init__(self, *, is_wanted: bool, itl_target_s: float, lowest: int, highest: int) -> None:
        self._is_wanted = is_wanted
        self._itl_target_s = itl_target_s
        self._lowest, self._highest = lowest, highest
        self._lock = asyncio.Lock()

    @property
    def is_being_measured(self) -> bool:
        return self._lock.locked()

    async def find(self, engine: Engine) -> FoundLimit | None:
        """The measured limit for the first caller; None for later callers, or if the engine cannot be measured.

        The engine must have started and must not serve requests yet.
        """
        async with self._lock:
            if not self._is_wanted:
                return None
            from chatstream.tuning.start import find_limit  # loads numpy

            found = await find_limit(
                engine, itl_target_s=self._itl_target_s, lowest=self._lowest, highest=self._highest
            )
            self._is_wanted = False
            return found
