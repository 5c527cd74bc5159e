"""The protocol of a concurrency limit, and a fixed limit."""

from __future__ import annotations

from typing import Protocol

from chatstream.checks import check_int
from chatstream.scheduler.settings import MAX_COUNT


class ConcurrencyLimit(Protocol):
    """The maximum number of running requests, read before every start. The value may change at any time."""

    @property
    def value(self) -> int:
        """The limit; at least 1."""

    def set(self, value: int) -> None:
        """Set the limit on behalf of an operator. Raises `ConfigError` when the value is invalid."""


class FixedLimit:
    """A limit that only an operator changes."""

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
