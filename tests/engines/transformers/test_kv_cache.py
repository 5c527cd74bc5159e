"""Slots keep what was written to them, whoever joins, grows or leaves beside them."""

from __future__ import annotations

import pytest
import torch

from chatstream.engines.transformers import kv_cache
from chatstream.engines.transformers.kv_cache import SlotCache

HEADS, HEAD_DIM, MAX_LEN = 2, 4, 100


@pytest.fixture(autouse=True)
def _short_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kv_cache, "CAPACITY_STEP_TOKENS", 8)


@pytest.fixture
def cache() -> SlotCache:
    return SlotCache(num_layers=1, max_len=MAX_LEN, device=torch.device("cpu"))


def states(rows: int, tokens: int, value: float) -> torch.Tensor:
    return torch.full((rows, HEADS, tokens, HEAD_DIM), value)  # (B, kv_heads, Q, head_dim)


def write(cache: SlotCache, slots: list[int], starts: list[int], tokens: int, value: float) -> torch.Tensor:
    """(len(slots), kv_len): the key of the first head in each position, after writing `value` there."""
    cache.place(slots, starts, tokens)
    keys, values = cache.update(states(len(slots), tokens, value), states(len(slots), tokens, -value), 0)
    assert torch.equal(keys.nan_to_num(), -values.nan_to_num())
    return keys[:, 0, :, 0]


def test_rows_of_different_length_are_written_at_their_own_positions(cache: SlotCache) -> None:
    write(cache, [0], [0], 3, 1.0)
    write(cache, [1], [0], 1, 2.0)
    rows = write(cache, [0, 1], [3, 1], 1, 9.0)
    assert rows.tolist() == [[1, 1, 1, 9], [2, 9, 0, 0]]


def test_growing_in_length_and_in_slots_keeps_what_is_there(cache: SlotCache) -> None:
    write(cache, [0], [0], 8, 1.0)
    assert cache.layers[0].keys.shape == (1, HEADS, 8, HEAD_DIM)
    write(cache, [3], [0], 20, 2.0)
    assert cache.layers[0].keys.shape == (4, HEADS, 24, HEAD_DIM)
    assert write(cache, [0], [8], 1, 3.0).tolist() == [[1] * 8 + [3]]


def test_a_slot_never_grows_beyond_the_context(cache: SlotCache) -> None:
    write(cache, [0], [0], 70, 1.0)
    write(cache, [0], [70], 30, 1.0)
    assert cache.layers[0].keys.shape[2] == MAX_LEN


def test_slots_with_gaps_and_in_any_order_are_read_as_asked_for(cache: SlotCache) -> None:
    for slot in range(4):
        write(cache, [slot], [0], 2, slot + 1.0)
    assert write(cache, [3, 0, 2], [2, 2, 2], 1, 9.0).tolist() == [[4, 4, 9], [1, 1, 9], [3, 3, 9]]


def test_neighbouring_slots_are_read_without_a_copy(cache: SlotCache) -> None:
    write(cache, [2], [0], 2, 1.0)
    cache.place([1, 2], [0, 2], 1)
    keys, _ = cache.update(states(2, 1, 5.0), states(2, 1, 5.0), 0)
    assert keys.untyped_storage().data_ptr() == cache.layers[0].keys.untyped_storage().data_ptr()


def test_clearing_a_slot_wipes_it_and_nothing_else(cache: SlotCache) -> None:
    for slot in range(3):
        write(cache, [slot], [0], 4, float("nan") if slot == 1 else 1.0)
    cache.clear(1, 4)
    assert cache.layers[0].keys.isfinite().all()
    assert write(cache, [0, 1, 2], [4, 0, 4], 1, 2.0).tolist() == [[1, 1, 1, 1, 2], [2, 0, 0, 0, 0], [1, 1, 1, 1, 2]]
