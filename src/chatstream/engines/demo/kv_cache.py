"""The keys and values of all slots, and attention over them. Knows neither weights nor sampling.

Memory: one float32 array that doubles with the number of slots and with the longest context, as they are needed,
and stays: at most 2 * layers * kv_heads * head_dim * 4 bytes a token (2 KiB in the demo model), times the context
length, times the most slots ever open at once, each rounded up to a power of two.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chatstream.engines.demo.llama import Floats, LlamaShape


class KVCache:
    """Slot s holds the first `lengths[s]` positions of one sequence."""

    FIRST_SLOTS = 4
    FIRST_TOKENS = 256

    def __init__(self, shape: LlamaShape) -> None:
        self._shape = shape
        self._keys_values = self._zeros(0, 0)
        self.lengths: NDArray[np.intp] = np.zeros(0, dtype=np.intp)  # (slots,)

    @property
    def num_bytes(self) -> int:
        return self._keys_values.nbytes

    def open(self, slot: int) -> None:
        """Make sure that the slot exists. It is empty."""
        num_slots = len(self.lengths)
        if slot >= num_slots:
            self._grow(_doubled(num_slots or self.FIRST_SLOTS, slot + 1), self._keys_values.shape[4])

    def close(self, slot: int) -> None:
        """Forget the sequence. Zeros, because a longer neighbour's step multiplies by what lies here."""
        self._keys_values[:, :, slot, :, : self.lengths[slot]] = 0.0
        self.lengths[slot] = 0

    def reserve(self, num_tokens: int) -> None:
        """Make room for that many positions in every slot."""
        room = self._keys_values.shape[4]
        if num_tokens > room:
            room = min(_doubled(room or self.FIRST_TOKENS, num_tokens), self._shape.context_len)
            self._grow(len(self.lengths), room)

    def decode(self, slots: Sequence[int]) -> DecodeAttention:
        """One new position for each of these slots, in ascending order."""
        return DecodeAttention(self._keys_values, self._shape, slots, self.lengths[list(slots)])

    def prefill(self, slot: int, num_tokens: int) -> PrefillAttention:
        """`num_tokens` new positions for one slot."""
        return PrefillAttention(self._keys_values[:, :, slot], self._shape, int(self.lengths[slot]), num_tokens)

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        old = self._keys_values
        self._keys_values = self._zeros(num_slots, num_tokens)
        self._keys_values[:, :, : old.shape[2], :, : old.shape[4]] = old
        self.lengths = np.concatenate([self.lengths, np.zeros(num_slots - len(self.lengths), dtype=np.intp)])

    def _zeros(self, num_slots: int, num_tokens: int) -> Floats:
        """(layers, keys and values, slots, kv_heads, tokens, head_dim)"""
        shape = self._shape
        return np.zeros((shape.num_layers, 2, num_slots, shape.num_kv_heads, num_tokens, shape.head_dim), np.float32)


class DecodeAttention:
    """One query a slot, each over its own sequence: an `Attend` for one step of B slots."""

    def __init__(
        self, keys_values: Floats, shape: LlamaShape, slots: Sequence[int], positions: NDArray[np.intp]
    ) -> None:
        self._shape = shape
        self._new = (list(slots), slice(None), positions)
        num_seen = int(positions.max()) + 1
        first, last = slots[0], slots[-1]
        # A view where the slots are neighbours, which is the rule; a copy where there are gaps.
        rows = slice(first, last + 1) if last - first + 1 == len(slots) else list(slots)
        self._keys_values = keys_values
        self._seen = (rows, slice(None), slice(num_seen))
        hidden = np.arange(num_seen) > positions[:, None]
        # (B, 1, 1, T): shorter sequences do not see the padding behind them.
        self._mask = np.where(hidden, np.float32(-np.inf), np.float32(0.0))[:, None, None] if hidden.any() else None

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        all_keys, all_values = self._keys_values[layer]
        all_keys[self._new] = keys
        all_values[self._new] = values
        shape = self._shape
        grouped = queries.reshape(len(queries), shape.num_kv_heads, -1, shape.head_dim)
        seen_keys, seen_values = all_keys[self._seen], all_values[self._seen]  # (B, kv_heads, T, head_dim)
        scores = grouped @ seen_keys.swapaxes(-1, -2)  # (B, kv_heads, group, T)
        if self._mask is not None:
            scores += self._mask
        return _weighted(scores, seen_values).reshape(len(queries), -1)


class PrefillAttention:
    """N queries of one slot, each over the positions up to its own: an `Attend` for one chunk of a prompt."""

    def __init__(self, keys_values: Floats, shape: LlamaShape, start: int, num_tokens: int) -> None:
        self._shape = shape
        self._keys_values = keys_values  # (layers, 2, kv_heads, tokens, head_dim)
        self._start, self._end = start, start + num_tokens
        later = np.arange(self._end) > np.arange(start, self._end)[:, None]
        self._mask = np.where(later, np.float32(-np.inf), np.float32(0.0))  # (N, T)

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        all_keys, all_values = self._keys_values[layer]
        all_keys[:, self._start : self._end] = keys.swapaxes(0, 1)
        all_values[:, self._start : self._end] = values.swapaxes(0, 1)
        num_tokens, shape = len(queries), self._shape
        grouped = queries.reshape(num_tokens, shape.num_kv_heads, -1, shape.head_dim).transpose(1, 2, 0, 3)
        scores = grouped @ all_keys[:, None, : self._end].swapaxes(-1, -2)  # (kv_heads, group, N, T)
        scores += self._mask
        mixed = _weighted(scores, all_values[:, None, : self._end])  # (kv_heads, group, N, head_dim)
        return mixed.transpose(2, 0, 1, 3).reshape(num_tokens, -1)


def _weighted(scores: Floats, values: Floats) -> Floats:
    """softmax(scores) @ values; the division comes last, on the smaller array. `scores` is overwritten."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed: Floats = scores @ values
    mixed /= scores.sum(axis=-1, keepdims=True)
    return mixed


def _doubled(size: int, at_least: int) -> int:
    while size < at_least:
        size *= 2
    return size
