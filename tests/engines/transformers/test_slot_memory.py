"""Slot memory: allocated with use without moving on Linux, growing elsewhere, released by `clear`."""

from __future__ import annotations

import mmap
import resource
import sys

import pytest
import torch

from chatstream.engines.transformers import slot_memory
from chatstream.engines.transformers.slot_memory import KEPT_TOKENS, GrowingMemory, MappedMemory

STATES = torch.zeros((1, 2, 1, 64), dtype=torch.bfloat16)
"""(1, 2 heads, 1 token, 64)"""
MIB = 2**20

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="memory is mapped on Linux only")


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@on_linux
def test_mapped_memory_is_allocated_by_writes_and_released_after_a_long_text() -> None:
    before = resident_bytes()
    memory = slot_memory.slot_memory(STATES, max_slots=4096, max_len=8192)  # 8 GiB
    memory.reserve(4096, 8192)
    assert isinstance(memory, MappedMemory)
    assert resident_bytes() - before < 8 * MIB
    memory.tensor[4000:4032] = 1
    memory.tensor[10:12, :, :KEPT_TOKENS] = 1
    assert resident_bytes() - before > 60 * MIB
    for slot in range(4000, 4032):
        memory.clear(slot, 8192)
    assert resident_bytes() - before < 8 * MIB
    for slot in (10, 11):
        memory.clear(slot, KEPT_TOKENS)
    assert not memory.tensor[[10, 11, *range(4000, 4032)]].any()


@on_linux
@pytest.mark.parametrize("kept_tokens", [0, KEPT_TOKENS])
def test_clearing_a_slot_leaves_its_neighbours_unchanged_if_slots_are_not_whole_pages(
    kept_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_memory, "KEPT_TOKENS", kept_tokens)
    memory = MappedMemory(STATES, max_slots=3, max_len=10)
    memory.tensor.fill_(1)
    memory.clear(1, 10)
    assert [bool(slot.any()) for slot in memory.tensor] == [True, False, True]


@on_linux
def test_memory_grows_on_a_system_without_overcommit() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, hard))
    try:
        memory = slot_memory.slot_memory(STATES, max_slots=4096, max_len=8192)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert isinstance(memory, GrowingMemory)


def test_memory_grows_without_a_slot_limit_and_on_other_devices() -> None:
    assert isinstance(slot_memory.slot_memory(STATES, None, 8192), GrowingMemory)
    assert isinstance(slot_memory.slot_memory(STATES.to("meta"), 8, 8192), GrowingMemory)


def test_growing_memory_doubles_in_length_up_to_the_context_and_has_the_reserved_slots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slot_memory, "CAPACITY_STEP_TOKENS", 8)
    memory = GrowingMemory(STATES, max_len=100)
    shapes = []
    for num_slots, num_tokens in ((1, 3), (4, 9), (2, 20), (5, 70), (5, 100)):
        memory.reserve(num_slots, num_tokens)
        shapes.append((memory.tensor.shape[0], memory.tensor.shape[2]))
    assert shapes == [(1, 8), (4, 16), (4, 32), (5, 72), (5, 100)]
