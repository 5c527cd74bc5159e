"""A pytest plugin for scripts/mutate: the tests run once per mutant, so property tests get fewer examples.

The examples are the same in every run, and failures are not shrunk, because only the failure counts. Tests that count
executed lines are excluded: mutmut adds lines to every call.
"""

from __future__ import annotations

import pytest
from hypothesis import Phase, settings

MAX_EXAMPLES = 25
COUNTS_LINES = "nothing_scans_the_line"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = [item for item in items if COUNTS_LINES not in item.name]
    for item in items:
        machine = getattr(item, "cls", None)
        if isinstance(getattr(machine, "settings", None), settings):
            machine.settings = settings(
                machine.settings, max_examples=MAX_EXAMPLES, phases=(Phase.explicit, Phase.generate)
            )
