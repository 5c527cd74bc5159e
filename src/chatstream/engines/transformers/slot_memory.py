"""The memory of slots: keys or values of one layer, for all running sequences.

A stream must not pause because the text of another one grows. So on a CPU under Linux all slots are mapped at full
length at once. That uses no memory: the kernel allocates a page at its first write, and nothing ever moves. Elsewhere
memory grows by copying, which is fast on a GPU.
"""

from __future__ import annotations

import mmap
import sys
from typing import Protocol

import torch

CAPACITY_STEP_TOKENS = 256
"""Initial length of slots in growing memory, in tokens. A full slot doubles."""
KEPT_TOKENS = 2048
"""A mapped slot that held more tokens releases its pages when it is cleared. A shorter one keeps them, because to
allocate a page again takes longer than to zero it and would delay the next turn of a conversation."""


class SlotMemory(Protocol):
    tensor: torch.Tensor
    """(slots, kv_heads, capacity, head_dim). 0 where nothing was written since the slot was cleared."""
    num_moves: int
    """How often `tensor` was replaced by a larger one."""

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Allocate `num_slots` slots of `num_tokens` tokens. Raises the allocator's error, and is then unchanged."""

    def clear(self, slot: int, length: int) -> None:
        """Zero the first `length` tokens of a slot, which are all that was written."""


def slot_memory(states: torch.Tensor, max_slots: int | None, max_len: int) -> SlotMemory:
    """Create memory with the shape, dtype and device of `states`, (1, kv_heads, any, head_dim).

    `max_slots`: the maximum number of slots; None: no limit.
    """
    if max_slots is not None and states.device.type == "cpu" and sys.platform == "linux":
        try:
            return MappedMemory(states, max_slots, max_len)
        except OSError:
            pass  # the system does not overcommit memory: vm.overcommit_memory=2, ulimit -v
    return GrowingMemory(states, max_len)


class MappedMemory:
    """All slots mapped at full length; the kernel allocates pages at their first write."""

    num_moves = 0

    def __init__(self, states: torch.Tensor, max_slots: int, max_len: int) -> None:
        """Raises `OSError` when the address space cannot be mapped."""
        _, num_heads, _, head_dim = states.shape
        head_stride = max_len * head_dim
        itemsize = states.element_size()
        # A slot starts on a page of its own, so that its pages can be released.
        self._slot_bytes = -(-num_heads * head_stride * itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, max_slots * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._pages, dtype=states.dtype).as_strided(
            (max_slots, num_heads, max_len, head_dim), (self._slot_bytes // itemsize, head_stride, head_dim, 1)
        )

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        assert num_slots <= self.tensor.shape[0], "more slots than max_slots"

    def clear(self, slot: int, length: int) -> None:
        if length > KEPT_TOKENS:
            self._pages.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)
        else:
            _zero(self.tensor, slot, length)


class GrowingMemory:
    """The slots reserved so far, all as long as the longest one needs."""

    def __init__(self, states: torch.Tensor, max_len: int) -> None:
        self.tensor = states.new_zeros((0, states.shape[1], 0, states.shape[3]))
        self.num_moves = 0
        self._max_len = max_len

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Allocate exactly `num_slots` slots: each further one takes its full length of memory, and slots are few.

        One layer grows at a time, so the peak is the final size and a copy of one layer.
        """
        allocated_slots, num_heads, capacity, head_dim = self.tensor.shape
        if num_slots <= allocated_slots and num_tokens <= capacity:
            return
        new_capacity = capacity
        if num_tokens > capacity:
            steps = -(-num_tokens // CAPACITY_STEP_TOKENS) * CAPACITY_STEP_TOKENS
            new_capacity = min(max(2 * capacity, steps), self._max_len)
        larger = self.tensor.new_zeros((max(allocated_slots, num_slots), num_heads, new_capacity, head_dim))
        larger[:allocated_slots, :, :capacity] = self.tensor
        self.tensor = larger
        self.num_moves += 1

    def clear(self, slot: int, length: int) -> None:
        if slot < self.tensor.shape[0]:
            _zero(self.tensor, slot, length)


def _zero(memory: torch.Tensor, slot: int, length: int) -> None:
    """Zero a cleared slot. Attention multiplies masked values by 0, and 0 times a NaN of a failed generation is NaN."""
    memory[slot, :, :length] = 0
