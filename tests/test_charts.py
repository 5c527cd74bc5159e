"""The charts of the documentation show the figures of the tables next to them."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
IMAGES = ROOT / "docs" / "images"


@pytest.fixture(scope="module")
def drawn() -> dict[str, str]:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        import charts
    finally:
        sys.path.pop(0)
    return dict(charts.charts())


@pytest.mark.parametrize("name", ["eta-error.svg", "engines.svg"])
def test_a_chart_is_drawn_from_the_table_as_it_is(name: str, drawn: dict[str, str]) -> None:
    assert drawn[name] == (IMAGES / name).read_text(encoding="utf-8"), "run scripts/charts.py"
