"""The memory behind slots: keys or values of one layer, for as many sequences as run.

Nobody's stream may pause because somebody else's text grows. On a CPU under Linux the memory of all slots at full
length is therefore mapped at once, which takes nothing: the kernel gives a page when it is first written to, and
nothing ever moves. Elsewhere memory grows by copying, which a GPU does quickly.
"""

from __future__ import annotations

import mmap
import sys
from typing import Protocol

import torch

CAPACITY_STEP_TOKENS = 256
"""Where memory grows, slots begin this long; a full one doubles."""
KEPT_TOKENS = 2048
"""A mapped slot that held more gives its pages back when it is cleared. Of shorter ones they stay: to get a page again
takes longer than to empty it, so that the next turn of a chat would begin later."""


class SlotMemory(Protocol):
    tensor: torch.Tensor
    """(slots, kv_heads, capacity, head_dim). 0 wherever nothing was written since a slot was cleared."""
    num_moves: int
    """How often it was exchanged for a larger one."""

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """So many slots of so many tokens can be written. Raises what the allocator raises, and is then as before."""

    def clear(self, slot: int, length: int) -> None:
        """Forget the first `length` tokens of a slot, which is all that was written."""


def slot_memory(states: torch.Tensor, max_slots: int | None, max_len: int) -> SlotMemory:
    """Memory of the shape, type and device of `states`, (1, kv_heads, any, head_dim). `max_slots` None: any number."""
    if max_slots is not None and states.device.type == "cpu" and sys.platform == "linux":
        try:
            return MappedMemory(states, max_slots, max_len)
        except OSError:
            pass  # the machine promises no more memory than it has: vm.overcommit_memory=2, ulimit -v
    return GrowingMemory(states, max_len)


class MappedMemory:
    """Everything at once; pages come when they are needed."""

    num_moves = 0

    def __init__(self, states: torch.Tensor, max_slots: int, max_len: int) -> None:
        """Raises `OSError` when so much address space is not to be had."""
        _, num_heads, _, head_dim = states.shape
        head_stride = max_len * head_dim
        itemsize = states.element_size()
        # A slot has pages of its own, so that they can be given back.
        self._slot_bytes = -(-num_heads * head_stride * itemsize // mmap.PAGESIZE) * mmap.PAGESIZE
        self._pages = mmap.mmap(-1, max_slots * self._slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.tensor = torch.frombuffer(self._pages, dtype=states.dtype).as_strided(
            (max_slots, num_heads, max_len, head_dim), (self._slot_bytes // itemsize, head_stride, head_dim, 1)
        )

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        assert num_slots <= self.tensor.shape[0], "it was promised that there are no more"

    def clear(self, slot: int, length: int) -> None:
        if length > KEPT_TOKENS:
            self._pages.madvise(mmap.MADV_DONTNEED, slot * self._slot_bytes, self._slot_bytes)
        else:
            _empty(self.tensor, slot, length)


class GrowingMemory:
    """As many slots as were asked for, all as long as the longest needs."""

    def __init__(self, states: torch.Tensor, max_len: int) -> None:
        self.tensor = states.new_zeros((0, states.shape[1], 0, states.shape[3]))
        self.num_moves = 0
        self._max_len = max_len

    def reserve(self, num_slots: int, num_tokens: int) -> None:
        """Only as many slots as are asked for: every one more is paid for in full, and slots are few.

        One layer at a time grows, so the peak is one layer's copy above the final size.
        """
        has_slots, num_heads, capacity, head_dim = self.tensor.shape
        if num_slots <= has_slots and num_tokens <= capacity:
            return
        wanted = capacity
        if num_tokens > capacity:
            steps = -(-num_tokens // CAPACITY_STEP_TOKENS) * CAPACITY_STEP_TOKENS
            wanted = min(max(2 * capacity, steps), self._max_len)
        larger = self.tensor.new_zeros((max(has_slots, num_slots), num_heads, wanted, head_dim))
        larger[:has_slots, :, :capacity] = self.tensor
        self.tensor = larger
        self.num_moves += 1

    def clear(self, slot: int, length: int) -> None:
        if slot < self.tensor.shape[0]:
            _empty(self.tensor, slot, length)


def _empty(memory: torch.Tensor, slot: int, length: int) -> None:
    """Zeroed, not only forgotten: attention multiplies masked values by 0, and 0 times a NaN that a failed generation
    left behind would poison the next one."""
    memory[slot, :, :length] = 0
