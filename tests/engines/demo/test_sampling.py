"""Sampling: how a token is chosen from logits."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chatstream.engines.demo.sampling import (
    Sampler,
    apply_count_penalties,
    apply_repetition_penalty,
    candidates,
    draw_index,
)
from chatstream.types import SamplingParams

VOCAB = 12

logit_rows = arrays(np.float32, VOCAB, elements=st.floats(-30, 30, width=32))
weight_rows = arrays(np.float64, VOCAB, elements=st.floats(0, 1)).filter(lambda weights: weights.sum() > 0)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


def choose(logits: np.ndarray, prompt_ids: tuple[int, ...] = (), **sampling: float | None) -> int:
    params = SamplingParams(**{"seed": 1, **sampling})  # type: ignore[arg-type]
    return Sampler(params, prompt_ids, len(logits)).choose(logits).token_id


@given(logit_rows)
def test_temperature_zero_takes_the_likeliest(logits: np.ndarray) -> None:
    assert choose(logits, temperature=0.0) == logits.argmax()


@given(logit_rows, st.integers(0, 2**64 - 1))
def test_the_smallest_temperature_takes_one_of_the_likeliest(logits: np.ndarray, seed: int) -> None:
    assert logits[choose(logits, temperature=5e-324, seed=seed)] == logits.max()


@given(logit_rows, st.integers(-(2**63), 2**64 - 1))
def test_top_k_one_takes_the_likeliest(logits: np.ndarray, seed: int) -> None:
    assert choose(logits, temperature=2.0, top_k=1, seed=seed) == logits.argmax()


@given(weight_rows)
def test_a_top_p_below_the_best_keeps_exactly_the_best(weights: np.ndarray) -> None:
    top_p = 0.999 * weights.max() / weights.sum()
    assume(top_p > 0)
    assert list(candidates(weights, None, top_p)) == [weights.argmax()]


@given(weight_rows, fractions)
def test_top_p_keeps_the_token_that_reaches_it_and_no_later_one(weights: np.ndarray, top_p: float) -> None:
    kept = candidates(weights, None, top_p)
    mass = np.cumsum(weights[kept])
    goal = top_p * weights.sum()
    assert mass[-1] >= goal * (1 - 1e-12)
    assert len(kept) == 1 or mass[-2] < goal * (1 + 1e-12)
    assert weights[kept].min() >= np.delete(weights, kept).max(initial=0.0)


@given(weight_rows, st.integers(1, 2 * VOCAB))
def test_top_k_keeps_the_k_likeliest(weights: np.ndarray, top_k: int) -> None:
    kept = candidates(weights, top_k, 1.0)
    assert len(kept) == min(top_k, VOCAB)
    assert weights[kept].min() >= np.delete(weights, kept).max(initial=0.0)


def test_top_p_is_a_share_of_the_weight_that_top_k_leaves() -> None:
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    assert list(candidates(weights, 2, 0.6)) == [0, 1]  # 0.4 / 0.7 is below 0.6
    assert list(candidates(weights, 2, 0.5)) == [0]


@given(weight_rows, st.integers(1, 2 * VOCAB) | st.none(), fractions, fractions)
def test_min_p_keeps_the_remaining_tokens_with_that_share_of_the_largest_weight(
    weights: np.ndarray, top_k: int | None, top_p: float, min_p: float
) -> None:
    left = candidates(weights, top_k, top_p)
    kept = candidates(weights, top_k, top_p, min_p)
    assert list(kept) == [token for token in left if weights[token] >= min_p * weights.max()]
    assert len(kept)


@given(weight_rows)
def test_without_limits_every_token_is_kept(weights: np.ndarray) -> None:
    assert list(candidates(weights, None, 1.0)) == list(range(VOCAB))


@given(weight_rows, st.floats(0, 1, exclude_max=True))
def test_a_token_without_weight_is_never_drawn(weights: np.ndarray, uniform: float) -> None:
    assert weights[draw_index(weights, uniform)] > 0


def test_draws_follow_the_weights() -> None:
    weights = np.array([1.0, 0.0, 2.0, 1.0])
    assert [draw_index(weights, uniform) for uniform in (0.0, 0.24, 0.26, 0.74, 0.76)] == [0, 0, 2, 2, 3]


@given(logit_rows, st.sets(st.integers(0, VOCAB - 1)), st.floats(0.25, 4, width=32))
def test_the_repetition_penalty_is_that_of_transformers(logits: np.ndarray, seen: set[int], penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    is_seen = np.isin(np.arange(VOCAB), list(seen))
    ours = apply_repetition_penalty(logits, is_seen, penalty)
    ids = torch.tensor([sorted(seen)], dtype=torch.long)
    reference = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(logits[None].copy()))
    np.testing.assert_allclose(ours, reference[0].numpy(), rtol=1e-6)


def test_the_repetition_penalty_counts_the_prompt_and_the_answer() -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0], dtype=np.float32)
    sampler = Sampler(SamplingParams(temperature=0.0, repetition_penalty=2.0, seed=1), (0,), 4)
    assert [sampler.choose(logits).token_id for _ in range(3)] == [1, 2, 0]


@given(logit_rows, st.lists(st.integers(0, VOCAB - 1), max_size=20), st.floats(-2, 2), st.floats(-2, 2))
def test_the_frequency_penalty_counts_occurrences_and_the_presence_penalty_counts_once(
    logits: np.ndarray, answer: list[int], frequency: float, presence: float
) -> None:
    expected = [float(logit) for logit in logits]
    for token_id in answer:
        expected[token_id] -= frequency
    for token_id in set(answer):
        expected[token_id] -= presence
    ours = apply_count_penalties(logits, np.bincount(answer, minlength=VOCAB), frequency, presence)
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5)


def test_frequency_and_presence_penalties_ignore_the_prompt() -> None:
    logits = np.array([1.0, 0.05, 0.0], dtype=np.float32)
    params = SamplingParams(temperature=0.0, frequency_penalty=0.6, presence_penalty=0.3, seed=1)
    sampler = Sampler(params, (0, 0), 3)
    # 1.0, then 1.0 - 0.9, then 1.0 - 1.5 against 0.05
    assert [sampler.choose(logits).token_id for _ in range(3)] == [0, 0, 1]


@given(logit_rows, st.integers(0, 20), st.floats(0, 2))
def test_log_probabilities_do_not_depend_on_sampling_parameters(
    logits: np.ndarray, num_best: int, temperature: float
) -> None:
    import torch

    params = SamplingParams(temperature=temperature, repetition_penalty=3.0, top_k=2, seed=1, logprobs=num_best)
    sampled = Sampler(params, (2,), VOCAB).choose(logits)
    expected = torch.tensor(logits).double().log_softmax(-1).numpy()
    assert sampled.logprob == pytest.approx(expected[sampled.token_id])
    assert len(sampled.top_logprobs) == min(num_best, VOCAB)
    assert [value for _, value in sampled.top_logprobs] == pytest.approx(np.sort(expected)[::-1][:num_best])
    assert all(expected[token_id] == pytest.approx(value) for token_id, value in sampled.top_logprobs)


def test_log_probabilities_are_omitted_unless_requested() -> None:
    sampled = Sampler(SamplingParams(seed=1), (), VOCAB).choose(np.zeros(VOCAB, dtype=np.float32))
    assert (sampled.logprob, sampled.top_logprobs) == (None, ())


def evens_or_odds(generated_ids: Sequence[int]) -> Any:
    """A token mask shorter than the vocabulary: ids beyond its end are not allowed either."""
    return np.arange(VOCAB - 3) % 2 == len(generated_ids) % 2


@given(logit_rows, st.floats(0, 2), st.floats(-2, 2), st.integers(1, VOCAB) | st.none(), fractions)
def test_only_tokens_that_the_mask_allows_are_sampled(
    logits: np.ndarray, temperature: float, penalty: float, top_k: int | None, top_p: float
) -> None:
    params = SamplingParams(
        temperature=temperature, presence_penalty=penalty, top_k=top_k, top_p=top_p, seed=1, logprobs=20
    )
    sampler = Sampler(params, (), VOCAB, evens_or_odds)
    for n in range(6):
        sampled = sampler.choose(logits)
        allowed = {token_id for token_id in range(VOCAB - 3) if token_id % 2 == n % 2}
        assert sampled.token_id in allowed
        assert {token_id for token_id, _ in sampled.top_logprobs} == allowed


def test_a_token_mask_that_allows_nothing_is_an_error() -> None:
    sampler = Sampler(SamplingParams(seed=1), (), VOCAB, lambda generated_ids: np.zeros(VOCAB, dtype=bool))
    with pytest.raises(ValueError, match="token_mask allows no token"):
        sampler.choose(np.zeros(VOCAB, dtype=np.float32))


def test_choose_does_not_modify_the_logits() -> None:
    logits = np.linspace(-1, 1, VOCAB, dtype=np.float32)
    params = SamplingParams(temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3, presence_penalty=1.0, seed=1)
    sampler = Sampler(params, (1, 2), VOCAB, evens_or_odds)
    for _ in range(3):
        sampler.choose(logits)
    np.testing.assert_array_equal(logits, np.linspace(-1, 1, VOCAB, dtype=np.float32))


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        sampler = Sampler(SamplingParams(temperature=1.0, seed=seed), (), 1000)
        return [sampler.choose(np.zeros(1000, dtype=np.float32)).token_id for _ in range(8)]

    assert draw(7) == draw(7)
    assert draw(7) != draw(8)
    assert draw(-1) != draw(1)


@pytest.mark.parametrize("bad", [[np.nan], [np.inf], [-np.inf], [np.inf, -np.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_raise(bad: list[float], temperature: float) -> None:
    logits = np.zeros(VOCAB, dtype=np.float32)
    logits[: len(bad)] = bad
    with pytest.raises(FloatingPointError):
        choose(logits, temperature=temperature)
