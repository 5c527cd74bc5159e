"""Tokens are drawn from the distribution that Hugging Face's own processors give, each row for itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from chatstream.engines.model import NextToken
from chatstream.engines.transformers.sampling import TOP_P_CANDIDATES, Sampler, sample
from chatstream.types import SamplingParams

PROMPT = (3, 5, 5, 9)
VOCAB = 40
CPU = torch.device("cpu")


class FixedDraws(Sampler):
    """A sampler whose uniform numbers are given."""

    def __init__(self, params: SamplingParams, draws: Sequence[float], vocab_size: int = VOCAB) -> None:
        super().__init__(replace(params, seed=0), PROMPT, vocab_size, CPU)
        self._draws = list(draws)

    def draw(self) -> float:
        return self._draws.pop(0)


def some_logits(vocab_size: int = VOCAB, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(vocab_size, generator=torch.Generator().manual_seed(11)) * scale  # (vocab_size,), float32


def sampler(seed: int = 1, vocab_size: int = VOCAB, **params: float) -> Sampler:
    return Sampler(SamplingParams(seed=seed, **params), PROMPT, vocab_size, CPU)  # type: ignore[arg-type]


def probabilities(logits: torch.Tensor, params: SamplingParams) -> torch.Tensor:
    """(vocab_size,): what `generate` would sample from."""
    steps = LogitsProcessorList()
    if params.repetition_penalty != 1.0:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k is not None:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1.0:
        steps.append(TopPLogitsWarper(params.top_p))
    return steps(torch.tensor([PROMPT]), logits[None].clone())[0].softmax(-1)


def tokens_of(logits: torch.Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """What `sample` chose; fails where it failed."""
    return [token_of(result) for result in sample(logits, samplers)]


def token_of(result: object) -> int:
    assert isinstance(result, NextToken)
    return result.token_id


def frequencies(logits: torch.Tensor, params: SamplingParams, num_draws: int) -> torch.Tensor:
    """(vocab_size,): how often each token comes for evenly spaced uniform numbers, all rows in one batch."""
    draws = [(n + 0.5) / num_draws for n in range(num_draws)]
    samplers = [FixedDraws(params, [draw], logits.shape[0]) for draw in draws]
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
    ],
    ids=repr,
)
def test_the_distribution_is_that_of_hugging_face(params: SamplingParams) -> None:
    wanted = probabilities(some_logits(), params)
    got = frequencies(some_logits(), params, num_draws=2000)
    # Evenly spaced numbers hit an interval as often as its length says, but for one at each end.
    assert (got - wanted).abs().max() <= 1.01 / 2000
    assert not got[wanted == 0].any(), "a token that was filtered out was chosen"


@pytest.mark.parametrize("top_p", [0.5, 0.99])
def test_top_p_reaches_beyond_the_tokens_looked_at_first(top_p: float) -> None:
    logits = some_logits(vocab_size=4 * TOP_P_CANDIDATES, scale=0.1)
    params = SamplingParams(top_p=top_p)
    wanted = probabilities(logits, params)
    assert (wanted > 0).sum() > TOP_P_CANDIDATES
    got = frequencies(logits, params, num_draws=1000)
    assert not got[wanted == 0].any()
    assert (got > 0).sum() == 1000, "evenly spaced numbers over a flat distribution are all different tokens"


def test_temperature_0_takes_the_likeliest_and_draws_nothing() -> None:
    logits = some_logits()
    assert tokens_of(logits[None], [FixedDraws(SamplingParams(temperature=0), draws=[])]) == [int(logits.argmax())]


def test_a_temperature_near_0_is_greedy_and_does_not_overflow() -> None:
    logits = some_logits(scale=50.0)
    params = SamplingParams(temperature=1e-300)
    assert tokens_of(logits[None], [FixedDraws(params, [0.999])]) == [int(logits.argmax())]


def test_top_p_keeps_the_likeliest_token_however_small_it_is() -> None:
    params = SamplingParams(top_p=1e-9)
    assert tokens_of(some_logits()[None], [FixedDraws(params, [0.999])]) == [int(some_logits().argmax())]


def test_top_p_keeps_the_token_that_crosses_it() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2]).log()
    tokens = [
        tokens_of(logits[None], [FixedDraws(SamplingParams(top_p=0.6), [draw], 10)])[0]
        for draw in (0.0, 0.6, 0.7, 0.999)
    ]
    assert tokens == [0, 0, 1, 1]


@pytest.mark.parametrize("params", [SamplingParams(), SamplingParams(top_k=5), SamplingParams(top_p=0.5)], ids=repr)
@pytest.mark.parametrize("draw", [0.0, 1 - 2**-53])
def test_the_ends_of_the_unit_interval_are_tokens_that_may_be_chosen(params: SamplingParams, draw: float) -> None:
    (token,) = tokens_of(some_logits()[None], [FixedDraws(params, [draw])])
    assert probabilities(some_logits(), params)[token] > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_computed_with_in_float32(dtype: torch.dtype) -> None:
    logits = some_logits().to(dtype)
    params = SamplingParams(top_k=10, top_p=0.9, temperature=0.8, repetition_penalty=1.3)
    assert torch.equal(frequencies(logits, params, 3000), frequencies(logits.float(), params, 3000))


def test_what_a_row_draws_does_not_depend_on_its_neighbours() -> None:
    mixed: list[dict[str, float]] = [
        {"temperature": 0},
        {},
        {"top_k": 3},
        {"top_p": 0.7},
        {"top_k": 30, "top_p": 0.5, "repetition_penalty": 1.5},
        {"repetition_penalty": 2.0, "temperature": 1.5},
    ]
    logits = torch.stack([some_logits().roll(n) for n in range(len(mixed))])
    together = [sampler(seed, **params) for seed, params in enumerate(mixed)]
    alone = [sampler(seed, **params) for seed, params in enumerate(mixed)]
    for _ in range(20):
        tokens = sample(logits, together)
        assert tokens == [sample(logits[row : row + 1], [alone[row]])[0] for row in range(len(mixed))]


def test_the_same_seed_draws_the_same_tokens_and_another_seed_others() -> None:
    def tokens(seed: int) -> list[object]:
        one = sampler(seed)
        return [sample(some_logits()[None], [one])[0] for _ in range(30)]

    assert tokens(7) == tokens(7)
    assert tokens(7) != tokens(8)
    assert tokens(1) != tokens(-1)


@pytest.mark.parametrize("params", [{"temperature": 0.0}, {}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 2}])
@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_fails_alone(poison: float, params: dict[str, float]) -> None:
    logits = torch.stack([some_logits()] * 3)
    good = sample(logits, [sampler(n, **params) for n in range(3)])
    logits[1, 17] = poison
    first, failed, last = sample(logits, [sampler(n, **params) for n in range(3)])
    assert [first, last] == [good[0], good[2]]
    assert isinstance(failed, ArithmeticError)


def test_a_row_of_nothing_but_forbidden_tokens_fails() -> None:
    (failed,) = sample(torch.full((1, VOCAB), -torch.inf), [sampler()])
    assert isinstance(failed, ArithmeticError)


def test_a_forbidden_token_is_never_chosen() -> None:
    logits = some_logits()
    logits[::2] = -torch.inf
    assert not frequencies(logits, SamplingParams(temperature=2.0), 500)[::2].any()


def test_a_chosen_token_is_penalised_from_then_on() -> None:
    logits = torch.tensor([[2.0, 1.9, 0.0, 0.0]])
    one = Sampler(SamplingParams(temperature=0, repetition_penalty=1.5, seed=1), (3,), 4, CPU)
    assert [tokens_of(logits, [one])[0] for _ in range(2)] == [0, 1]
