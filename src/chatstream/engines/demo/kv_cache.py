"""The keys and values of all slots, and attention over them. Knows neither weights nor sampling.

Memory: two float32 arrays that double with the number of slots and with the longest context, as they are needed, and
stay: at most 2 * layers * kv_heads * head_dim * 4 bytes a token (2 KiB in the demo model), times the context length,
times the most slots ever open at once, each rounded up to a power of two.

Keys lie as (head_dim, tokens) and values as (tokens, head_dim), so that neither has to be transposed to be multiplied:
at long contexts that is four times as fast.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatstream.engines.demo.llama import Floats, LlamaShape


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """keys: (layers, kv_heads, head_dim, tokens); values: (layers, kv_heads, tokens, head_dim)"""

    keys: Floats
    values: Floats

    @property
    def nbytes(self) -> int:
        return self.keys.nbytes + self.values.nbytes


class KVCache:
    """Slot s holds the first `lengths[s]` positions of one sequence."""

    FIRST_SLOTS = 4
    FIRST_TOKENS = 256

    def __init__(self, shape: LlamaShape) -> None:
        self._shape = shape
        self._keys, self._values = self._zeros(0, 0)
        self.lengths: NDArray[np.intp] = np.zeros(0, dtype=np.intp)  # (slots,)

    @property
    def num_bytes(self) -> int:
        return self._keys.nbytes + self._values.nbytes

    @property
    def _room(self) -> int:
        return int(self._values.shape[3])

    def open(self, slot: int) -> None:
        """Make sure that the slot exists. It is empty."""
        num_slots = len(self.lengths)
        if slot >= num_slots:
            self._grow(_doubled(num_slots or self.FIRST_SLOTS, slot + 1), self._room)

    def close(self, slot: int) -> None:
        """Forget the sequence. Zeros, because a longer neighbour's step multiplies by what lies here."""
        length = self.lengths[slot]
        self._keys[:, slot, :, :, :length] = 0.0
        self._values[:, slot, :, :length] = 0.0
        self.lengths[slot] = 0

    def save(self, slot: int) -> SavedSlot:
        """A copy of what the slot holds."""
        length = self.lengths[slot]
        return SavedSlot(self._keys[:, slot, :, :, :length].copy(), self._values[:, slot, :, :length].copy())

    def load(self, slot: int, saved: SavedSlot, num_tokens: int) -> None:
        """The empty slot holds the first `num_tokens` positions of what was saved."""
        self.reserve(num_tokens)
        self._keys[:, slot, :, :, :num_tokens] = saved.keys[..., :num_tokens]
        self._values[:, slot, :, :num_tokens] = saved.values[:, :, :num_tokens]
        self.lengths[slot] = num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Make room for that many positions in every slot."""
        if num_tokens > self._room:
            room = _doubled(self._room or self.FIRST_TOKENS, num_tokens)
            self._grow(len(self.lengths), min(room, self._shape.context_len))

    def decode(self, slots: Sequence[int]) -> DecodeAttention:
        """One new position for each of these slots, in ascending order."""
        return DecodeAttention(self._keys, self._values, slots, self.lengths[list(slots)])

    def prefill(self, slot: int, num_tokens: int) -> PrefillAttention:
        """`num_tokens` new positions for one slot."""
        return PrefillAttention(self._keys[:, slot], self._values[:, slot], int(self.lengths[slot]), num_tokens)

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        keys, values = self._keys, self._values
        self._keys, self._values = self._zeros(num_slots, num_tokens)
        self._keys[:, : len(self.lengths), :, :, : keys.shape[4]] = keys
        self._values[:, : len(self.lengths), :, : values.shape[3]] = values
        self.lengths = np.concatenate([self.lengths, np.zeros(num_slots - len(self.lengths), dtype=np.intp)])

    def _zeros(self, num_slots: int, num_tokens: int) -> tuple[Floats, Floats]:
        """(layers, slots, kv_heads, head_dim, tokens) and (layers, slots, kv_heads, tokens, head_dim)"""
        shape = self._shape
        heads = (shape.num_layers, num_slots, shape.num_kv_heads)
        return (
            np.zeros((*heads, shape.head_dim, num_tokens), np.float32),
            np.zeros((*heads, num_tokens, shape.head_dim), np.float32),
        )


def slots_that_fit(num_bytes: int, shape: LlamaShape) -> int:
    """Of full length, and reached by doubling, while which the old ones are there too; at least one."""
    slot_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4 * shape.context_len
    num_fitting = 2 * num_bytes // (3 * slot_bytes)
    return 1 << max(0, num_fitting.bit_length() - 1)


class DecodeAttention:
    """One query a slot, each over its own sequence: an `Attend` for one step of B slots."""

    def __init__(self, keys: Floats, values: Floats, slots: Sequence[int], positions: NDArray[np.intp]) -> None:
        self._keys, self._values = keys, values
        self._slots, self._positions = list(slots), positions
        self._num_seen = int(positions.max()) + 1
        first, last = slots[0], slots[-1]
        # A view where the slots are neighbours, which is the rule; a copy where there are gaps.
        self._rows = slice(first, last + 1) if last - first + 1 == len(slots) else self._slots
        is_padding = np.arange(self._num_seen) > positions[:, None]
        # (B, 1, 1, T): shorter sequences do not see what lies behind them.
        self._mask = _minus_infinity(is_padding)[:, None, None] if is_padding.any() else None

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        all_keys, all_values = self._keys[layer], self._values[layer]
        all_keys[self._slots, :, :, self._positions] = keys
        all_values[self._slots, :, self._positions] = values
        seen_keys = all_keys[self._rows, :, :, : self._num_seen]  # (B, kv_heads, head_dim, T)
        seen_values = all_values[self._rows, :, : self._num_seen]  # (B, kv_heads, T, head_dim)
        num_rows, num_kv_heads, head_dim = keys.shape
        scores = queries.reshape(num_rows, num_kv_heads, -1, head_dim) @ seen_keys  # (B, kv_heads, group, T)
        if self._mask is not None:
            scores += self._mask
        return _weighted(scores, seen_values).reshape(num_rows, -1)


class PrefillAttention:
    """N queries of one slot, each over the positions up to its own: an `Attend` for one chunk of a prompt."""

    def __init__(self, keys: Floats, values: Floats, start: int, num_tokens: int) -> None:
        self._keys, self._values = keys, values  # without the dimension of the slots
        self._start, self._end = start, start + num_tokens
        is_later = np.arange(self._end) > np.arange(start, self._end)[:, None]
        self._mask = _minus_infinity(is_later)  # (N, T)

    def __call__(self, layer: int, queries: Floats, keys: Floats, values: Floats) -> Floats:
        all_keys, all_values = self._keys[layer], self._values[layer]
        all_keys[:, :, self._start : self._end] = keys.transpose(1, 2, 0)
        all_values[:, self._start : self._end] = values.swapaxes(0, 1)
        num_rows, num_kv_heads, head_dim = keys.shape
        grouped = queries.reshape(num_rows, num_kv_heads, -1, head_dim).transpose(1, 2, 0, 3)
        scores = grouped @ all_keys[:, None, :, : self._end]  # (kv_heads, group, N, T)
        scores += self._mask
        mixed = _weighted(scores, all_values[:, None, : self._end])  # (kv_heads, group, N, head_dim)
        return mixed.transpose(2, 0, 1, 3).reshape(num_rows, -1)


def _minus_infinity(where: NDArray[np.bool_]) -> Floats:
    return np.where(where, np.float32(-np.inf), np.float32(0.0))


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
