"""Keys and values of all running generations: one tensor a layer, one row of it a slot.

A `transformers` cache (`past_key_values`) in which every slot has its own length, so that one forward pass serves
generations of different ages and somebody joining or leaving moves nobody else's memory. It knows nothing of
requests and of sampling; it writes where `place` said and hands the attention what lies in the same slots.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

CAPACITY_STEP_TOKENS = 256
"""Slots begin this long; a full one doubles. Copying 256 tokens costs less than a single forward pass."""


@dataclass(slots=True)
class Placement:
    """Which slots a forward pass is for, and where in them its tokens go. Shared by all layers."""

    slots: torch.Tensor  # (B,), int64
    positions: torch.Tensor  # (B, Q), int64
    num_slots: int
    """Slots that must exist: the largest index plus one."""
    kv_len: int
    """The longest row with this pass's tokens in it; shorter rows are masked beyond their own length."""
    run: slice | None
    """The slots as a slice, when they are neighbours in ascending order: then reading them copies nothing."""


class SlotLayer(CacheLayerMixin):
    """One attention layer's keys and values: (num_slots, kv_heads, capacity, head_dim), in the model's dtype."""

    keys: torch.Tensor
    values: torch.Tensor

    # `CacheLayerMixin` registers subclasses by this name; ours is never looked up.
    _layer_type = None

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.keys = key_states.new_zeros((0, key_states.shape[1], 0, key_states.shape[3]))
        self.values = value_states.new_zeros((0, value_states.shape[1], 0, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this pass's states, (B, kv_heads, Q, head_dim); return all of the same rows, (B, kv_heads, kv_len, …).

        Raises what the allocator raises when the memory cannot grow; the layer is then as it was.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        to = self._cache.placement
        self.keys = _grown(self.keys, to, self._cache.max_len)
        self.values = _grown(self.values, to, self._cache.max_len)
        rows = to.slots[:, None]
        self.keys[rows, :, to.positions] = key_states.transpose(1, 2)
        self.values[rows, :, to.positions] = value_states.transpose(1, 2)
        return _rows(self.keys, to), _rows(self.values, to)

    def clear(self, slot: int, length: int) -> None:
        if self.is_initialized and slot < self.keys.shape[0]:
            self.keys[slot, :, :length] = 0
            self.values[slot, :, :length] = 0

    def get_seq_length(self) -> int:
        # Every row has its own; whoever asks for one number means "how long is what attention sees before this pass".
        return self._cache.placement.kv_len - self._cache.placement.positions.shape[1]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self._cache.placement.kv_len, 0

    def get_max_length(self) -> int:
        return self._cache.max_len

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()  # its name in earlier releases of transformers 5


class SlotCache(Cache):
    """The `past_key_values` of a model whose `num_layers` layers all attend to keys and values."""

    def __init__(self, num_layers: int, max_len: int, device: torch.device) -> None:
        """Allocates nothing yet: slots and their length grow with use, up to `max_len` tokens a slot."""
        self.max_len = max_len
        self._device = device
        self.placement = Placement(torch.empty(0), torch.empty(0, 0), 0, 0, None)
        self._slot_layers = [SlotLayer(self) for _ in range(num_layers)]
        super().__init__(layers=list(self._slot_layers))

    def place(self, slots: Sequence[int], starts: Sequence[int], num_tokens: int) -> Placement:
        """The next forward pass brings `num_tokens` tokens for each of `slots`, the first of them at `starts`."""
        first = torch.tensor(starts, device=self._device)
        run = slice(slots[0], slots[0] + len(slots))
        self.placement = Placement(
            slots=torch.tensor(slots, device=self._device),
            positions=first[:, None] + torch.arange(num_tokens, device=self._device),
            num_slots=max(slots) + 1,
            kv_len=max(starts) + num_tokens,
            run=run if list(slots) == list(range(run.start, run.stop)) else None,
        )
        return self.placement

    def clear(self, slot: int, length: int) -> None:
        """Forget a slot's first `length` tokens.

        Zeroed, not only forgotten: attention multiplies masked values by 0, and 0 times a NaN that a failed
        generation left behind would poison the next one.
        """
        for layer in self._slot_layers:
            layer.clear(slot, length)


def _grown(memory: torch.Tensor, to: Placement, max_len: int) -> torch.Tensor:
    """The same (num_slots, kv_heads, capacity, head_dim) tensor, or a larger copy when the placement needs one.

    Only as many slots as are asked for: every one more is paid for in full, and slots are few. One layer at a time
    grows, so the peak is one layer's copy above the final size.
    """
    num_slots, num_heads, capacity, head_dim = memory.shape
    if to.num_slots <= num_slots and to.kv_len <= capacity:
        return memory
    wanted = capacity
    if to.kv_len > capacity:
        steps = -(-to.kv_len // CAPACITY_STEP_TOKENS) * CAPACITY_STEP_TOKENS
        wanted = min(max(2 * capacity, steps), max_len)
    larger = memory.new_zeros((max(num_slots, to.num_slots), num_heads, wanted, head_dim))
    larger[:num_slots, :, :capacity] = memory
    return larger


def _rows(memory: torch.Tensor, to: Placement) -> torch.Tensor:
    """(B, kv_heads, kv_len, head_dim): a view where the slots are neighbours, a copy where there are gaps."""
    if to.run is not None:
        return memory[to.run, :, : to.kv_len]
    return memory[:, :, : to.kv_len].index_select(0, to.slots)
