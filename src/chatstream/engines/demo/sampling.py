"""Logits to a token, one row at a time, on numpy. Knows neither the model nor the slots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chatstream.types import SamplingParams


class TokenChooser:
    """Chooses the tokens of one answer.

    Uses one random number a token, from a generator of its own: the same seed gives the same tokens for the same
    logits, whatever else runs.
    """

    def __init__(self, sampling: SamplingParams, prompt_ids: Sequence[int], vocab_size: int) -> None:
        """`sampling.seed` must be set."""
        assert sampling.seed is not None
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed % 2**64))
        self._has_penalty = sampling.repetition_penalty != 1.0
        self._is_seen = np.zeros(vocab_size if self._has_penalty else 0, dtype=np.bool_)
        if self._has_penalty:
            self._is_seen[list(prompt_ids)] = True

    def choose(self, logits: NDArray[np.float32]) -> int:
        """The next token. `logits`: (vocab_size,), float32, left as they are.

        Raises `FloatingPointError` when they are not all finite.
        """
        with np.errstate(over="ignore", invalid="ignore"):
            # One sum finds every NaN and infinity.
            if not np.isfinite(logits.sum(dtype=np.float64)):
                raise FloatingPointError("the model's logits are not finite")
            if self._has_penalty:
                logits = penalized(logits, self._is_seen, self._sampling.repetition_penalty)
            token = self._pick(logits)
        if self._has_penalty:
            self._is_seen[token] = True
        return token

    def _pick(self, logits: NDArray[np.float32]) -> int:
        temperature = self._sampling.temperature
        if temperature == 0:
            return int(logits.argmax())
        # float64 and the maximum first: the smallest temperature then gives zeros, never NaN.
        shifted = logits.astype(np.float64)
        shifted -= shifted.max()
        shifted /= temperature
        weights = np.exp(shifted, out=shifted)
        tokens = likeliest(weights, self._sampling.top_k, self._sampling.top_p)
        return int(tokens[drawn(weights[tokens], self._random.random())])


def penalized(
    logits: NDArray[np.float32], is_seen: NDArray[np.bool_], repetition_penalty: float
) -> NDArray[np.float32]:
    """Seen tokens made less likely: positive logits divided, negative ones multiplied (Keskar et al. 2019)."""
    penalty = np.float32(repetition_penalty)
    return np.where(is_seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def likeliest(weights: NDArray[np.float64], top_k: int | None, top_p: float) -> NDArray[np.intp]:
    """The tokens that may be drawn, at least one; first `top_k` of all, then `top_p` of what these hold together.

    `weights`: (vocab_size,), not negative, not all zero; they need not sum to 1. The token that reaches `top_p` is
    kept. Of equally likely tokens the lower id comes first.
    """
    tokens = np.arange(len(weights))
    if top_k is not None and top_k < len(weights):
        # More than k where weights are equal.
        tokens = np.flatnonzero(weights >= np.partition(weights, -top_k)[-top_k])
        tokens = _descending(tokens, weights)[:top_k]
    if top_p < 1.0:
        mass = weights[tokens].sum()
        # Tokens this unlikely cannot reach 1 - top_p together, so they are never kept: few are left to be sorted.
        # The factor is for rounding.
        unlikely = 0.99 * (1.0 - top_p) * mass / len(tokens)
        tokens = _descending(tokens[weights[tokens] >= unlikely], weights)
        num_kept = np.searchsorted(np.cumsum(weights[tokens]), top_p * mass) + 1
        tokens = tokens[:num_kept]
    return tokens


def _descending(tokens: NDArray[np.intp], weights: NDArray[np.float64]) -> NDArray[np.intp]:
    return tokens[np.argsort(-weights[tokens], kind="stable")]


def drawn(weights: NDArray[np.float64], uniform: float) -> int:
    """The index on which a number from [0, 1) falls. An index of weight 0 is never drawn."""
    mass = np.cumsum(weights)
    index = np.searchsorted(mass, uniform * mass[-1], side="right")
    # Rounding may lift the product to the whole mass: then it falls on the last index that has weight.
    return int(min(index, np.searchsorted(mass, mass[-1])))
