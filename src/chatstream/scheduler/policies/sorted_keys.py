"""Exact places in a line of any order, without scanning it."""

from __future__ import annotations

from array import array
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from typing import TypeAlias

Key: TypeAlias = tuple[float, int]
"""What a line is sorted by, and the `seq` that makes it unique."""


class SortedKeys:
    """Members sorted by their keys; a place is 1 + the members with a smaller key.

    Sorted arrays and bisection: finding is O(log n), and moving the tail of 10,000 takes a microsecond, less than the
    bookkeeping of any tree written in Python. Plain numbers, because a search among 10,000 objects that nobody has
    touched for a while waits for memory at every step, and takes five times as long.
    """

    def __init__(self) -> None:
        self._values = array("d")
        self._seqs = array("q")

    def __len__(self) -> int:
        return len(self._seqs)

    @property
    def first(self) -> Key | None:
        return (self._values[0], self._seqs[0]) if self._seqs else None

    @property
    def keys(self) -> tuple[Key, ...]:
        """All of them, in order. O(n)."""
        return tuple(zip(self._values, self._seqs, strict=True))

    @property
    def seqs(self) -> Iterator[int]:
        """In order; the line must not change meanwhile."""
        return iter(self._seqs)

    def add(self, key: Key) -> None:
        index = self._bisect(key)
        assert not self._is_at(index, key), f"{key} is in the line already"
        self._values.insert(index, key[0])
        self._seqs.insert(index, key[1])

    def remove(self, key: Key) -> None:
        """It must be there."""
        index = self._index(key)
        del self._values[index], self._seqs[index]

    def position(self, key: Key) -> int:
        """1 for the first. It must be there."""
        return self._index(key) + 1

    def _index(self, key: Key) -> int:
        index = self._bisect(key)
        assert self._is_at(index, key), f"{key} is not in the line"
        return index

    def _bisect(self, key: Key) -> int:
        """How many have a smaller key."""
        value, seq = key
        index = bisect_left(self._values, value)
        if index < len(self._seqs) and self._seqs[index] < seq and self._values[index] == value:
            index = bisect_left(self._seqs, seq, index, bisect_right(self._values, value, index))
        return index

    def _is_at(self, index: int, key: Key) -> bool:
        return index < len(self._seqs) and self._seqs[index] == key[1] and self._values[index] == key[0]
