"""A mask is asked for a numpy array of bools, and whatever else it does is one kind of error."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from chatstream.engines.batching.token_mask import allowed_tokens


def gives(value: Any) -> Any:
    return lambda generated_ids: value


@pytest.mark.parametrize("mask", [None, gives(None)])
def test_no_mask_and_no_answer_allow_everything(mask: Any) -> None:
    assert allowed_tokens(mask, (), 3) is None


@pytest.mark.parametrize("allowed", [[True, False, True], [False, True]])
def test_an_array_as_long_as_the_vocabulary_or_shorter_is_taken_as_it_is(allowed: list[bool]) -> None:
    assert list(allowed_tokens(gives(np.array(allowed)), (), 3)) == allowed


def test_the_mask_sees_what_was_generated() -> None:
    def mask(generated_ids: Sequence[int]) -> Any:
        return np.array([token_id in generated_ids for token_id in range(3)])

    assert list(allowed_tokens(mask, (2,), 3)) == [False, False, True]


def raises(generated_ids: Sequence[int]) -> Any:
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (raises, "lost"),
        (gives(np.zeros(3, dtype=bool)), "allows no token"),
        (gives(np.ones(4, dtype=bool)), "at most 3 bools"),
        (gives(np.ones(3)), "bools"),
        (gives(np.ones((1, 3), dtype=bool)), "bools"),
        (gives(np.True_), "bools"),
        (gives([True, True, True]), "numpy array"),
        (gives(3), "numpy array"),
    ],
)
def test_what_makes_no_sense_is_a_value_error_that_says_why(mask: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        allowed_tokens(mask, (), 3)
