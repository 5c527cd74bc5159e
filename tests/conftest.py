"""Fixtures and settings of all tests."""

from __future__ import annotations

import gc
import os

import pytest
from hypothesis import settings

# One thread for torch, numpy and the processes that tests start: models this small are slower with two, and spinning
# threads block each other for minutes when there are more threads than cores.
os.environ["OMP_NUM_THREADS"] = "1"

# The same hypothesis examples in every run, and no deadline for any of them.
settings.register_profile("tests", deadline=None, derandomize=True)
settings.load_profile("tests")


@pytest.fixture(scope="session")
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture(scope="module", autouse=True)
def _freeze_existing_objects() -> None:
    """Libraries and earlier tests leave a million objects: without this a full collection takes a second."""
    gc.collect()
    gc.freeze()
