"""State is found by the longest common prefix, within a bound of bytes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatstream.engines.batching import prefix_cache
from chatstream.engines.batching.prefix_cache import PrefixCache, as_tokens, common_prefix

ID = st.sampled_from([0, 1, 255, 256, 2**31, 2**63 - 1, -1, -(2**63)])  # few ids, with some bytes in common
IDS = st.lists(ID, max_size=40)


@dataclass(frozen=True)
class Memory:
    """Stands for keys and values, with one byte per token."""

    name: str
    nbytes: int


def store(cache: PrefixCache, text: str, nbytes: int | None = None) -> weakref.ref[Memory]:
    """Store a sequence with one token per character. The reference dies when the cache evicts the entry."""
    memory = Memory(text, len(text) if nbytes is None else nbytes)
    cache.store(as_tokens([ord(c) for c in text]), lambda: memory)
    return weakref.ref(memory)


def living_bytes(references: list[weakref.ref[Memory]]) -> int:
    memories = [reference() for reference in references]
    return sum(memory.nbytes for memory in memories if memory is not None)


def find(cache: PrefixCache, text: str) -> tuple[str, int] | None:
    found = cache.longest_prefix(as_tokens([ord(c) for c in text]))
    if found is None:
        return None
    saved, num_tokens = found
    assert isinstance(saved, Memory)
    return saved.name, num_tokens


def test_the_longest_common_prefix_wins() -> None:
    cache = PrefixCache(100)
    for text in ("system: hello", "system: help", "sister"):
        store(cache, text)
    assert find(cache, "system: helping") == ("system: help", 12)
    assert find(cache, "system: hell") == ("system: hello", 12)
    assert find(cache, "sis") == ("sister", 3)
    assert find(cache, "another") is None
    assert find(cache, "") is None


def test_the_next_turn_replaces_the_previous_one() -> None:
    cache = PrefixCache(100)
    for text in ("turn 1", "other", "turn 1, turn 2"):
        store(cache, text)
    assert len(cache) == 2
    assert cache.nbytes == len("other") + len("turn 1, turn 2")


def test_a_prefix_of_an_entry_is_not_stored() -> None:
    """For example, when a request with the same prompt is repeated."""
    cache = PrefixCache(30)
    store(cache, "prompt and answer")
    store(cache, "another")
    cache.store(as_tokens([ord(c) for c in "prompt"]), lambda: pytest.fail("saved superfluous state"))
    assert len(cache) == 2
    store(cache, "something new")
    assert find(cache, "prompt") == ("prompt and answer", 6), "it counts as used"
    assert find(cache, "another") is None


def test_the_least_recently_used_entry_is_evicted() -> None:
    cache = PrefixCache(10)
    for text in ("aaaa", "bbbb"):
        store(cache, text)
    assert find(cache, "aa") == ("aaaa", 2)
    store(cache, "cccc")
    assert [find(cache, text) for text in ("a", "b", "c")] == [("aaaa", 1), None, ("cccc", 1)]
    assert cache.nbytes == 8
    store(cache, "dddddddd")
    assert len(cache) == 1


def test_state_larger_than_the_cache_evicts_nothing() -> None:
    cache = PrefixCache(10)
    store(cache, "a")
    store(cache, "b", nbytes=11)
    assert find(cache, "b") is None
    assert find(cache, "a") == ("a", 1)
    store(cache, "c", nbytes=9)
    assert len(cache) == 2


def test_a_cache_of_no_bytes_saves_nothing() -> None:
    cache = PrefixCache(0)
    cache.store(as_tokens([1]), lambda: pytest.fail("saved state that cannot be stored"))
    assert len(cache) == 0


def test_the_number_of_entries_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_cache, "MAX_ENTRIES", 3)
    cache = PrefixCache(100)
    for text in "abcd":
        store(cache, text, nbytes=0)
    assert [find(cache, text) is not None for text in "abcd"] == [False, True, True, True]


def test_a_save_that_fails_leaves_the_cache_unchanged() -> None:
    cache = PrefixCache(100)
    store(cache, "turn 1")
    with pytest.raises(MemoryError):
        cache.store(as_tokens([ord(c) for c in "turn 1, turn 2"]), raise_memory_error)
    assert find(cache, "turn 1, turn 2") == ("turn 1", 6)
    assert cache.nbytes == 6


def raise_memory_error() -> Memory:
    raise MemoryError


def test_clear_releases_everything() -> None:
    cache = PrefixCache(100)
    store(cache, "a")
    cache.clear()
    assert (len(cache), cache.nbytes, find(cache, "a")) == (0, 0, None)


# --- indivisible state ----------------------------------------------------------------------------------------------


def test_without_partial_prefixes_an_entry_matches_its_exact_tokens_once() -> None:
    cache = PrefixCache(100, supports_partial_prefix=False)
    store(cache, "abcd")
    assert find(cache, "abc") is None
    assert find(cache, "abcde") is None
    assert find(cache, "abcd") == ("abcd", 4)
    assert find(cache, "abcd") is None
    assert cache.nbytes == 0


def test_without_partial_prefixes_a_longer_entry_replaces_and_covers_nothing() -> None:
    """For example, two preempted generations of the same prompt, one of them longer."""
    cache = PrefixCache(100, supports_partial_prefix=False)
    for text in ("ab", "abcd", "abc"):
        store(cache, text)
    assert [find(cache, text) for text in ("ab", "abc", "abcd")] == [("ab", 2), ("abc", 3), ("abcd", 4)]


# --- tokens ---------------------------------------------------------------------------------------------------------


def naive(a: list[int], b: list[int]) -> int:
    same = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        same += 1
    return same


@given(begin=IDS, a=IDS, b=IDS)
@example(begin=[], a=[], b=[])
@example(begin=[1], a=[256], b=[0])
def test_common_prefix_equals_the_naive_computation(begin: list[int], a: list[int], b: list[int]) -> None:
    assert common_prefix(as_tokens(begin + a), as_tokens(begin + b)) == naive(begin + a, begin + b)


@given(stored=st.lists(IDS, max_size=12), wanted=IDS)
def test_no_entry_has_a_longer_common_prefix_than_the_result(stored: list[list[int]], wanted: list[int]) -> None:
    cache = PrefixCache(10**6)
    for n, ids in enumerate(stored):
        cache.store(as_tokens(ids), lambda n=n, ids=ids: Memory(str(n), len(ids)))  # type: ignore[misc]
    found = cache.longest_prefix(as_tokens(wanted))
    longest = max((naive(ids, wanted) for ids in stored), default=0)
    assert (found[1] if found else 0) == longest
    if found:
        assert isinstance(found[0], Memory)
        assert naive(stored[int(found[0].name)], wanted) == longest


@given(texts=st.lists(st.text("ab", max_size=6), max_size=30), max_bytes=st.integers(0, 12))
def test_the_bytes_are_counted_and_bounded(texts: list[str], max_bytes: int) -> None:
    cache = PrefixCache(max_bytes)
    references = []
    for text in texts:
        references.append(store(cache, text))
        assert cache.nbytes == living_bytes(references) <= max_bytes


@pytest.mark.parametrize("token_id", [2**63, -(2**63) - 1])
def test_ids_that_do_not_fit_are_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        as_tokens([1, token_id])
