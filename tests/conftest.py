"""What all tests share."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

# One thread for torch, numpy and the processes that tests start: models this small lose more to a second one than they
# gain, and threads that wait for each other by spinning stand still for minutes when there are more than cores.
os.environ["OMP_NUM_THREADS"] = "1"

# The same examples in every run, and no limit of wall-clock time on any of them.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
def _freeze_existing_objects() -> None:
    """All libraries and what earlier tests left are a million objects: a second for each look at everything."""
    gc.collect()
    gc.freeze()
