"""Defaults for a checkpoint, for all engines."""

from __future__ import annotations

from typing import Any

import pytest

from chatstream.engines.loading.checkpoint_defaults import (
    DEFAULT_MAX_CONTEXT_LEN,
    answer_len,
    context_len_of,
    sampling_of,
)
from chatstream.errors import ConfigError
from chatstream.types import SamplingParams


@pytest.mark.parametrize(
    ("limit", "wanted", "context_len"),
    [
        (160, None, 160),
        (160, 160, 160),
        (160, 20, 20),
        (1_000_000, None, DEFAULT_MAX_CONTEXT_LEN),
        (1_000_000, 20_000, 20_000),
        (None, None, DEFAULT_MAX_CONTEXT_LEN),
        (None, 20_000, 20_000),
    ],
)
def test_the_default_context_is_the_models_up_to_a_maximum(
    limit: int | None, wanted: int | None, context_len: int
) -> None:
    assert context_len_of(limit, wanted) == context_len


def test_a_longer_context_than_the_models_is_refused() -> None:
    with pytest.raises(ConfigError, match="context_len 161 is more than the model's 160 tokens") as refused:
        context_len_of(160, 161)
    assert refused.value.param == "context_len"


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({"temperature": 1.5, "min_p": 0.1, "pad_token_id": 5}, SamplingParams(temperature=1.5, min_p=0.1)),
        ({"top_p": None, "top_k": 0, "repetition_penalty": 1.1}, SamplingParams(repetition_penalty=1.1)),
        ({}, SamplingParams()),
    ],
)
def test_recommended_sampling_is_the_default(config: dict[str, Any], sampling: SamplingParams) -> None:
    assert sampling_of(config) == sampling


def test_invalid_recommendations_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    assert sampling_of({"temperature": 9.0, "top_k": 20}) == SamplingParams()
    assert "ignored the sampling defaults of the checkpoint" in caplog.text


@pytest.mark.parametrize(("context_len", "expected"), [(2, 1), (160, 40), (8192, 1024)])
def test_an_answer_leaves_room_for_the_conversation(context_len: int, expected: int) -> None:
    assert answer_len(context_len) == expected
