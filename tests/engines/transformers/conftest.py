"""Small checkpoints with random weights, built once a session and loaded through the real loader."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.engines.transformers import checkpoints


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a checkpoint, by its kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda kind: checkpoints.save(kind, root / kind))


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The same checkpoint as the library itself runs it."""
    return cache(lambda kind: checkpoints.load_reference(checkpoint(kind)))


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return checkpoints.train_tokenizer()
