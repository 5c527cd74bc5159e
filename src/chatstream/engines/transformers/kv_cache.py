"""Keys and values of all running generations: one tensor a layer, one row of it a slot.

A `transformers` cache (`past_key_values`) for passes whose tokens lie in one row, whoever they belong to: each slot has
its own length, and somebody joining or leaving moves nobody else's memory. It knows nothing of requests and of
sampling; it writes where `place` said, and attention (attention.py) reads from there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

from chatstream.engines.model import Feed
from chatstream.engines.transformers.slot_memory import SlotMemory, slot_memory
from chatstream.engines.transformers.transfer import on_device

MAX_PADDING_TOKENS = 512
"""Neighbours attend together while their lengths differ by no more than this in all: reading so many tokens for nothing
costs less than another call."""


@dataclass(slots=True)
class Run:
    """Neighbouring slots that bring the same number of tokens in one pass and attend in one call."""

    first_slot: int
    first_token: int
    """Where their tokens begin in the row."""
    num_tokens: int
    """Of each slot."""
    starts: list[int]
    """Position of the first token, by slot."""
    masks: dict[tuple[int | None, int], torch.Tensor | None] = field(default_factory=dict)
    """Made once a pass, by sliding window and size of head group; all layers of a kind share one."""

    @property
    def kv_len(self) -> int:
        """The longest of them with this pass's tokens."""
        return max(self.starts) + self.num_tokens

    def first_key(self, window: int | None) -> int:
        """No token sees an earlier one."""
        return 0 if window is None else max(0, min(self.starts) - window + 1)

    def mask(self, window: int | None, group: int, like: torch.Tensor) -> torch.Tensor | None:
        """What is added to the scores: (num_slots, 1, group * num_tokens, keys from `first_key` on), type of `like`.

        None: everybody sees everything.
        """
        key = (window, group)
        if key not in self.masks:
            self.masks[key] = self._mask(window, group, like)
        return self.masks[key]

    def _mask(self, window: int | None, group: int, like: torch.Tensor) -> torch.Tensor | None:
        if self.num_tokens == 1 and len(set(self.starts)) == 1:
            return None  # known here, without asking the device
        device = like.device
        starts = on_device(self.starts, device)[:, None, None]
        query = starts + torch.arange(self.num_tokens, device=device)[:, None]  # (num_slots, num_tokens, 1)
        key = torch.arange(self.first_key(window), self.kv_len, device=device)  # (keys,)
        is_hidden = key > query
        if window is not None:
            is_hidden |= key <= query - window
        mask = torch.zeros(is_hidden.shape, dtype=like.dtype, device=device).masked_fill_(is_hidden, -torch.inf)
        return mask.repeat(1, group, 1)[:, None]


@dataclass(slots=True)
class Placement:
    """Where the tokens of one pass go, in the order of the row. Shared by all layers."""

    slots: torch.Tensor  # (T,), int64
    positions: torch.Tensor  # (T,), int64
    num_slots: int
    """Slots that must exist: the largest index plus one."""
    kv_len: int
    """Positions that must exist."""
    runs: list[Run]


class SlotLayer(CacheLayerMixin):
    """One attention layer's keys and values: each (slots, kv_heads, capacity, head_dim), in the model's dtype."""

    memories: tuple[SlotMemory, SlotMemory]

    # `CacheLayerMixin` registers subclasses by this name; ours is never looked up.
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
        """Store this pass's states, (1, kv_heads, T, head_dim); return the memory of the slots up to the last of this
        pass, as far as the longest text goes: (slots, kv_heads, kv_len, head_dim). Some models (DeepSeek) compute with
        all of what they get.

        Raises what the allocator raises when the memory cannot grow; the layer is then as it was.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        to = self._cache.placement
        for memory, states in zip(self.memories, (key_states, value_states), strict=True):
            memory.reserve(to.num_slots, to.kv_len)
            memory.tensor[to.slots, :, to.positions] = states[0].transpose(0, 1)
        keys, values = (memory.tensor[: to.num_slots, :, : to.kv_len] for memory in self.memories)
        return keys, values

    def get_seq_length(self) -> int:
        # Every slot has its own; positions are given to the model, so nobody needs to ask.
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0

    def get_max_length(self) -> int:
        return self._cache.max_len

    def get_max_cache_shape(self) -> int:
        return self.get_max_length()  # its name in earlier releases of transformers 5


@dataclass(frozen=True, slots=True)
class SavedSlot:
    """A copy of a slot, in host memory: for each layer keys and values, (kv_heads, num_tokens, head_dim)."""

    layers: tuple[tuple[torch.Tensor, torch.Tensor], ...]

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for layer in self.layers for tensor in layer)


class SlotCache(Cache):
    """The `past_key_values` of a model whose layers all attend to keys and values."""

    def __init__(self, windows: Sequence[int | None], max_len: int, device: torch.device) -> None:
        """`windows`: of each layer how far back it sees, None: to the beginning.

        Takes no memory yet: that comes with use, up to `max_len` tokens a slot.
        """
        self.max_len = max_len
        self.max_slots: int | None = None
        """Set before the first pass: there will never be more. None: nobody knows."""
        self._device = device
        self.placement = Placement(torch.empty(0), torch.empty(0), 0, 0, [])
        self._slot_layers = [SlotLayer(self) for _ in windows]
        self.windows = frozenset(windows)
        super().__init__(layers=list(self._slot_layers))

    @property
    def bytes_per_token(self) -> int:
        """Of one slot, all layers. Known after the first pass."""
        return sum(
            memory.tensor.shape[1] * memory.tensor.shape[3] * memory.tensor.element_size()
            for layer in self._slot_layers
            for memory in layer.memories
        )

    @property
    def is_complete(self) -> bool:
        """Every layer has been fed."""
        return all(layer.is_initialized for layer in self._slot_layers)

    def place(self, feeds: Sequence[Feed]) -> Placement:
        """The next forward pass brings these tokens, one after the other in one row."""
        slots = [feed.slot for feed in feeds for _ in feed.token_ids]
        positions = [feed.start + n for feed in feeds for n in range(len(feed.token_ids))]
        self.placement = Placement(
            slots=on_device(slots, self._device),
            positions=on_device(positions, self._device),
            num_slots=max(slots) + 1,
            kv_len=max(positions) + 1,
            runs=_runs(feeds),
        )
        return self.placement

    def clear(self, slot: int, length: int) -> None:
        """Forget a slot, of which the first `length` tokens were written."""
        for layer in self._slot_layers:
            if layer.is_initialized:
                for memory in layer.memories:
                    memory.clear(slot, length)

    def save(self, slot: int, length: int) -> SavedSlot:
        kept = [[_to_host(m.tensor[slot, :, :length]) for m in layer.memories] for layer in self._slot_layers]
        return SavedSlot(tuple((keys, values) for keys, values in kept))

    def load(self, slot: int, saved: SavedSlot, length: int) -> None:
        """The slot's first `length` tokens are those of `saved`."""
        for layer, kept in zip(self._slot_layers, saved.layers, strict=True):
            for memory, states in zip(layer.memories, kept, strict=True):
                memory.reserve(slot + 1, length)
                memory.tensor[slot, :, :length].copy_(states[:, :length], non_blocking=True)

    def copy(self, source: int, slot: int, length: int) -> None:
        for layer in self._slot_layers:
            for memory in layer.memories:
                memory.reserve(slot + 1, length)
                memory.tensor[slot, :, :length] = memory.tensor[source, :, :length]


def _runs(feeds: Sequence[Feed]) -> list[Run]:
    """Feeds of one token in neighbouring slots of similar length together; every longer one by itself."""
    runs: list[Run] = []
    num_tokens = 0
    for feed in feeds:
        last = runs[-1] if runs else None
        if last is not None and _may_join(feed, last):
            last.starts.append(feed.start)
        else:
            runs.append(Run(feed.slot, num_tokens, len(feed.token_ids), [feed.start]))
        num_tokens += len(feed.token_ids)
    return runs


def _may_join(feed: Feed, run: Run) -> bool:
    if not len(feed.token_ids) == run.num_tokens == 1 or feed.slot != run.first_slot + len(run.starts):
        return False
    starts = [*run.starts, feed.start]
    return len(starts) * max(starts) - sum(starts) <= MAX_PADDING_TOKENS


def _to_host(memory: torch.Tensor) -> torch.Tensor:
    """A copy. From a GPU into pinned memory, from where it goes back without a stop."""
    copy = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=memory.is_cuda)
    copy.copy_(memory)
    return copy
