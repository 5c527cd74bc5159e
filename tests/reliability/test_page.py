"""docs/reliability.md lists exactly the faults, sabotages, invariants and tests that exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.reliability.faults import FAULT_POINTS
from tests.reliability.test_shell import SABOTAGES
from tests.scenarios.chaos import BROKEN

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/reliability.md").read_text(encoding="utf-8")


def test_every_fault_point_is_in_the_table_and_no_other() -> None:
    table = PAGE.partition("## Faults")[2].partition("\n## ")[0]
    rows = dict(re.findall(r"^\| (?!fault|---)([^|]+) \| ([^|]+) \|", table, re.MULTILINE))
    assert rows == {name: what for name, (what, _) in FAULT_POINTS.items()}


def test_every_fault_of_the_chaos_runs_is_named() -> None:
    assert [kind for kind in BROKEN if kind not in PAGE] == []


def test_every_sabotage_is_named() -> None:
    assert [what for what in SABOTAGES if what not in PAGE] == []


def test_every_invariant_has_a_row() -> None:
    """Numbers are not reused: the setting of I24 was removed."""
    assert re.findall(r"^\| I(\d+) \|", PAGE, re.MULTILINE) == [str(n) for n in range(1, 26) if n != 24]


@pytest.mark.parametrize("reference", sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE))), ids="::".join)
def test_every_test_that_is_named_exists(reference: tuple[str, str]) -> None:
    path, name = reference
    assert re.search(rf"^\s*(?:async )?def {name}\(", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
