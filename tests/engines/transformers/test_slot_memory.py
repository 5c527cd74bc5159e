"""Memory comes as it is written to, nothing pauses for it, and it goes when a slot is cleared."""

from __future__ import annotations

import mmap
import resource
import sys

import pytest
import torch

from chatstream.engines.transformers import slot_memory
from chatstream.engines.transformers.slot_memory import KEPT_TOKENS, GrowingMemory, MappedMemory

STATES = torch.zeros((1, 2, 1, 64), dtype=torch.bfloat16)
"""Of two heads."""
MIB = 2**20

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory grows")


def resident_bytes() -> int:
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[1]) * mmap.PAGESIZE


@on_linux
def test_on_a_cpu_memory_is_taken_when_it_is_written_to_and_given_back_after_a_long_text() -> None:
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
def test_clearing_a_slot_leaves_its_neighbours_alone_where_slots_are_no_whole_pages(
    kept_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(slot_memory, "KEPT_TOKENS", kept_tokens)
    memory = MappedMemory(STATES, max_slots=3, max_len=10)
    memory.tensor.fill_(1)
    memory.clear(1, 10)
    assert [bool(slot.any()) for slot in memory.tensor] == [True, False, True]


@on_linux
def test_where_the_machine_promises_no_more_than_it_has_memory_grows() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as statm:
        in_use = int(statm.read().split()[0]) * mmap.PAGESIZE
    resource.setrlimit(resource.RLIMIT_AS, (in_use + 2**30, hard))
    try:
        memory = slot_memory.slot_memory(STATES, max_slots=4096, max_len=8192)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert isinstance(memory, GrowingMemory)


def test_without_a_bound_and_on_other_devices_memory_grows() -> None:
    assert isinstance(slot_memory.slot_memory(STATES, None, 8192), GrowingMemory)
    assert isinstance(slot_memory.slot_memory(STATES.to("meta"), 8, 8192), GrowingMemory)


def test_memory_that_grows_doubles_in_length_up_to_the_context_and_has_no_more_slots_than_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(slot_memory, "CAPACITY_STEP_TOKENS", 8)
    memory = GrowingMemory(STATES, max_len=100)
    shapes = []
    for num_slots, num_tokens in ((1, 3), (4, 9), (2, 20), (5, 70), (5, 100)):
        memory.reserve(num_slots, num_tokens)
        shapes.append((memory.tensor.shape[0], memory.tensor.shape[2]))
    assert shapes == [(1, 8), (4, 16), (4, 32), (5, 72), (5, 100)]
