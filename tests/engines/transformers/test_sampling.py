"""Tokens are sampled from the distribution of Hugging Face's own processors, independently in each row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatstream.engines.text.codec import SampledToken
from chatstream.engines.transformers.sampling import TOP_P_CANDIDATES, Sampler, sample
from chatstream.types import SamplingParams, TokenMask

PROMPT = (3, 5, 5, 9)
VOCAB = 40


def sampler_at(uniform: float, params: SamplingParams, generated: Sequence[int] = ()) -> Sampler:
    """A sampler with a given uniform number and given earlier tokens."""
    one = Sampler(replace(params, seed=0), PROMPT)
    for token_id in generated:
        one.add_token(token_id)
    one.uniform = uniform
    return one


def some_logits(vocab_size: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(11)) * scale  # (vocab_size,), float32


def sampler(seed: int = 1, token_mask: TokenMask | None = None, **params: Any) -> Sampler:
    return Sampler(SamplingParams(seed=seed, **params), PROMPT, token_mask)


def probabilities(logits: torch.Tensor, params: SamplingParams, generated: Sequence[int] = ()) -> torch.Tensor:
    """(vocab_size,): the distribution of `generate`, with OpenAI's penalties after the repetition penalty."""
    ids, scores = torch.tensor([[*PROMPT, *generated]]), logits[None].clone()
    if params.repetition_penalty != 1.0:
        scores = RepetitionPenaltyLogitsProcessor(params.repetition_penalty)(ids, scores)
    for token_id in generated:
        scores[0, token_id] -= params.frequency_penalty
    for token_id in set(generated):
        scores[0, token_id] -= params.presence_penalty
    steps = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k is not None:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p > 0.0:
        steps.append(MinPLogitsWarper(params.min_p))
    return steps(ids, scores)[0].softmax(-1)  # type: ignore[arg-type]


def tokens_of(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """The tokens of `sample`, without which the test fails."""
    return [token_of(result) for result in sample(logits, samplers)]


def token_of(result: object) -> int:
    assert isinstance(result, SampledToken)
    return result.token_id


def frequencies(
    logits: torch.Tensor, params: SamplingParams, num_draws: int, generated: Sequence[int] = ()
) -> torch.Tensor:
    """(vocab_size,): frequency of each token over evenly spaced uniform numbers, all rows in one batch."""
    draws = [(n + 0.5) / num_draws for n in range(num_draws)]
    samplers = [sampler_at(draw, params, generated) for draw in draws]
    tokens = tokens_of(logits.expand(num_draws, -1), samplers)
    return torch.bincount(torch.tensor(tokens), minlength=logits.shape[0]) / num_draws


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.4),
        SamplingParams(temperature=1.8),
        SamplingParams(top_k=1),
        SamplingParams(top_k=7),
        SamplingParams(top_k=10_000),
        SamplingParams(top_p=0.3),
        SamplingParams(top_p=0.9),
        SamplingParams(top_k=12, top_p=0.8, temperature=0.7),
        SamplingParams(repetition_penalty=1.9),
        SamplingParams(repetition_penalty=0.6, top_k=5),
        SamplingParams(min_p=0.02),
        SamplingParams(min_p=1.0),
        SamplingParams(min_p=0.1, temperature=1.8),
        SamplingParams(min_p=0.1, top_k=20, top_p=0.97),
        SamplingParams(min_p=0.01, top_k=5),
        SamplingParams(min_p=0.3, top_p=0.99),
    ],
    ids=repr,
)
def test_the_distribution_is_that_of_hugging_face(params: SamplingParams) -> None:
    expected = probabilities(some_logits(), params)
    actual = frequencies(some_logits(), params, num_draws=2000)
    # Evenly spaced numbers hit an interval in proportion to its length, except for one at each end.
    assert (actual - expected).abs().max() <= 1.01 / 2000
    assert not actual[expected == 0].any(), "a token that was filtered out was chosen"


@given(
    params=st.builds(
        SamplingParams,
        temperature=st.sampled_from([0.3, 1.0, 1.7]),
        top_k=st.sampled_from([None, 3, 17]),
        top_p=st.sampled_from([1.0, 0.41, 0.93]),
        min_p=st.sampled_from([0.0, 0.013, 0.21]),
        repetition_penalty=st.sampled_from([1.0, 0.7, 1.6]),
        frequency_penalty=st.sampled_from([0.0, 0.3, 2.0, -0.4]),
        presence_penalty=st.sampled_from([0.0, 1.1, -2.0]),
    ),
    generated=st.lists(st.integers(0, VOCAB - 1), max_size=12),
    seed=st.integers(0, 99),
)
def test_any_parameters_together_give_the_distribution_of_hugging_face(
    params: SamplingParams, generated: list[int], seed: int
) -> None:
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed)) * 2
    expected = probabilities(logits, params, generated)
    actual = frequencies(logits, params, 200, generated)
    assert (actual - expected).abs().max() <= 1.01 / 200
    assert not actual[expected == 0].any()


@pytest.mark.parametrize("top_p", [0.5, 0.99])
def test_top_p_reaches_beyond_the_first_candidates(top_p: float) -> None:
    logits = some_logits(vocab_size=4 * TOP_P_CANDIDATES, scale=0.1)
    params = SamplingParams(top_p=top_p)
    expected = probabilities(logits, params)
    assert (expected > 0).sum() > TOP_P_CANDIDATES
    actual = frequencies(logits, params, num_draws=1000)
    assert not actual[expected == 0].any()
    assert (actual > 0).sum() == 1000, "evenly spaced numbers over a flat distribution are all different tokens"


def test_min_p_ends_the_search_that_top_p_alone_would_continue() -> None:
    logits = torch.zeros(4 * TOP_P_CANDIDATES)
    logits[:3] = 5.0
    actual = frequencies(logits, SamplingParams(top_p=0.9999, min_p=0.5), num_draws=300)
    assert torch.equal(actual.nonzero()[:, 0], torch.tensor([0, 1, 2]))


def test_temperature_0_takes_the_likeliest_token() -> None:
    logits = some_logits()
    assert tokens_of(logits[None], [sampler_at(0.999, SamplingParams(temperature=0))]) == [int(logits.argmax())]


def test_a_temperature_near_0_is_greedy_and_does_not_overflow() -> None:
    logits = some_logits(scale=50.0)
    params = SamplingParams(temperature=1e-300)
    assert tokens_of(logits[None], [sampler_at(0.999, params)]) == [int(logits.argmax())]


def test_top_p_keeps_the_likeliest_token_however_small_it_is() -> None:
    params = SamplingParams(top_p=1e-9)
    assert tokens_of(some_logits()[None], [sampler_at(0.999, params)]) == [int(some_logits().argmax())]


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    tokens = [
        tokens_of(logits[None], [sampler_at(draw, SamplingParams(top_p=0.6))])[0] for draw in (0.0, 0.6, 0.7, 0.999)
    ]
    assert tokens == [0, 0, 1, 1]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.5)], ids=repr)
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_give_allowed_tokens(params: SamplingParams, draw: float) -> None:
    (token,) = tokens_of(some_logits()[None], [sampler_at(draw, params)])
    assert probabilities(some_logits(), params)[token] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_sampled_in_float32(dtype: torch.dtype) -> None:
    logits = some_logits().to(dtype)
    params = SamplingParams(top_k=10, top_p=0.9, temperature=0.8, repetition_penalty=1.3)
    assert torch.equal(frequencies(logits, params, 3000), frequencies(logits.float(), params, 3000))


def alternate_parity(generated_ids: Sequence[int]) -> Any:
    """A mask that changes with every token."""
    return np.arange(VOCAB) % 2 == len(generated_ids) % 2


MIXED: tuple[dict[str, Any], ...] = (
    {"temperature": 0},
    {},
    {"top_k": 3},
    {"top_p": 0.7},
    {"top_k": 30, "top_p": 0.5, "repetition_penalty": 1.5},
    {"repetition_penalty": 2.0, "temperature": 1.5},
    {"min_p": 0.1, "logprobs": 3},
    {"min_p": 0.02, "top_p": 0.9, "presence_penalty": 1.5},
    {"frequency_penalty": 0.7, "repetition_penalty": 1.2, "logprobs": 20},
    {"presence_penalty": -1.0, "temperature": 0, "logprobs": 0},
    {"token_mask": alternate_parity, "top_k": 8, "logprobs": 5},
    {"token_mask": alternate_parity, "temperature": 0, "frequency_penalty": 0.4},
)


def test_the_token_of_a_row_does_not_depend_on_other_rows() -> None:
    logits = torch.stack([some_logits().roll(n) for n in range(len(MIXED))])
    batched = [sampler(seed, **params) for seed, params in enumerate(MIXED)]
    alone = [sampler(seed, **params) for seed, params in enumerate(MIXED)]
    for _ in range(20):
        results = sample(logits, batched)
        assert results == [sample(logits[row : row + 1], [alone[row]])[0] for row in range(len(MIXED))]


@pytest.mark.parametrize("neighbour", [{"top_k": 2000}, {"top_k": 60}, {"top_p": 0.999}, {"top_p": 0.2}, {}])
@pytest.mark.parametrize("params", [{"top_k": 50}, {"top_k": 50, "top_p": 0.9}, {"top_p": 0.5, "temperature": 0.1}])
def test_the_token_of_a_row_with_equal_logits_does_not_depend_on_other_rows(
    params: dict[str, Any], neighbour: dict[str, Any]
) -> None:
    """Equal logits are frequent in half precision; their order depends on the number of candidates."""
    vocab_size = 8 * TOP_P_CANDIDATES
    logits = torch.stack([some_logits(vocab_size).roll(row) for row in range(2)]).bfloat16()
    for seed in range(20):
        (alone,) = sample(logits[:1], [sampler(seed, **params)])
        assert sample(logits, [sampler(seed, **params), sampler(**neighbour)])[0] == alone


@given(st.permutations(range(len(MIXED))), st.integers(1, len(MIXED)))
def test_the_token_of_a_row_does_not_depend_on_the_order_or_number_of_rows(order: list[int], count: int) -> None:
    rows = order[:count]
    logits = torch.stack([some_logits().roll(row) for row in rows])
    for results in (
        sample(logits, [sampler(row, **MIXED[row]) for row in rows]),
        sample(logits.flip(0), [sampler(row, **MIXED[row]) for row in reversed(rows)])[::-1],
    ):
        assert results == [sample(some_logits().roll(row)[None], [sampler(row, **MIXED[row])])[0] for row in rows]


def test_a_seed_repeats_its_tokens_and_seeds_differ() -> None:
    def tokens(seed: int) -> list[object]:
        one = sampler(seed)
        return [sample(some_logits()[None], [one])[0] for _ in range(30)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(1) != tokens(-1)


@pytest.mark.parametrize("params", MIXED, ids=", ".join)
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(poison: float, params: dict[str, Any]) -> None:
    logits = torch.stack([some_logits()] * 3)
    good = sample(logits, [sampler(n, **params) for n in range(3)])
    logits[1, 16:18] = poison
    first, failed, last = sample(logits, [sampler(n, **params) for n in range(3)])
    assert [first, last] == [good[0], good[2]]
    assert isinstance(failed, ArithmeticError)


def test_a_row_of_forbidden_tokens_only_fails() -> None:
    (failed,) = sample(torch.full((1, VOCAB), -torch.inf), [sampler()])
    assert isinstance(failed, ArithmeticError)


def test_a_forbidden_token_is_never_sampled() -> None:
    logits = some_logits()
    logits[::2] = -torch.inf
    assert not frequencies(logits, SamplingParams(temperature=2.0), 500)[::2].any()


def test_a_sampled_token_is_penalised_in_later_steps() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0, 0.0]])
    one = Sampler(SamplingParams(temperature=0, repetition_penalty=1.5, seed=1), (3,))
    assert [tokens_of(logits, [one])[0] for _ in range(2)] == [0, 1]


def test_a_penalty_on_a_token_without_a_logit_changes_nothing() -> None:
    """Some models have embeddings for more tokens than logits."""
    one = Sampler(SamplingParams(temperature=0, repetition_penalty=9.0, seed=1), (3, VOCAB + 1))
    assert tokens_of(some_logits()[None], [one]) == [int(some_logits().argmax())]


def test_the_penalties_of_openai_apply_to_the_answer_and_not_to_the_prompt() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, PROMPT[0]] = 1.0
    one = sampler(temperature=0, frequency_penalty=0.6, presence_penalty=0.3)
    logits[0, 7] = 0.05
    # 1.0, then 1.0 - 0.9, then 1.0 - 1.5 against 0.05
    assert [tokens_of(logits, [one])[0] for _ in range(3)] == [PROMPT[0], PROMPT[0], 7]


def test_sampling_does_not_change_the_logits() -> None:
    logits = torch.stack([some_logits()] * len(MIXED))
    sample(logits, [sampler(n, **params) for n, params in enumerate(MIXED)])
    assert torch.equal(logits, torch.stack([some_logits()] * len(MIXED)))


# --- log probabilities ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "params", [{"temperature": 0.0}, {"temperature": 1.9}, {"top_k": 2, "repetition_penalty": 4.0}]
)
@pytest.mark.parametrize("num_best", [0, 1, 20])
def test_log_probabilities_are_the_models_own_before_penalties_and_filters(
    params: dict[str, Any], num_best: int
) -> None:
    expected = some_logits().double().log_softmax(-1)
    results = sample(some_logits().expand(20, -1), [sampler(n, logprobs=num_best, **params) for n in range(20)])
    for result in results:
        assert isinstance(result, SampledToken)
        assert result.logprob == pytest.approx(expected[result.token_id].item(), abs=1e-5)
        values, ids = expected.topk(num_best)
        assert [token_id for token_id, _ in result.top_logprobs] == ids.tolist()
        assert [logprob for _, logprob in result.top_logprobs] == pytest.approx(values.tolist(), abs=1e-5)


def test_only_rows_that_request_log_probabilities_get_them() -> None:
    with_logprobs, without = sample(some_logits().expand(2, -1), [sampler(logprobs=2), sampler()])
    assert isinstance(with_logprobs, SampledToken)
    assert isinstance(without, SampledToken)
    assert (with_logprobs.token_id, len(with_logprobs.top_logprobs)) == (without.token_id, 2)
    assert (without.logprob, without.top_logprobs) == (None, ())


def test_alternatives_are_at_most_the_allowed_tokens() -> None:
    logits = torch.full((2, 5), -torch.inf)
    logits[:, :2] = 0.0
    (forbidden, few) = sample(logits, [sampler(logprobs=4, temperature=0), sampler(logprobs=20)])
    for result in (forbidden, few):
        assert isinstance(result, SampledToken)
        assert dict(result.top_logprobs) == pytest.approx({0: -0.6931472, 1: -0.6931472})


# --- token mask -----------------------------------------------------------------------------------------------------


def only(*token_ids: int, size: int = VOCAB) -> Callable[[Sequence[int]], Any]:
    return lambda generated_ids: np.isin(np.arange(size), token_ids)


@pytest.mark.parametrize("params", [params for params in MIXED if "token_mask" not in params], ids=", ".join)
def test_only_tokens_that_the_mask_allows_are_sampled(params: dict[str, Any]) -> None:
    samplers = [sampler(seed, token_mask=only(2, 11, 30), **params) for seed in range(40)]
    assert {*tokens_of(some_logits().expand(40, -1), samplers)} <= {2, 11, 30}


def test_no_penalty_allows_a_token_that_the_mask_forbids() -> None:
    one = sampler(temperature=0, presence_penalty=-2.0, repetition_penalty=0.1, token_mask=only(2))
    assert [tokens_of(some_logits()[None], [one])[0] for _ in range(3)] == [2, 2, 2]


def test_the_token_mask_is_called_before_each_token_with_the_generated_tokens() -> None:
    calls = []

    def mask(generated_ids: Sequence[int]) -> Any:
        calls.append(tuple(generated_ids))
        return None if len(generated_ids) == 1 else only(4 + len(generated_ids))(generated_ids)

    one = sampler(temperature=0, token_mask=mask)
    tokens = [tokens_of(some_logits()[None], [one])[0] for _ in range(3)]
    assert tokens == [4, int(some_logits().argmax()), 6]
    assert calls == [(), (4,), (4, tokens[1])]


def test_log_probabilities_are_among_allowed_tokens() -> None:
    (result,) = sample(torch.zeros(1, VOCAB), [sampler(logprobs=20, token_mask=only(2, 3, 5, 8))])
    assert isinstance(result, SampledToken)
    assert dict(result.top_logprobs) == pytest.approx(dict.fromkeys((2, 3, 5, 8), -1.3862944))


def test_tokens_beyond_the_end_of_the_mask_are_forbidden() -> None:
    samplers = [sampler(seed, temperature=2.0, token_mask=lambda _: np.ones(6, dtype=bool)) for seed in range(40)]
    assert {*tokens_of(torch.zeros(40, VOCAB), samplers)} == {*range(6)}


class Panic(BaseException):
    """The kind of exception that an extension in Rust raises."""


def panics(generated_ids: Sequence[int]) -> Any:
    raise Panic("lost the grammar")


@pytest.mark.parametrize(
    ("mask", "reason"),
    [
        (panics, "lost the grammar"),
        (only(), "allows no token"),
        (only(VOCAB - 1, size=VOCAB + 1), f"at most {VOCAB} bools"),
        (lambda _: np.ones(VOCAB), "at most"),
        (lambda _: np.ones((1, VOCAB), dtype=bool), "at most"),
        (lambda _: [True] * VOCAB, "numpy array"),
        (lambda _: 5, "numpy array"),
    ],
)
@pytest.mark.parametrize("params", [{}, {"top_k": 4, "logprobs": 1}])
def test_a_failed_token_mask_fails_its_row_alone(mask: TokenMask, reason: str, params: dict[str, Any]) -> None:
    logits = some_logits().expand(3, -1)
    good = sample(logits, [sampler(n, **params) for n in range(3)])
    first, failed, last = sample(logits, [sampler(n, token_mask=mask if n == 1 else None, **params) for n in range(3)])
    assert [first, last] == [good[0], good[2]]
    assert isinstance(failed, ValueError)
    assert "token_mask" in str(failed)
    assert reason in str(failed)
