"""Exact places in a line of any order, without scanning it."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import TypeAlias

Key: TypeAlias = tuple[float, int]
"""What a line is sorted by, and the `seq` that makes it unique."""


class Line:
    """Members sorted by their keys; a place is 1 + the members with a smaller key.

    One sorted list and bisection: finding is O(log n), and moving the tail of a list of 10,000 takes a microsecond,
    less than the bookkeeping of any tree written in Python.
    """

    def __init__(self) -> None:
        self._keys: list[Key] = []

    def __len__(self) -> int:
        return len(self._keys)

    def __contains__(self, key: Key) -> bool:
        index = bisect_left(self._keys, key)
        return index < len(self._keys) and self._keys[index] == key

    @property
    def first(self) -> Key | None:
        return self._keys[0] if self._keys else None

    @property
    def keys(self) -> tuple[Key, ...]:
        """All of them, in order. O(n)."""
        return tuple(self._keys)

    def add(self, key: Key) -> None:
        assert key not in self, f"{key} is in the line already"
        insort(self._keys, key)

    def remove(self, key: Key) -> None:
        """It must be there."""
        index = self._index(key)
        del self._keys[index]

    def place(self, key: Key) -> int:
        """1 for the first. It must be there."""
        return self._index(key) + 1

    def _index(self, key: Key) -> int:
        index = bisect_left(self._keys, key)
        assert index < len(self._keys), f"{key} is not in the line"
        assert self._keys[index] == key, f"{key} is not in the line"
        return index
