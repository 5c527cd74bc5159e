"""Places in a line, against a list that is scanned."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.scheduler.policies.sorted_keys import Key, SortedKeys


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "come back"]), st.integers(0, 30)), max_size=200))
def test_every_place_equals_one_plus_the_members_ahead(steps: list[tuple[str, int]]) -> None:
    line, members, gone, next_seq = SortedKeys(), set[int](), list[int](), 0
    for what, n in steps:
        if what == "add":
            line.add((0.0, next_seq))
            members.add(next_seq)
            next_seq += 1
        elif what == "remove" and members:
            leaver = sorted(members)[n % len(members)]
            line.remove((0.0, leaver))
            members.remove(leaver)
            gone.append(leaver)
        elif what == "come back" and gone:
            returner = gone.pop(n % len(gone))
            line.add((0.0, returner))
            members.add(returner)
        assert [line.position((0.0, seq)) for seq in sorted(members)] == list(range(1, len(members) + 1))
        assert len(line) == len(members)


def test_members_stand_in_the_order_of_their_keys_then_of_their_seqs() -> None:
    line = SortedKeys()
    for key in [(2.0, 0), (1.0, 1), (2.0, 2), (-5.0, 3)]:
        line.add(key)
    assert line.keys == ((-5.0, 3), (1.0, 1), (2.0, 0), (2.0, 2))
    assert line.first == (-5.0, 3)


@pytest.mark.parametrize("what", [SortedKeys.remove, SortedKeys.position])
def test_only_a_member_has_a_position(what: Callable[[SortedKeys, Key], object]) -> None:
    line = SortedKeys()
    line.add((0.0, 1))
    with pytest.raises(AssertionError):
        what(line, (0.0, 2))
