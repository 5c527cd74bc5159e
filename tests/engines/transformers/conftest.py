"""Small checkpoints with random weights, built once a session and loaded with the real loader."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from tests.engines.transformers import checkpoints
from tests.engines.transformers.recording import generate_alone, mixed_requests


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of the checkpoint of a kind."""
    root = tmp_path_factory.mktemp("checkpoints")
    return cache(lambda kind: checkpoints.save(kind, root / kind))


@pytest.fixture(scope="session")
def reference(checkpoint: Callable[[str], Path]) -> Callable[[str], PreTrainedModel]:
    """The model of the checkpoint of a kind, loaded with transformers."""
    return cache(lambda kind: checkpoints.load_reference(checkpoint(kind)))


@pytest.fixture(scope="session")
def expected(reference: Callable[[str], PreTrainedModel]) -> Callable[..., list[list[int]]]:
    """The tokens of `model.generate` for each of the mixed requests alone, by the kind of the checkpoint."""

    @cache
    def tokens(kind: str, repetition_penalty: float = 1.0) -> list[list[int]]:
        model = reference(kind)
        requests = mixed_requests(model.config.vocab_size, repetition_penalty=repetition_penalty)
        return [generate_alone(model, request) for request in requests]

    return tokens


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return checkpoints.train_tokenizer()


@pytest.fixture
def copy_of(checkpoint: Callable[[str], Path], tmp_path: Path) -> Callable[..., Path]:
    """Copy a checkpoint for one test, which may damage it; keyword arguments change its config.json."""

    def copy(kind: str = "llama", **config: Any) -> Path:
        path = tmp_path / "broken"
        shutil.copytree(checkpoint(kind), path)
        before = json.loads((path / "config.json").read_text())
        (path / "config.json").write_text(json.dumps(before | config))
        return path

    return copy
