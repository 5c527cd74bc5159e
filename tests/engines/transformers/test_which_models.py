"""The script distinguishes the kinds of models, and docs/models.md has the table of one of its runs."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.mark.parametrize(
    ("family", "how"), [("llama", "as a batch"), ("bamba", "one by one"), ("rwkv", "refused"), ("bart", None)]
)
def test_each_kind_is_recognised(family: str, how: str | None) -> None:
    verdict = runpy.run_path(str(ROOT / "scripts" / "which_models.py"))["verdict_on"](family)
    assert (verdict and verdict[0]) == how


def test_the_page_lists_each_family_once() -> None:
    families = re.findall(r"`([\w-]+)`", (ROOT / "docs" / "models.md").read_text().partition("| served |")[2])
    assert len(families) == len(set(families)) > 150
