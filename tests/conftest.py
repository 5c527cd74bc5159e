"""What all tests share."""

from __future__ import annotations

import pytest
from hypothesis import settings

# The same examples in every run, and no limit of wall-clock time on any of them.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"
