"""Places in a line, against a list that is scanned."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from chatstream.scheduler.line import Line


@given(st.lists(st.tuples(st.sampled_from(["add", "remove", "come back"]), st.integers(0, 30)), max_size=200))
def test_every_place_equals_one_plus_the_members_ahead(steps: list[tuple[str, int]]) -> None:
    line, members, gone, next_seq = Line(), set[int](), list[int](), 0
    for what, n in steps:
        if what == "add":
            line.add(next_seq)
            members.add(next_seq)
            next_seq += 1
        elif what == "remove" and members:
            leaver = sorted(members)[n % len(members)]
            line.remove(leaver)
            members.remove(leaver)
            gone.append(leaver)
        elif what == "come back" and gone:
            returner = gone.pop(n % len(gone))
            line.add(returner)
            members.add(returner)
        assert [line.place(seq) for seq in sorted(members)] == list(range(1, len(members) + 1))
        assert len(line) == len(members)


def test_a_long_line_that_only_moves_keeps_its_memory_bounded() -> None:
    line = Line()
    for seq in range(20_000):
        line.add(seq)
        if seq >= 10:
            line.remove(seq - 10)
    assert line.place(19_999) == 10
    assert len(line._tree) < 200
