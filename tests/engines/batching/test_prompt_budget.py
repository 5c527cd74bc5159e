"""Prompts advance in the steps of generating sequences, and the step time stays within its bound."""

from __future__ import annotations

import random
from collections.abc import Callable
from itertools import pairwise
from math import inf

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from chatstream.engines.batching.prompt_budget import (
    CROWD_GAP_FACTOR,
    FIRST_BUDGET,
    GAP_FACTOR,
    MIN_TOKENS,
    STALE_STEPS,
    TILE,
    PromptBudget,
)

MAX_TOKENS = 512
Machine = Callable[[int, int], float]
"""(number generating, prompt tokens) -> seconds of a step."""


def linear(a: float, b: float, c: float) -> Machine:
    return lambda n, p: a + b * n + c * p


def run(
    budget: PromptBudget, machine: Machine, num_steps: int, num_generating: int = 8, num_waiting: int = 1
) -> list[tuple[int, float]]:
    """Steps with an endless prompt: the prompt tokens and the time of each."""
    steps = []
    for _ in range(num_steps):
        tokens = budget.next_step_tokens(num_generating, num_waiting)
        step_s = machine(num_generating, tokens)
        budget.record_step(num_generating, tokens, step_s)
        steps.append((tokens, step_s))
    return steps


def test_the_budget_settles_after_a_plain_step_and_a_first_budget() -> None:
    steps = run(PromptBudget(MAX_TOKENS), linear(1.0, 0.0, 0.01), 4, num_generating=16)
    assert [tokens for tokens, _ in steps] == [0, FIRST_BUDGET, 88, 88]  # 0.9 * 1.0 s / 0.01 s, in whole tiles
    steps = run(PromptBudget(MAX_TOKENS), linear(1.9, 0.0, 0.01), 4, num_generating=16)
    assert [tokens for tokens, _ in steps] == [0, FIRST_BUDGET, 2 * FIRST_BUDGET, 168]
    steps = run(PromptBudget(MAX_TOKENS), linear(0.5, 0.0, 0.01), 4, num_generating=16)
    assert [tokens for tokens, _ in steps] == [0, FIRST_BUDGET, 44, 44]


def test_a_step_without_generating_sequences_is_full() -> None:
    budget = PromptBudget(MAX_TOKENS)
    assert budget.next_step_tokens(0) == MAX_TOKENS
    budget.record_step(0, MAX_TOKENS, 100.0)
    assert budget.next_step_tokens(8) == 0  # that step is no measurement for generating sequences


@given(
    a=st.floats(0.001, 1.0),
    b_share=st.floats(0.0, 1.0),
    c_share=st.floats(0.0, 10.0),
    num_generating=st.integers(1, 128),
    max_tokens=st.integers(1, 2000),
)
def test_with_linear_step_times_the_bound_holds_from_the_third_step(
    a: float, b_share: float, c_share: float, num_generating: int, max_tokens: int
) -> None:
    machine = linear(a, a * b_share, a * c_share)
    plain_s = machine(num_generating, 0)
    steps = run(PromptBudget(max_tokens), machine, 100, num_generating)
    for tokens, step_s in steps[2:]:
        assert step_s <= GAP_FACTOR * plain_s * 1.001 or tokens <= MIN_TOKENS
    assert all(tokens <= max_tokens for tokens, _ in steps)
    fitting = min((GAP_FACTOR - 1) * plain_s / max(a * c_share, 1e-9), max_tokens)
    assert steps[50][0] >= min(fitting, max_tokens) - TILE - 1, "and no smaller than necessary"


@given(num_generating=st.integers(1, 128), c=st.floats(0.0001, 0.1))
def test_prompt_and_decode_tokens_together_are_whole_tiles(num_generating: int, c: float) -> None:
    for tokens, _ in run(PromptBudget(MAX_TOKENS), linear(1.0, 0.0, c), 20, num_generating)[1:]:
        assert (tokens + num_generating) % TILE == 0


def test_a_small_budget_is_used_in_full() -> None:
    """Tiles of 16 used 8 of the 23 tokens that fit with 8 generating sequences: a prefill took three times as long."""
    assert run(PromptBudget(MAX_TOKENS), linear(1.0, 0.0, 0.9 / 23.5), 10)[-1][0] == 20


@given(max_tokens=st.integers(1, TILE - 1), num_generating=st.integers(1, 40))
def test_a_maximum_below_a_tile_holds_and_prompts_advance(max_tokens: int, num_generating: int) -> None:
    for tokens, _ in run(PromptBudget(max_tokens), linear(1.0, 0.0, 0.1), 10, num_generating)[1:]:
        assert 1 <= tokens <= max_tokens


@given(numbers=st.lists(st.integers(1, 64), min_size=2, max_size=40))
def test_a_prompt_advances_in_every_other_step_at_any_load(numbers: list[int]) -> None:
    machine, budget = linear(0.1, 0.002, 0.001), PromptBudget(MAX_TOKENS)
    tokens = [run(budget, machine, 1, num_generating)[0][0] for num_generating in numbers]
    assert all(one or other for one, other in pairwise(tokens))


def test_a_whole_prompt_at_once_breaks_the_bound() -> None:
    """The baseline: step times without a budget."""
    machine = linear(0.1, 0.001, 0.001)
    plain_s = machine(8, 0)
    whole = run(PromptBudget(1024, itl_target_s=inf), machine, 3)
    assert all(step_s > 10 * plain_s for _, step_s in whole)
    assert max(step_s for _, step_s in run(PromptBudget(1024), machine, 100)) <= GAP_FACTOR * plain_s


@pytest.mark.parametrize(
    ("num_generating", "num_waiting", "factor"),
    [(8, 1, GAP_FACTOR), (8, 8, GAP_FACTOR), (8, 16, 2.8), (1, 3, 3.7), (1, 31, CROWD_GAP_FACTOR)],
)
def test_the_bound_grows_with_the_ratio_of_waiting_to_generating(
    num_generating: int, num_waiting: int, factor: float
) -> None:
    budget, machine = PromptBudget(10_000), linear(1.0, 0.0, 0.001)
    tokens, step_s = run(budget, machine, 20, num_generating, num_waiting)[-1]
    assert tokens
    assert step_s == pytest.approx(factor, abs=TILE * 0.001)


def test_a_target_does_not_depend_on_the_waiting_sequences() -> None:
    budget = PromptBudget(MAX_TOKENS, itl_target_s=0.2)
    run(budget, linear(0.1, 0.0, 0.001), 20)
    assert budget.next_step_tokens(8, 100) == budget.next_step_tokens(8, 1)


# --- targets --------------------------------------------------------------------------------------------------------


@given(target_s=st.floats(0.11, 2.0), c=st.floats(0.00001, 0.01))
def test_a_target_is_used_in_full_and_not_exceeded(target_s: float, c: float) -> None:
    machine = linear(0.1, 0.0, c)
    steps = run(PromptBudget(MAX_TOKENS, itl_target_s=target_s), machine, 50)
    tokens, step_s = steps[-1] if steps[-1][0] else steps[-2]
    assert step_s <= target_s * 1.001 or tokens <= MIN_TOKENS
    assert step_s + c * (TILE + 1) >= target_s or tokens + TILE > MAX_TOKENS


def test_prompts_advance_when_a_plain_step_exceeds_the_target() -> None:
    steps = run(PromptBudget(MAX_TOKENS, itl_target_s=0.01), linear(0.1, 0.0, 0.001), 20, num_generating=16)
    assert [tokens for tokens, _ in steps[2:]] == [MIN_TOKENS] * 18


def test_a_target_of_inf_needs_no_measurement() -> None:
    assert PromptBudget(MAX_TOKENS, itl_target_s=inf).next_step_tokens(8) == MAX_TOKENS


# --- machines whose step times are not linear -----------------------------------------------------------------------


def test_a_stalled_step_changes_the_budget_little_and_briefly() -> None:
    machine = linear(0.1, 0.0, 0.001)
    budget = PromptBudget(MAX_TOKENS)
    usual = run(budget, machine, 20)[-1][0]
    budget.record_step(8, usual, 100 * machine(8, usual))
    steps = run(budget, machine, 12)
    assert steps[0][0] >= usual / 3
    assert steps[-1][0] >= usual - TILE
    budget.record_step(8, 0, 100 * machine(8, 0))
    assert run(budget, machine, 1)[0][0] <= 3 * usual


@pytest.mark.parametrize("stalled", [0, 1, 2])
def test_a_stall_in_one_of_the_first_steps_has_no_lasting_effect(stalled: int) -> None:
    machine = linear(0.1, 0.0, 0.001)
    budget = PromptBudget(MAX_TOKENS)
    expected = run(PromptBudget(MAX_TOKENS), machine, 20)[-1][0]
    steps_so_far = 0

    def stalling(n: int, p: int) -> float:
        nonlocal steps_so_far
        steps_so_far += 1
        return machine(n, p) * (100 if steps_so_far == stalled + 1 else 1)

    steps = run(budget, stalling, 20)
    assert steps[-1][0] == expected
    assert max(step_s for n, (_, step_s) in enumerate(steps) if n != stalled) <= GAP_FACTOR * machine(8, 0) * 1.001


@pytest.mark.parametrize("c", [0.0, 0.0003, 0.001, 0.005])
@pytest.mark.parametrize("seed", range(5))
def test_steps_that_vary_by_a_fifth_keep_the_bound_on_average_from_the_start(c: float, seed: int) -> None:
    rng = random.Random(seed)
    steps = run(PromptBudget(MAX_TOKENS), lambda n, p: (0.1 + c * p) * rng.uniform(0.9, 1.1), 300)
    mixed = [step_s for tokens, step_s in steps[2:] if tokens]
    assert sum(mixed) / len(mixed) <= 0.2
    assert sum(step_s > 0.25 for step_s in mixed) <= len(mixed) / 50


def test_chunks_shrink_as_attention_slows_towards_the_end_of_a_prompt() -> None:
    read = 0

    def machine(n: int, p: int) -> float:
        nonlocal read
        read = 0 if read > 30_000 else read + p  # one long prompt after another
        return 0.1 + 0.0005 * p * (1 + read / 3000)

    steps = run(PromptBudget(MAX_TOKENS), machine, 3000)
    assert sum(step_s > 2 * 0.1 for _, step_s in steps) <= len(steps) / 50
    sizes = {tokens for tokens, _ in steps if tokens}
    assert max(sizes) > 2 * min(sizes)


def test_the_fixed_cost_of_a_prefill_is_part_of_the_bound() -> None:
    steps = run(PromptBudget(MAX_TOKENS), lambda n, p: 0.1 + (0.03 + 0.0005 * p if p else 0.0), 50)
    assert all(step_s <= 0.191 for _, step_s in steps[10:])
    assert max(tokens for tokens, _ in steps[10:]) >= 64  # of 100


def test_short_last_chunks_do_not_shrink_the_budget() -> None:
    budget = PromptBudget(MAX_TOKENS)
    steps = []
    for n in range(200):
        tokens = min(budget.next_step_tokens(8), MAX_TOKENS if n % 2 else 3)
        step_s = 0.1 + (0.02 + 0.0005 * tokens if tokens else 0.0)
        budget.record_step(8, tokens, step_s)
        steps.append(tokens)
    assert max(steps[100:]) >= 64


# --- when a measurement expires -------------------------------------------------------------------------------------


def test_a_plain_step_is_measured_again_periodically() -> None:
    budget = PromptBudget(MAX_TOKENS)
    steps = run(budget, linear(0.1, 0.0, 0.001), 3 * STALE_STEPS)
    assert [n for n, (tokens, _) in enumerate(steps) if not tokens] == [0, STALE_STEPS + 1, 2 * STALE_STEPS + 2]


def test_the_budget_adapts_to_a_slower_machine() -> None:
    budget = PromptBudget(MAX_TOKENS)
    run(budget, linear(0.1, 0.0, 0.001), 50)
    slower = linear(0.3, 0.0, 0.003)
    steps = run(budget, slower, 4 * STALE_STEPS)
    assert abs(steps[-1][0] - run(PromptBudget(MAX_TOKENS), slower, 10)[-1][0]) <= TILE


@given(before=st.integers(1, 100), now=st.integers(1, 100))
def test_a_plain_step_is_measured_again_when_the_load_doubles_or_halves(before: int, now: int) -> None:
    assume(before != now)
    budget = PromptBudget(MAX_TOKENS)
    run(budget, linear(0.1, 0.0, 0.001), 2, num_generating=before)
    assert (budget.next_step_tokens(now) == 0) == (now > 2 * before or 2 * now < before)
