"""Small checkpoints with random weights, built once a session and loaded through the real loader."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.engines.transformers import checkpoints


@pytest.fixture(scope="session", autouse=True)
def _one_torch_thread() -> Iterator[None]:
    """Models this small lose more to a second thread than they gain."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


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
