"""Exact places in a line of any length, in O(log n), without scanning it."""

from __future__ import annotations


class Line:
    """Members are ordered by a unique number (their `seq`); a place is 1 + the members with a smaller one.

    A Fenwick tree (Fenwick 1994) counts the members that are still there, over their ranks at the last rebuild.
    Appending in order of `seq` is O(log n); a member that comes back to an old place rebuilds the tree, O(n log n),
    and so does running out of ranks, which is O(log n) amortised because the room doubles.
    """

    def __init__(self) -> None:
        self._rank: dict[int, int] = {}
        self._tree: list[int] = [0]
        self._num_ranks = 0
        self._last_seq = -1

    def __len__(self) -> int:
        return len(self._rank)

    def __contains__(self, seq: int) -> bool:
        return seq in self._rank

    def add(self, seq: int) -> None:
        assert seq not in self._rank, f"{seq} is in the line already"
        if seq < self._last_seq or self._num_ranks + 1 >= len(self._tree):
            self._rebuild([*self._rank, seq])
            return
        self._append(seq)

    def remove(self, seq: int) -> None:
        self._count(self._rank.pop(seq), -1)

    def place(self, seq: int) -> int:
        """1 for the first."""
        rank, members = self._rank[seq], 0
        while rank > 0:
            members += self._tree[rank]
            rank -= rank & -rank
        return members

    def _append(self, seq: int) -> None:
        self._num_ranks += 1
        self._rank[seq] = self._num_ranks
        self._last_seq = seq
        self._count(self._num_ranks, 1)

    def _count(self, rank: int, change: int) -> None:
        tree, size = self._tree, len(self._tree)
        while rank < size:
            tree[rank] += change
            rank += rank & -rank

    def _rebuild(self, seqs: list[int]) -> None:
        self._rank.clear()
        self._tree = [0] * (2 * len(seqs) + 64)
        self._num_ranks = 0
        for seq in sorted(seqs):
            self._append(seq)
