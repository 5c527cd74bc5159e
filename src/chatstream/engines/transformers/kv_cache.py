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

from chatstream.engines.batching.model import SlotInput
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
    def num_slots(self) -> int:
        return len(self.starts)

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
        starts = on_device(self.starts, like.device)[:, None]
        positions = starts + torch.arange(self.num_tokens, device=like.device)
        return _mask(positions, self.first_key(window), self.kv_len, window, group, like)


class StaticRun(Run):
    """One token in each of the first slots, whether anybody is there or not: no shape tells where the texts end."""

    def __init__(self, positions: torch.Tensor, kv_len: int) -> None:
        """`positions`: (num_slots,), int64, on the device. All are below `kv_len`."""
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
    """Where the tokens of one pass go. Shared by all layers."""

    slots: torch.Tensor  # (T,), int64
    positions: torch.Tensor  # (T,), int64
    num_slots: int
    """Slots that must exist: the largest index plus one."""
    kv_len: int
    """Positions that must exist."""
    runs: list[Run]
    rows: torch.Tensor | None = None  # (T,), int64
    """Which token of the row goes there; None: each in its turn."""


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
            written = states[0].transpose(0, 1)  # (T, kv_heads, head_dim)
            memory.tensor[to.slots, :, to.positions] = written if to.rows is None else written[to.rows]
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
        self.device = device
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

    def place(self, inputs: Sequence[SlotInput]) -> Placement:
        """The next forward pass brings these tokens, one after the other in one row."""
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
        """The next forward pass brings one token of each of the first `len(positions)` slots, in their order.

        `positions`: where each of them stands, below `kv_len`. Only those of `slots` are written, of which there are
        as many, so some more than once: nothing is left behind where nobody is. int64, on the device; the memory must
        be there (`reserve`).
        """
        run: Run = StaticRun(positions, kv_len)
        self.placement = Placement(slots, positions[slots], len(positions), kv_len, [run], rows=slots)

    def reserve(self, num_slots: int, num_tokens: int) -> tuple[int, int, int]:
        """So many slots of so many tokens can be written in every layer, all of which have been fed.

        Returns how many slots and tokens there are now, and a number that changes when memory moves. Raises what the
        allocator raises; some layers may then have grown.
        """
        memories = [memory for layer in self._slot_layers for memory in layer.memories]
        for memory in memories:
            memory.reserve(num_slots, num_tokens)
        has_slots = min(memory.tensor.shape[0] for memory in memories)
        capacity = min(memory.tensor.shape[2] for memory in memories)
        return has_slots, capacity, sum(memory.num_moves for memory in memories)

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


def _runs(inputs: Sequence[SlotInput]) -> list[Run]:
    """Feeds of one token in neighbouring slots of similar length together; every longer one by itself."""
    runs: list[Run] = []
    num_tokens = 0
    for item in inputs:
        last = runs[-1] if runs else None
        if last is not None and _may_join(item, last):
            last.starts.append(item.start)
        else:
            runs.append(Run(item.slot, num_tokens, len(item.token_ids), [item.start]))
        num_tokens += len(item.token_ids)
    return runs


def _may_join(item: SlotInput, run: Run) -> bool:
    if not len(item.token_ids) == run.num_tokens == 1 or item.slot != run.first_slot + len(run.starts):
        return False
    starts = [*run.starts, item.start]
    return len(starts) * max(starts) - sum(starts) <= MAX_PADDING_TOKENS


def _to_host(memory: torch.Tensor) -> torch.Tensor:
    """A copy. From a GPU into pinned memory, from where it goes back without a stop."""
    copy = torch.empty(memory.shape, dtype=memory.dtype, pin_memory=memory.is_cuda)
    copy.copy_(memory)
    return copy
