"""`SortedKeys` against a plain set."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.scheduler.policies.sorted_keys import Key, SortedKeys


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "return"]), st.integers(0, 30)), max_size=200))
def test_a_position_is_1_plus_the_number_of_smaller_keys(steps: list[tuple[str, int]]) -> None:
    keys, members, gone, next_seq = SortedKeys(), set[int](), list[int](), 0
    for what, n in steps:
        if what == "add":
            keys.add((0.0, next_seq))
            members.add(next_seq)
            next_seq += 1
        elif what == "remove" and members:
            removed = sorted(members)[n % len(members)]
            keys.remove((0.0, removed))
            members.remove(removed)
            gone.append(removed)
        elif what == "return" and gone:
            returner = gone.pop(n % len(gone))
            keys.add((0.0, returner))
            members.add(returner)
        assert [keys.position((0.0, seq)) for seq in sorted(members)] == list(range(1, len(members) + 1))
        assert len(keys) == len(members)


def test_keys_are_sorted_by_value_then_by_seq() -> None:
    keys = SortedKeys()
    for key in [(2.0, 0), (1.0, 1), (2.0, 2), (-5.0, 3)]:
        keys.add(key)
    assert keys.keys == ((-5.0, 3), (1.0, 1), (2.0, 0), (2.0, 2))
    assert keys.first == (-5.0, 3)


@pytest.mark.parametrize("what", [SortedKeys.remove, SortedKeys.position])
def test_only_a_member_has_a_position(what: Callable[[SortedKeys, Key], object]) -> None:
    keys = SortedKeys()
    keys.add((0.0, 1))
    with pytest.raises(AssertionError):
        what(keys, (0.0, 2))
