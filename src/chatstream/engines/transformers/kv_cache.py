"""Keys and values of all running generations: two tensors a layer, with one row a slot.

A `transformers` cache (`past_key_values`) for passes over one row of tokens of any number of sequences. Each
slot has its own length; a sequence that starts or ends moves no other slot's memory. `place` sets where the next pass
writes, and attention (attention.py) reads from there. Requests and sampling are unknown here.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.transformers.slot_memory import SlotMemory, slot_memory
from chatstream.engines.transformers.transfer import on_device

MAX_PADDING_TOKENS = 512
"""Neighbouring slots attend in one call while that reads at most this many padding tokens in all, which costs less than
another call."""


@dataclass(slots=True)
class Run:
    """Neighbouring slots with the same number of tokens in a pass, which attend in one call."""

    first_slot: int
    first_token: int
    """Index of the run's first token in the row."""
    num_tokens: int
    """Tokens of each slot."""
    starts: list[int]
    """Position of each slot's first token."""
    masks: dict[tuple[int | None, int], torch.Tensor | None] = field(default_factory=dict)
    """Masks of this pass, by sliding window and size of head group; layers of one kind share a mask."""

    @property
    def num_slots(self) -> int:
        return len(self.starts)

    @property
    def kv_len(self) -> int:
        """Length of the longest slot, with the tokens of this pass."""
        return max(self.starts) + self.num_tokens

    def first_key(self, window: int | None) -> int:
        """Position of the earliest key that any token of the run attends to."""
        return 0 if window is None else max(0, min(self.starts) - window + 1)

    def mask(self, window: int | None, group: int, like: torch.Tensor) -> torch.Tensor | None:
        """The mask to add to the scores: (num_slots, 1, group * num_tokens, kv_len - first_key), as `like` in dtype
        and device.

        None: every token attends to all keys.
        """
        key = (window, group)
        if key not in self.masks:
            self.masks[key] = self._mask(window, group, like)
        return self.masks[key]

    def _mask(self, window: int | None, group: int, like: torch.Tensor) -> torch.Tensor | None:
        if self.num_tokens == 1 and len(set(self.starts)) == 1:
            return None  # decided on the host: no mask, no transfer
        starts = on_device(self.starts, like.device)[:, None]
        positions = starts + torch.arange(self.num_tokens, device=like.device)
        return _mask(positions, self.first_key(window), self.kv_len, window, group, like)


class StaticRun(Run):
    """One token in each of the first slots, in use or not. Its shapes do not depend on the lengths of the texts."""

    def __init__(self, positions: torch.Tensor, kv_len: int) -> None:
        """`positions`: (num_slots,), int64, on the device, all below `kv_len`."""
        super().__init__(first_slot=0, first_token=0, num_tokens=1, starts=[])
        self._positions = positions
        self._kv_len = kv_len

    @property
    def num_slots(self) -> int:
        return len(self._positions)

    @property
    def kv_len(self) -> int:
        return self._kv_len

    def first_key(self, window: int | None) -> int:
        return 0

    def _mask(self, window: int | None, group: int, like: torch.Tensor) -> torch.Tensor:
        return _mask(self._positions[:, None], 0, self._kv_len, window, group, like)


def _mask(
    positions: torch.Tensor, first_key: int, kv_len: int, window: int | None, group: int, like: torch.Tensor
) -> torch.Tensor:
    """`positions`: (num_slots, num_tokens). Returns (num_slots, 1, group * num_tokens, kv_len - first_key)."""
    query = positions[:, :, None]
    key = torch.arange(first_key, kv_len, device=like.device)  # (keys,)
    is_hidden = key > query
    if window is not None:
        is_hidden |= key <= query - window
    mask = torch.zeros(is_hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(is_hidden, -torch.inf)
    return mask.repeat(1, group, 1)[:, None]


@dataclass(slots=True)
class Placement:
    """Where the tokens of one pass are written. Shared by all layers."""

    slots: torch.Tensor  # (T,), int64
    positions: torch.Tensor  # (T,), int64
    num_slots: int
    """Slots that must be allocated: the largest index plus one."""
    kv_len: int
    """Positions that must be allocated."""
    runs: list[Run]
    rows: torch.Tensor | None = None  # (T,), int64
    """Indices of the tokens in the row; None: all, in order."""


class SlotLayer(CacheLayerMixin):
    """One attention layer's keys and values: each (slots, kv_heads, capacity, head_dim), in the model's dtype."""

    memories: tuple[SlotMemory, SlotMemory]

    # `CacheLayerMixin` registers subclasses by this name; this one is never looked up.
    _layer_type = None

    def __init__(self, cache: SlotCache) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cache = cache

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        cache = self._cache
        keys, values = (slot_memory(states, cache.max_slots, cache.max_len) for states in (key_states, value_states))
        self.memories = keys, values
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store the states of this pass, (1, kv_heads, T, head_dim).

        Returns keys and values of the slots up to the last one of this pass, up to the length of the longest text:
        (slots, kv_heads, kv_len, head_dim). No more, because some models (DeepSeek) compute with all of it. Raises
        the allocator's error when the memory cannot grow; the layer is then unchanged.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        to = self._cache.placement
        for memory, states in zip(self.memories, (key_states, value_states), strict=True):
            memory.reserve(to.num_slots, to.kv_len)
            written = states[0].transpose(0, 1)  # (T, kv_heads, head_dim)
            memory.tensor[to.slots, :, to.positions] = written if to.rows is None else written[to.rows]
        keys, values = (memory.tensor[: to.num_slots, :, : to.kv_len] for memory in self.memories)
        return keys, values

    def get_seq_length(self) -> int:
        # Each slot has its own length. The model gets positions as an argument, so it does not use this.
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self._cache.max_len

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()  # its name in earlier releases of transformers 5


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """A copy of a slot, in host memory: keys and values of each layer, (kv_heads, num_tokens, head_dim)."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


class SlotCache(Cache):
    """The `past_key_values` of a model with keys and values in all layers."""

    def __init__(self, windows: Sequence[int | None], max_len: int, device: torch.device) -> None:
        """`windows`: sliding window of each layer, in tokens; None: the layer attends to all tokens.

        Memory is allocated with use, up to `max_len` tokens a slot.
        """
        self.max_len = max_len
        self.max_slots: int | None = None
        """Maximum number of slots; None: no limit. Set it before the first pass."""
        self.device = device
        self.placement = Placement(torch.empty(0), torch.empty(0), 0, 0, [])
        self._slot_layers = [SlotLayer(self) for _ in windows]
        self.windows = frozenset(windows)
        super().__init__(layers=list(self._slot_layers))

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in all layers. Available after the first pass."""
        return sum(
            memory.tensor.shape[1] * memory.tensor.shape[3] * memory.tensor.element_size()
            for layer in self._slot_layers
            for memory in layer.memories
        )

    @property
    def is_complete(self) -> bool:
        """Every layer has stored keys and values."""
        return all(layer.is_initialized for layer in self._slot_layers)

    def place(self, inputs: Sequence[SlotInput]) -> Placement:
        """Set where the next forward pass writes: the tokens of `inputs`, in order, in one row."""
        slots = [item.slot for item in inputs for _ in item.token_ids]
        positions = [item.start + n for item in inputs for n in range(len(item.token_ids))]
        self.placement = Placement(
            slots=on_device(slots, self.device),
            positions=on_device(positions, self.device),
            num_slots=max(slots) + 1,
            kv_len=max(positions) + 1,
            runs=_runs(inputs),
        )
        return self.placement

    def place_static(self, slots: torch.Tensor, positions: torch.Tensor, kv_len: int) -> None:
        """Set the next forward pass to one token in each of the first `len(positions)` slots, in order.

        `positions`: (num_slots,), int64, on the device: the position of each token, below `kv_len`. `slots`:
        (num_slots,), int64, on the device: the slots to write, with repetitions; other slots are unchanged. The memory
        must be allocated (`reserve`).
        """
        run: Run = StaticRun(positions, kv_len)
        self.placement = Placement(slots, positions[slots], len(positions), kv_len, [run], rows=slots)

    def reserve(self, num_slots: int, num_tokens: int) -> tuple[int, int, int]:
        """Allocate `num_slots` slots of `num_tokens` tokens in every layer. The cache must be complete.

        Returns the allocated slots, the allocated tokens of each, and a number that changes when memory moves. Raises
        the allocator's error; some layers may then have grown.
        """
        memories = [memory for layer in self._slot_layers for memory in layer.memories]
        for memory in memories:
            memory.reserve(num_slots, num_tokens)
        allocated_slots = min(memory.tensor.shape[0] for memory in memories)
        capacity = min(memory.tensor.shape[2] for memory in memories)
        return allocated_slots, capacity, sum(memory.num_moves for memory in memories)

    def clear(self, slot: int, length: int) -> None:
        """Empty a slot, of which the first `length` tokens were written."""
        for layer in self._slot_layers:
            if layer.is_initialized:
                for memory in layer.memories:
                    memory.clear(slot, length)

    def save(self, slot: int, length: int) -> SavedSlot:
        copies = [[_to_host(m.tensor[slot, :, :length]) for m in layer.memories] for layer in self._slot_layers]
        return SavedSlot(tuple((keys, values) for keys, values in copies))

    def load(self, slot: int, saved: SavedSlot, length: int) -> None:
        """Write the first `length` tokens of `saved` to the slot."""
        for layer, keys_and_values in zip(self._slot_layers, saved.layers, strict=True):
            for memory, states in zip(layer.memories, keys_and_values, strict=True):
                memory.reserve(slot + 1, length)
                memory.tensor[slot, :, :length].copy_(states[:, :length], non_blocking=True)

    def copy(self, source: int, slot: int, length: int) -> None:
        for layer in self._slot_layers:
            for memory in layer.memories:
                memory.reserve(slot + 1, length)
                memory.tensor[slot, :, :length] = memory.tensor[source, :, :length]


def _runs(inputs: Sequence[SlotInput]) -> list[Run]:
    """Group inputs of one token in neighbouring slots of similar length; each longer input is a run of its own."""
    runs: list[Run] = []
    num_tokens = 0
    for item in inputs:
        last = runs[-1] if runs else None
        if last is not None and _can_join(item, last):
            last.starts.append(item.start)
        else:
            runs.append(Run(item.slot, num_tokens, len(item.token_ids), [item.start]))
        num_tokens += len(item.token_ids)
    return runs


def _can_join(item: SlotInput, run: Run) -> bool:
    if not len(item.token_ids) == run.num_tokens == 1 or item.slot != run.first_slot + len(run.starts):
        return False
    starts = [*run.starts, item.start]
    return len(starts) * max(starts) - sum(starts) <= MAX_PADDING_TOKENS


def _to_host(memory: torch.Tensor) -> torch.Tensor:
    """Copy to the host. From a GPU to pinned memory, so that the copy back does not block."""
    copy = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=memory.is_cuda)
    copy.copy_(memory)
    return copy
