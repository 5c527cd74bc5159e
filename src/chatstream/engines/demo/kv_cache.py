"""The keys and values of all slots, and attention over them.

Memory: two float32 arrays that double with the number of slots and with the longest context, and never shrink. Upper
bound: 2 * layers * kv_heads * head_dim * 4 bytes a token (2 KiB in the demo model), times the context length, times the
largest number of slots ever open at once, each rounded up to a power of two.

Keys are stored as (head_dim, tokens) and values as (tokens, head_dim), so that neither is transposed for a product:
four times as fast at long contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from chatstream.engines.demo.llama import Floats, LlamaShape


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """A copy of one slot. keys: (layers, kv_heads, head_dim, tokens); values: (layers, kv_heads, tokens, head_dim)."""

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
    def _token_capacity(self) -> int:
        return int(self._values.shape[3])

    def open(self, slot: int) -> None:
        """Allocate the slot if it does not exist. It is empty."""
        num_slots = len(self.lengths)
        if slot >= num_slots:
            self._grow(_doubled(num_slots or self.FIRST_SLOTS, slot + 1), self._token_capacity)

    def close(self, slot: int) -> None:
        """Clear the slot. The memory is zeroed, because a step with a longer sequence in another slot multiplies by
        it."""
        length = self.lengths[slot]
        self._keys[:, slot, :, :, :length] = 0.0
        self._values[:, slot, :, :length] = 0.0
        self.lengths[slot] = 0

    def save(self, slot: int) -> SavedSlot:
        """Copy the slot's keys and values."""
        length = self.lengths[slot]
        return SavedSlot(self._keys[:, slot, :, :, :length].copy(), self._values[:, slot, :, :length].copy())

    def load(self, slot: int, saved: SavedSlot, num_tokens: int) -> None:
        """Fill an empty slot with the first `num_tokens` positions of `saved`."""
        self.reserve(num_tokens)
        self._keys[:, slot, :, :, :num_tokens] = saved.keys[..., :num_tokens]
        self._values[:, slot, :, :num_tokens] = saved.values[:, :, :num_tokens]
        self.lengths[slot] = num_tokens

    def reserve(self, num_tokens: int) -> None:
        """Allocate at least `num_tokens` positions in every slot."""
        if num_tokens > self._token_capacity:
            capacity = _doubled(self._token_capacity or self.FIRST_TOKENS, num_tokens)
            self._grow(len(self.lengths), min(capacity, self._shape.context_len))

    def decode(self, slots: Sequence[int]) -> DecodeAttention:
        """Attention for one new position in each of these slots. `slots` must be ascending."""
        return DecodeAttention(self._keys, self._values, slots, self.lengths[list(slots)])

    def prefill(self, slot: int, num_tokens: int) -> PrefillAttention:
        """Attention for `num_tokens` new positions in one slot."""
        return PrefillAttention(self._keys[:, slot], self._values[:, slot], int(self.lengths[slot]), num_tokens)

    def _grow(self, num_slots: int, num_tokens: int) -> None:
        keys, values = self._keys, self._values
        self._keys, self._values = self._zeros(num_slots, num_tokens)
        self._keys[:, : len(self.lengths), :, :, : keys.shape[4]] = keys
        self._values[:, : len(self.lengths), :, : values.shape[3]] = values
        self.lengths = np.concatenate([self.lengths, np.zeros(num_slots - len(self.lengths), dtype=np.intp)])

    def _zeros(self, num_slots: int, num_tokens: int) -> tuple[Floats, Floats]:
        """Shapes: (layers, slots, kv_heads, head_dim, tokens) and (layers, slots, kv_heads, tokens, head_dim)."""
        shape = self._shape
        heads = (shape.num_layers, num_slots, shape.num_kv_heads)
        return (
            np.zeros((*heads, shape.head_dim, num_tokens), np.float32),
            np.zeros((*heads, num_tokens, shape.head_dim), np.float32),
        )


def slots_that_fit(num_bytes: int, shape: LlamaShape) -> int:
    """The number of slots of full context length that fit `num_bytes`, at least one. Slots grow by doubling, and the
    old arrays exist until the new ones are filled."""
    slot_bytes = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim * 4 * shape.context_len
    num_fitting = 2 * num_bytes // (3 * slot_bytes)
    return 1 << max(0, num_fitting.bit_length() - 1)


class DecodeAttention:
    """`Attend` for one decode step of B slots: one query a slot, over that slot's sequence."""

    def __init__(self, keys: Floats, values: Floats, slots: Sequence[int], positions: NDArray[np.intp]) -> None:
        self._keys, self._values = keys, values
        self._slots, self._positions = list(slots), positions
        self._num_seen = int(positions.max()) + 1
        first, last = slots[0], slots[-1]
        # A view if the slots are contiguous, which is usual; otherwise a copy.
        self._rows = slice(first, last + 1) if last - first + 1 == len(slots) else self._slots
        is_padding = np.arange(self._num_seen) > positions[:, None]
        # (B, 1, 1, T): masks the positions behind the end of shorter sequences.
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
    """`Attend` for one chunk of a prompt: N queries of one slot, each over the positions up to its own."""

    def __init__(self, keys: Floats, values: Floats, start: int, num_tokens: int) -> None:
        self._keys, self._values = keys, values  # without the slot dimension
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
    """softmax(scores) @ values. Divides last, on the smaller array. Overwrites `scores`."""
    scores -= scores.max(axis=-1, keepdims=True)
    np.exp(scores, out=scores)
    mixed: Floats = scores @ values
    mixed /= scores.sum(axis=-1, keepdims=True)
    return mixed


def _doubled(size: int, at_least: int) -> int:
    while size < at_least:
        size *= 2
    return size
