"""A mask returns a numpy array of bools or None; anything else is a `ValueError`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from chatstream.engines.batching.token_mask import allowed_tokens


def returns(value: Any) -> Any:
    return lambda generated_ids: value


@pytest.mark.parametrize("mask", [None, returns(None)])
def test_no_mask_or_a_result_of_none_allows_every_token(mask: Any) -> None:
    assert allowed_tokens(mask, (), 3) is None


@pytest.mark.parametrize("allowed", [[True, False, True], [False, True]])
def test_an_array_up_to_the_length_of_the_vocabulary_is_returned_unchanged(allowed: list[bool]) -> None:
    assert list(allowed_tokens(returns(np.array(allowed)), (), 3)) == allowed


def test_the_mask_receives_the_generated_tokens() -> None:
    def mask(generated_ids: Sequence[int]) -> Any:
        return np.array([token_id in generated_ids for token_id in range(3)])

    assert list(allowed_tokens(mask, (2,), 3)) == [False, False, True]


def raises(generated_ids: Sequence[int]) -> Any:
    raise KeyError("lost")


@pytest.mark.parametrize(
    ("mask", "why"),
    [
        (raises, "lost"),
        (returns(np.zeros(3, dtype=bool)), "allows no token"),
        (returns(np.ones(4, dtype=bool)), "at most 3 bools"),
        (returns(np.ones(3)), "bools"),
        (returns(np.ones((1, 3), dtype=bool)), "bools"),
        (returns(np.True_), "bools"),
        (returns([True, True, True]), "numpy array"),
        (returns(3), "numpy array"),
    ],
)
def test_an_invalid_result_is_a_value_error_with_the_reason(mask: Any, why: str) -> None:
    with pytest.raises(ValueError, match=why):
        allowed_tokens(mask, (), 3)
