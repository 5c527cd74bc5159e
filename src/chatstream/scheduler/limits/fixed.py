"""How many generations may run at the same time."""

from __future__ import annotations

from typing import Protocol

from chatstream.checks import check_int
from chatstream.scheduler.settings import MAX_COUNT


class ConcurrencyLimit(Protocol):
    """Asked before every start. It may change at any moment; running generations are never stopped by it."""

    @property
    def value(self) -> int:
        """At most this many may run, at least 1."""

    def set(self, value: int) -> None:
        """An operator's wish. Raises `ConfigError` when it cannot be met."""


class FixedLimit:
    """The number the operator gave, exactly."""

    def __init__(self, value: int) -> None:
        self.set(value)

    @property
    def value(self) -> int:
        return self._value

    def set(self, value: int) -> None:
        check_int("max_concurrency", value, at_least=1, at_most=MAX_COUNT)
        self._value = value

    def __repr__(self) -> str:
        return f"FixedLimit({self._value})"
