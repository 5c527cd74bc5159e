"""How many generations may run at the same time."""

from __future__ import annotations

from typing import Protocol

from chatstream.errors import ConfigError


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
        check_count("max_concurrency", value, at_least=1)
        self._value = value

    def __repr__(self) -> str:
        return f"FixedLimit({self._value})"


def check_count(name: str, value: object, *, at_least: int) -> None:
    """Raises `ConfigError` naming the setting unless `value` is an int of at least `at_least`."""
    if not isinstance(value, int) or isinstance(value, bool) or value < at_least:
        raise ConfigError(f"{name} must be a whole number of at least {at_least}, not {value!r}", param=name)


def check_seconds(name: str, value: object) -> None:
    """Raises `ConfigError` naming the setting unless `value` is None or a number of seconds above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if value is not None and not (is_number and value > 0):  # type: ignore[operator]
        raise ConfigError(f"{name} must be above 0 seconds, not {value!r}", param=name)
