"""How a token is chosen from logits."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from chatstream.engines.demo.sampling import TokenChooser, drawn, likeliest, penalized
from chatstream.types import SamplingParams

VOCAB = 12

logit_rows = arrays(np.float32, VOCAB, elements=st.floats(-30, 30, width=32))
weight_rows = arrays(np.float64, VOCAB, elements=st.floats(0, 1)).filter(lambda weights: weights.sum() > 0)
fractions = st.floats(0, 1, exclude_min=True, exclude_max=True)


def choose(logits: np.ndarray, prompt_ids: tuple[int, ...] = (), **sampling: float | None) -> int:
    params = SamplingParams(**{"seed": 1, **sampling})  # type: ignore[arg-type]
    return TokenChooser(params, prompt_ids, len(logits)).choose(logits)


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
    assert list(likeliest(weights, None, top_p)) == [weights.argmax()]


@given(weight_rows, fractions)
def test_top_p_keeps_the_token_that_reaches_it_and_none_after(weights: np.ndarray, top_p: float) -> None:
    kept = likeliest(weights, None, top_p)
    mass = np.cumsum(weights[kept])
    goal = top_p * weights.sum()
    assert mass[-1] >= goal * (1 - 1e-12)
    assert len(kept) == 1 or mass[-2] < goal * (1 + 1e-12)
    assert weights[kept].min() >= np.delete(weights, kept).max(initial=0.0)


@given(weight_rows, st.integers(1, 2 * VOCAB))
def test_top_k_keeps_the_k_likeliest(weights: np.ndarray, top_k: int) -> None:
    kept = likeliest(weights, top_k, 1.0)
    assert len(kept) == min(top_k, VOCAB)
    assert weights[kept].min() >= np.delete(weights, kept).max(initial=0.0)


def test_top_p_is_a_part_of_what_top_k_left() -> None:
    weights = np.array([0.4, 0.3, 0.2, 0.1])
    assert list(likeliest(weights, 2, 0.6)) == [0, 1]  # 0.4 / 0.7 is below 0.6
    assert list(likeliest(weights, 2, 0.5)) == [0]


@given(weight_rows)
def test_no_limits_keep_everything(weights: np.ndarray) -> None:
    assert list(likeliest(weights, None, 1.0)) == list(range(VOCAB))


@given(weight_rows, st.floats(0, 1, exclude_max=True))
def test_what_has_no_weight_is_never_drawn(weights: np.ndarray, uniform: float) -> None:
    assert weights[drawn(weights, uniform)] > 0


def test_draws_follow_the_weights() -> None:
    weights = np.array([1.0, 0.0, 2.0, 1.0])
    assert [drawn(weights, uniform) for uniform in (0.0, 0.24, 0.26, 0.74, 0.76)] == [0, 0, 2, 2, 3]


@given(logit_rows, st.sets(st.integers(0, VOCAB - 1)), st.floats(0.25, 4, width=32))
def test_the_repetition_penalty_is_that_of_transformers(logits: np.ndarray, seen: set[int], penalty: float) -> None:
    import torch
    from transformers import RepetitionPenaltyLogitsProcessor

    is_seen = np.isin(np.arange(VOCAB), list(seen))
    ours = penalized(logits, is_seen, penalty)
    ids = torch.tensor([sorted(seen)], dtype=torch.long)
    theirs = RepetitionPenaltyLogitsProcessor(penalty)(ids, torch.tensor(logits[None].copy()))
    np.testing.assert_allclose(ours, theirs[0].numpy(), rtol=1e-6)


def test_the_repetition_penalty_counts_the_prompt_and_the_answer() -> None:
    logits = np.array([3.0, 2.9, 2.8, -1.0], dtype=np.float32)
    chooser = TokenChooser(SamplingParams(temperature=0.0, repetition_penalty=2.0, seed=1), (0,), 4)
    assert [chooser.choose(logits) for _ in range(3)] == [1, 2, 0]


def test_the_logits_are_left_as_they_are() -> None:
    logits = np.linspace(-1, 1, VOCAB, dtype=np.float32)
    choose(logits, (1, 2), temperature=0.7, top_k=5, top_p=0.9, repetition_penalty=1.3)
    np.testing.assert_array_equal(logits, np.linspace(-1, 1, VOCAB, dtype=np.float32))


def test_the_same_seed_draws_the_same_tokens() -> None:
    def draw(seed: int) -> list[int]:
        chooser = TokenChooser(SamplingParams(temperature=1.0, seed=seed), (), 1000)
        return [chooser.choose(np.zeros(1000, dtype=np.float32)) for _ in range(8)]

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
