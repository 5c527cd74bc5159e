"""What was computed is found again by whoever begins alike, within a bound of bytes."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from chatstream.engines.batching import prefix_cache as prefix_pool
from chatstream.engines.batching.prefix_cache import PrefixCache, as_tokens, common_prefix

ID = st.sampled_from([0, 1, 255, 256, 2**31, 2**63 - 1, -1, -(2**63)])  # few, and alike in some of their bytes
IDS = st.lists(ID, max_size=40)


@dataclass(frozen=True)
class Memory:
    """Stands for keys and values: a byte a token."""

    name: str
    nbytes: int


def keep(pool: PrefixCache, text: str, nbytes: int | None = None) -> weakref.ref[Memory]:
    """A sequence with a token for each character. The reference dies when the pool has dropped it."""
    memory = Memory(text, len(text) if nbytes is None else nbytes)
    pool.store(as_tokens([ord(c) for c in text]), lambda: memory)
    return weakref.ref(memory)


def living_bytes(references: list[weakref.ref[Memory]]) -> int:
    memories = [reference() for reference in references]
    return sum(memory.nbytes for memory in memories if memory is not None)


def find(pool: PrefixCache, text: str) -> tuple[str, int] | None:
    found = pool.longest_prefix(as_tokens([ord(c) for c in text]))
    if found is None:
        return None
    saved, num_tokens = found
    assert isinstance(saved, Memory)
    return saved.name, num_tokens


def test_the_longest_beginning_in_common_wins() -> None:
    pool = PrefixCache(100)
    for text in ("system: hello", "system: help", "sister"):
        keep(pool, text)
    assert find(pool, "system: helping") == ("system: help", 12)
    assert find(pool, "system: hell") == ("system: hello", 12)
    assert find(pool, "sis") == ("sister", 3)
    assert find(pool, "another") is None
    assert find(pool, "") is None


def test_the_next_turn_takes_the_place_of_the_one_before() -> None:
    pool = PrefixCache(100)
    for text in ("turn 1", "other", "turn 1, turn 2"):
        keep(pool, text)
    assert len(pool) == 2
    assert pool.nbytes == len("other") + len("turn 1, turn 2")


def test_what_is_the_beginning_of_something_kept_is_not_kept_beside_it() -> None:
    """An answer that is asked for again, from the same prompt."""
    pool = PrefixCache(30)
    keep(pool, "prompt and answer")
    keep(pool, "another")
    pool.store(as_tokens([ord(c) for c in "prompt"]), lambda: pytest.fail("nobody needs a copy of it"))
    assert len(pool) == 2
    keep(pool, "something new")
    assert find(pool, "prompt") == ("prompt and answer", 6), "it counts as used"
    assert find(pool, "another") is None


def test_over_the_bound_whatever_was_not_used_for_longest_goes() -> None:
    pool = PrefixCache(10)
    for text in ("aaaa", "bbbb"):
        keep(pool, text)
    assert find(pool, "aa") == ("aaaa", 2)
    keep(pool, "cccc")
    assert [find(pool, text) for text in ("a", "b", "c")] == [("aaaa", 1), None, ("cccc", 1)]
    assert pool.nbytes == 8
    keep(pool, "dddddddd")
    assert len(pool) == 1


def test_what_is_larger_than_the_pool_empties_nothing() -> None:
    pool = PrefixCache(10)
    keep(pool, "a")
    keep(pool, "b", nbytes=11)
    assert find(pool, "b") is None
    assert find(pool, "a") == ("a", 1)
    keep(pool, "c", nbytes=9)
    assert len(pool) == 2


def test_a_pool_of_no_bytes_copies_nothing() -> None:
    pool = PrefixCache(0)
    pool.store(as_tokens([1]), lambda: pytest.fail("a copy for nothing"))
    assert len(pool) == 0


def test_no_more_entries_than_can_be_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_pool, "MAX_ENTRIES", 3)
    pool = PrefixCache(100)
    for text in "abcd":
        keep(pool, text, nbytes=0)
    assert [find(pool, text) is not None for text in "abcd"] == [False, True, True, True]


def test_a_save_that_fails_leaves_the_pool_as_it_was() -> None:
    pool = PrefixCache(100)
    keep(pool, "turn 1")
    with pytest.raises(MemoryError):
        pool.store(as_tokens([ord(c) for c in "turn 1, turn 2"]), raise_memory_error)
    assert find(pool, "turn 1, turn 2") == ("turn 1", 6)
    assert pool.nbytes == 6


def raise_memory_error() -> Memory:
    raise MemoryError


def test_clearing_gives_everything_back() -> None:
    pool = PrefixCache(100)
    keep(pool, "a")
    pool.clear()
    assert (len(pool), pool.nbytes, find(pool, "a")) == (0, 0, None)


# --- states that cannot be cut --------------------------------------------------------------------------------------


def test_where_parts_are_of_no_use_only_the_very_same_tokens_are_found_and_by_one() -> None:
    pool = PrefixCache(100, supports_partial_prefix=False)
    keep(pool, "abcd")
    assert find(pool, "abc") is None
    assert find(pool, "abcde") is None
    assert find(pool, "abcd") == ("abcd", 4)
    assert find(pool, "abcd") is None
    assert pool.nbytes == 0


def test_where_parts_are_of_no_use_a_longer_one_replaces_nothing_and_covers_nothing() -> None:
    """Two that are preempted with the same prompt, one of them further on."""
    pool = PrefixCache(100, supports_partial_prefix=False)
    for text in ("ab", "abcd", "abc"):
        keep(pool, text)
    assert [find(pool, text) for text in ("ab", "abc", "abcd")] == [("ab", 2), ("abc", 3), ("abcd", 4)]


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
def test_the_common_beginning_is_that_of_the_lists(begin: list[int], a: list[int], b: list[int]) -> None:
    assert common_prefix(as_tokens(begin + a), as_tokens(begin + b)) == naive(begin + a, begin + b)


@given(kept=st.lists(IDS, max_size=12), wanted=IDS)
def test_nothing_kept_has_more_in_common_than_what_is_found(kept: list[list[int]], wanted: list[int]) -> None:
    pool = PrefixCache(10**6)
    for n, ids in enumerate(kept):
        pool.store(as_tokens(ids), lambda n=n, ids=ids: Memory(str(n), len(ids)))  # type: ignore[misc]
    found = pool.longest_prefix(as_tokens(wanted))
    longest = max((naive(ids, wanted) for ids in kept), default=0)
    assert (found[1] if found else 0) == longest
    if found:
        assert isinstance(found[0], Memory)
        assert naive(kept[int(found[0].name)], wanted) == longest


@given(texts=st.lists(st.text("ab", max_size=6), max_size=30), max_bytes=st.integers(0, 12))
def test_the_bytes_are_counted_and_bounded_whatever_comes(texts: list[str], max_bytes: int) -> None:
    pool = PrefixCache(max_bytes)
    references = []
    for text in texts:
        references.append(keep(pool, text))
        assert pool.nbytes == living_bytes(references) <= max_bytes


@pytest.mark.parametrize("token_id", [2**63, -(2**63) - 1])
def test_ids_that_do_not_fit_are_refused(token_id: int) -> None:
    with pytest.raises(OverflowError):
        as_tokens([1, token_id])
