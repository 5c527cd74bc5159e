"""Slots keep their contents while other slots are added, grow or are cleared."""

from __future__ import annotations

import pytest
import torch

from chatstream.engines.batching.model import SlotInput
from chatstream.engines.transformers.kv_cache import Run, SlotCache

HEADS, HEAD_DIM, MAX_LEN = 2, 4, 100


@pytest.fixture(params=["mapped", "growing"])
def cache(request: pytest.FixtureRequest) -> SlotCache:
    cache = SlotCache(windows=[None], max_len=MAX_LEN, device=torch.device("cpu"))
    cache.max_slots = 6 if request.param == "mapped" else None
    return cache


def write(cache: SlotCache, *inputs: tuple[int, int, int], value: float) -> None:
    """Write inputs of (slot, start, number of tokens) in one row, with `value` in every position."""
    placement = cache.place([SlotInput(slot, start, (0,) * count, is_last=True) for slot, start, count in inputs])
    states = torch.full((1, HEADS, len(placement.slots), HEAD_DIM), value)
    cache.update(states, -states, 0)


def read(cache: SlotCache, slot: int, length: int) -> list[float]:
    """The first number of the first head's key, by position."""
    keys, values = (memory.tensor for memory in cache.layers[0].memories)
    assert torch.equal(keys.nan_to_num(), -values.nan_to_num())
    return list(keys[slot, 0, :length, 0].tolist())


def test_tokens_of_a_row_are_written_to_their_slots_and_positions(cache: SlotCache) -> None:
    write(cache, (0, 0, 3), value=1.0)
    write(cache, (1, 0, 1), value=2.0)
    write(cache, (0, 3, 1), (1, 1, 2), value=9.0)
    assert read(cache, 0, 5) == [1, 1, 1, 9, 0]
    assert read(cache, 1, 4) == [2, 9, 9, 0]


def test_longer_and_more_slots_keep_their_contents(cache: SlotCache) -> None:
    write(cache, (0, 0, 8), value=1.0)
    write(cache, (3, 0, 20), value=2.0)
    write(cache, (0, 8, 1), value=3.0)
    assert read(cache, 0, 9) == [1] * 8 + [3]
    assert read(cache, 3, 20) == [2] * 20


def test_bytes_per_token_are_those_of_keys_and_values(cache: SlotCache) -> None:
    write(cache, (0, 0, 1), value=1.0)
    assert cache.bytes_per_token == 2 * HEADS * HEAD_DIM * 4


def test_clearing_a_slot_zeroes_it_and_no_other(cache: SlotCache) -> None:
    for slot in range(3):
        write(cache, (slot, 0, 4), value=float("nan") if slot == 1 else 1.0)
    cache.clear(1, 4)
    assert [read(cache, slot, 4) for slot in range(3)] == [[1] * 4, [0] * 4, [1] * 4]


def test_a_prefix_is_loaded_from_a_copy_or_copied_from_another_slot(cache: SlotCache) -> None:
    write(cache, (0, 0, 10), value=1.0)
    saved = cache.save(0, 10)
    cache.clear(0, 10)
    assert saved.nbytes == 10 * cache.bytes_per_token
    cache.load(5, saved, 7)
    cache.copy(5, 2, 4)
    assert [read(cache, slot, 10) for slot in (0, 5, 2)] == [[0] * 10, [1] * 7 + [0] * 3, [1] * 4 + [0] * 6]


# --- runs -----------------------------------------------------------------------------------------------------------


def runs_of(*inputs: tuple[int, int, int]) -> list[tuple[int, list[int], int]]:
    """(first slot, starts, tokens of each slot) of the runs of inputs (slot, start, number of tokens)."""
    made = [SlotInput(slot, start, (0,) * count, is_last=True) for slot, start, count in inputs]
    cache = SlotCache(windows=[None], max_len=10_000, device=torch.device("cpu"))
    return [(run.first_slot, run.starts, run.num_tokens) for run in cache.place(made).runs]


def test_neighbouring_slots_of_similar_length_are_one_run() -> None:
    assert runs_of((1, 100, 1), (2, 130, 1), (3, 90, 1)) == [(1, [100, 130, 90], 1)]


def test_a_gap_ends_a_run() -> None:
    assert runs_of((0, 5, 1), (2, 5, 1), (3, 5, 1)) == [(0, [5], 1), (2, [5, 5], 1)]


def test_a_long_context_is_not_in_a_run_with_short_ones() -> None:
    assert runs_of((0, 50, 1), (1, 8000, 1), (2, 60, 1)) == [(0, [50], 1), (1, [8000], 1), (2, [60], 1)]


def test_a_part_of_a_prompt_is_a_run_of_its_own() -> None:
    assert runs_of((0, 5, 1), (1, 5, 1), (2, 0, 4), (3, 0, 4)) == [(0, [5, 5], 1), (2, [0], 4), (3, [0], 4)]


@pytest.mark.parametrize("window", [None, 1, 5, 30])
def test_each_token_attends_to_earlier_tokens_within_the_window(window: int | None) -> None:
    for run in (Run(0, 0, 1, [12]), Run(0, 0, 1, [3, 12, 0]), Run(0, 0, 4, [9])):
        mask = run.mask(window, 2, torch.zeros(()))
        first = run.first_key(window)
        for row, start in enumerate(run.starts):
            for head in range(2):
                for n in range(run.num_tokens):
                    visible = [
                        key
                        for key in range(first, run.kv_len)
                        if mask is None or mask[row, 0, head * run.num_tokens + n, key - first] == 0
                    ]
                    at = start + n
                    assert visible == list(range(0 if window is None else max(0, at - window + 1), at + 1))
