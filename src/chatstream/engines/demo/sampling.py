"""Logits to a token, one row at a time, on numpy."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from chatstream.engines.batching.token_mask import allowed_tokens
from chatstream.engines.text.codec import SampledToken
from chatstream.types import SamplingParams, TokenMask


class Sampler:
    """Chooses the tokens of one answer.

    The order of operations is that of `transformers/sampling.py`. Each token uses one random number from the answer's
    own generator: the same seed gives the same tokens for the same logits, whatever other requests run.
    """

    def __init__(
        self,
        sampling: SamplingParams,
        prompt_ids: Sequence[int],
        vocab_size: int,
        token_mask: TokenMask | None = None,
    ) -> None:
        """`sampling.seed` must be set."""
        assert sampling.seed is not None
        self._sampling = sampling
        self._random = np.random.Generator(np.random.PCG64(sampling.seed % 2**64))
        self._token_mask = token_mask
        self._generated: list[int] = []
        self._counts = np.zeros(vocab_size, dtype=np.int64)
        """Number of occurrences of each token in the answer."""
        self._is_seen = np.zeros(vocab_size, dtype=np.bool_)
        """Whether each token occurs in the prompt or in the answer."""
        self._is_seen[list(prompt_ids)] = True

    def choose(self, logits: NDArray[np.float32]) -> SampledToken:
        """Choose the next token. `logits`: (vocab_size,), float32; not modified.

        Raises `FloatingPointError` if they are not all finite, and `ValueError` if the token mask fails.
        """
        sampling = self._sampling
        with np.errstate(over="ignore", invalid="ignore"):
            # One sum finds every NaN and infinity.
            if not np.isfinite(logits.sum(dtype=np.float64)):
                raise FloatingPointError("the model's logits are not finite")
            allowed = allowed_tokens(self._token_mask, self._generated, len(logits))
            if allowed is not None:
                logits = np.where(np.pad(allowed, (0, len(logits) - len(allowed))), logits, np.float32(-np.inf))
            token = self._pick(self._penalized(logits))
        self._is_seen[token] = True
        self._counts[token] += 1
        self._generated.append(token)
        if sampling.logprobs is None:
            return SampledToken(token)
        logprobs = log_softmax(logits)
        return SampledToken(token, float(logprobs[token]), top_logprobs(logprobs, sampling.logprobs))

    def _penalized(self, logits: NDArray[np.float32]) -> NDArray[np.float32]:
        sampling = self._sampling
        if sampling.repetition_penalty != 1.0:
            logits = apply_repetition_penalty(logits, self._is_seen, sampling.repetition_penalty)
        if sampling.frequency_penalty or sampling.presence_penalty:
            logits = apply_count_penalties(logits, self._counts, sampling.frequency_penalty, sampling.presence_penalty)
        return logits

    def _pick(self, logits: NDArray[np.float32]) -> int:
        sampling = self._sampling
        if sampling.temperature == 0:
            return int(logits.argmax())
        # In float64, with the maximum subtracted first: the smallest temperature then gives zeros, never NaN.
        shifted = logits.astype(np.float64)
        shifted -= shifted.max()
        shifted /= sampling.temperature
        weights = np.exp(shifted, out=shifted)
        tokens = candidates(weights, sampling.top_k, sampling.top_p, sampling.min_p)
        return int(tokens[draw_index(weights[tokens], self._random.random())])


def apply_repetition_penalty(
    logits: NDArray[np.float32], is_seen: NDArray[np.bool_], repetition_penalty: float
) -> NDArray[np.float32]:
    """Lower the logits of seen tokens: positive ones are divided, negative ones multiplied (Keskar et al. 2019)."""
    penalty = np.float32(repetition_penalty)
    return np.where(is_seen, np.where(logits > 0, logits / penalty, logits * penalty), logits)


def apply_count_penalties(
    logits: NDArray[np.float32], counts: NDArray[np.int64], frequency_penalty: float, presence_penalty: float
) -> NDArray[np.float32]:
    """OpenAI's penalties: the frequency penalty for each occurrence, the presence penalty once if there is any."""
    less: NDArray[np.float64] = frequency_penalty * counts + presence_penalty * (counts > 0)
    return logits - less.astype(np.float32)


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    shifted: NDArray[np.float64] = logits.astype(np.float64) - logits.max()
    shifted -= np.log(np.exp(shifted).sum())
    return shifted


def top_logprobs(logprobs: NDArray[np.float64], count: int) -> tuple[tuple[int, float], ...]:
    """The `count` likeliest tokens with their log probabilities, in descending order; fewer if fewer are possible."""
    tokens = _descending(np.flatnonzero(logprobs > -np.inf), logprobs)[:count]
    return tuple(zip(tokens.tolist(), logprobs[tokens].tolist(), strict=True))


def candidates(weights: NDArray[np.float64], top_k: int | None, top_p: float, min_p: float = 0.0) -> NDArray[np.intp]:
    """The tokens to draw from, at least one: the `top_k` likeliest, of these the likeliest that hold `top_p` of their
    weight, and of these the tokens with at least `min_p` times the largest weight.

    `weights`: (vocab_size,), not negative, not all zero; they need not sum to 1. The token that reaches `top_p` is
    kept. Of equally likely tokens the lower id comes first.
    """
    tokens = np.arange(len(weights))
    if top_k is not None and top_k < len(weights):
        # More than k if weights are equal.
        tokens = np.flatnonzero(weights >= np.partition(weights, -top_k)[-top_k])
        tokens = _descending(tokens, weights)[:top_k]
    if top_p < 1.0:
        mass = weights[tokens].sum()
        # Tokens this unlikely cannot reach 1 - top_p together, so they are never kept, and few are left to sort. The
        # factor allows for rounding.
        unlikely = 0.99 * (1.0 - top_p) * mass / len(tokens)
        tokens = _descending(tokens[weights[tokens] >= unlikely], weights)
        num_kept = np.searchsorted(np.cumsum(weights[tokens]), top_p * mass) + 1
        tokens = tokens[:num_kept]
    if min_p > 0.0:
        tokens = tokens[weights[tokens] >= min_p * weights.max()]
    return tokens


def _descending(tokens: NDArray[np.intp], weights: NDArray[np.float64]) -> NDArray[np.intp]:
    return tokens[np.argsort(-weights[tokens], kind="stable")]


def draw_index(weights: NDArray[np.float64], uniform: float) -> int:
    """The index that `uniform`, from [0, 1), selects by weight. An index of weight 0 is never selected."""
    mass = np.cumsum(weights)
    index = np.searchsorted(mass, uniform * mass[-1], side="right")
    # Rounding may raise the product to the whole mass; then it selects the last index with a positive weight.
    return int(min(index, np.searchsorted(mass, mass[-1])))
