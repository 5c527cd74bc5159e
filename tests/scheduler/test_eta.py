"""The expected start: the promises of the estimates, and their accuracy on a simulated queue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import count, pairwise
from math import exp, hypot, isfinite, sqrt
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.scheduler.eta import Eta, EtaEstimator, rounded, smoothed
from chatstream.scheduler.eta.lengths import NUM_DRAWS, LengthHistory, Lengths
from chatstream.scheduler.eta.pace import Prefill, TokenPace
from chatstream.scheduler.eta.patience import Patience
from chatstream.scheduler.eta.picture import simulate
from chatstream.scheduler.request import Arrival, LiveRequest
from chatstream.scheduler.states import State
from tests.scheduler.queue_simulation import Figures, SimulatedQueue, Wait, conv_jobs, figures

PACE_S = 0.1
"""Seconds per token, and …"""
PREFILL_S = 1.0
"""… until the first one, unless a test says otherwise."""
NUMBERS = count()


def waiting(*, admitted_s: float = 0.0, expires_s: float | None = None, **details: object) -> LiveRequest:
    seq = next(NUMBERS)
    return LiveRequest(Arrival(request_id=str(seq), **details), seq, admitted_s, expires_s)  # type: ignore[arg-type]


def running(tokens: int, now_s: float = 0.0, **details: object) -> LiveRequest:
    """A running request whose last token came at `now_s`."""
    request = waiting(**details)
    request.state, request.generated_tokens = State.RUNNING, tokens
    request.started_s, request.last_progress_s = now_s - PREFILL_S - (tokens - 1) * PACE_S, now_s
    return request


def serve(estimator: EtaEstimator, length: int, *, is_complete: bool = True, **details: object) -> None:
    """One generation from start to end, in time 0 to PREFILL_S + (length - 1) * PACE_S."""
    request = waiting(**details)
    estimator.on_started(request, 0.0)
    for tokens, at_s in ((1, PREFILL_S), (length - 1, PREFILL_S + (length - 1) * PACE_S)):
        if tokens > 0:
            estimator.on_tokens(request, tokens, at_s)
            request.generated_tokens, request.last_progress_s = request.generated_tokens + tokens, at_s
    estimator.on_ended(request, is_complete, request.last_progress_s)


def experienced(lengths: Sequence[int], **details: object) -> EtaEstimator:
    estimator = EtaEstimator()
    for length in lengths:
        serve(estimator, length, **details)
    return estimator


def p50s(estimator: EtaEstimator, positions: Sequence[int], now_s: float = 0.0) -> list[float]:
    etas = [estimator.at(position, now_s) for position in positions]
    assert None not in etas
    return [eta.p50_s for eta in etas if eta is not None]


# --- answers of equal length: the estimates are exact ----------------------------------------------------------------

SERVICE_S = PREFILL_S + 99 * PACE_S


def test_there_is_no_estimate_before_ten_generations_have_ended() -> None:
    estimator = experienced([100] * 9)
    assert estimator.at(1, 0.0) is None
    assert estimator.probability_by(1, 10.0, 0.0) is None
    serve(estimator, 100)
    assert estimator.is_stale(0.0)
    estimator.refresh([running(40)], [], 1, 0.0)
    assert estimator.at(1, 0.0) is not None


def test_the_first_starts_when_the_running_request_ends_and_the_others_follow() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40)], [waiting(), waiting()], 1, 0.0)
    assert p50s(estimator, [1, 2, 3]) == pytest.approx([6.0, 6.0 + SERVICE_S, 6.0 + 2 * SERVICE_S])


def test_slots_are_taken_in_the_order_in_which_they_become_free() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40), running(90)], [], 2, 0.0)
    assert p50s(estimator, [1, 2, 3, 4]) == pytest.approx([1.0, 6.0, 1.0 + SERVICE_S, 6.0 + SERVICE_S])


def test_the_eta_is_zero_if_and_only_if_a_slot_is_free() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(100)], [], 2, 0.0)
    assert estimator.at(1, 0.0) == Eta(0.0, 0.0)
    second = estimator.at(2, 0.0)
    assert second is not None
    assert 0 < second.p50_s <= second.p90_s


def test_with_more_running_than_slots_the_first_end_frees_no_slot() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40), running(90)], [], 1, 0.0)
    assert p50s(estimator, [1]) == pytest.approx([6.0])


def test_the_prefill_of_a_long_prompt_ahead_counts() -> None:
    estimator = EtaEstimator()
    for prompt_tokens in range(0, 3000, 100):
        request = waiting(prompt_tokens=prompt_tokens)
        estimator.on_started(request, 0.0)
        estimator.on_tokens(request, 1, 0.5 + prompt_tokens / 1000)
        request.generated_tokens = 1
        estimator.on_ended(request, True, 0.5 + prompt_tokens / 1000)
    assert estimator.prefill_s(2000) == pytest.approx(2.5)
    estimator.refresh([running(1)], [waiting(), waiting(prompt_tokens=4000), waiting()], 1, 0.0)
    assert p50s(estimator, [2, 3, 4]) == pytest.approx([0.5, 5.0, 5.5])


def test_max_new_tokens_shortens_the_expected_work() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40, max_new_tokens=50)], [waiting(max_new_tokens=11)], 1, 0.0)
    assert p50s(estimator, [1, 2]) == pytest.approx([1.0, 1.0 + PREFILL_S + 1.0])


def test_a_request_in_its_prefill_has_the_remaining_prefill_ahead() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([waiting()], [], 1, 0.4)  # started at 0
    assert p50s(estimator, [1], 0.4) == pytest.approx([SERVICE_S - 0.4])


@pytest.mark.parametrize("state", [State.ABORTING, State.PREEMPTING])
def test_a_request_that_is_released_frees_its_slot_at_once(state: State) -> None:
    estimator = experienced([100] * 50)
    released = running(10)
    released.state = state
    estimator.refresh([released], [waiting()], 1, 0.0)
    assert p50s(estimator, [1, 2]) == pytest.approx([0.1, SERVICE_S])


def test_a_preempted_request_needs_only_its_remaining_tokens() -> None:
    estimator = experienced([100] * 50)
    preempted = waiting()
    preempted.generated_tokens = 70
    estimator.refresh([running(90)], [preempted], 1, 0.0)
    assert p50s(estimator, [1, 2]) == pytest.approx([1.0, 4.0])


def test_a_request_that_expires_before_its_start_takes_no_slot() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40)], [waiting(expires_s=5.0), waiting(expires_s=100.0)], 1, 0.0)
    assert p50s(estimator, [1, 2, 3]) == pytest.approx([6.0, 6.0, 6.0 + SERVICE_S])


def test_an_estimate_ages_between_refreshes() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40)], [waiting()], 1, 0.0)
    assert p50s(estimator, [1, 2], now_s=0.4) == pytest.approx([5.6, 5.6 + SERVICE_S])


def test_a_start_moves_all_positions_before_the_next_refresh() -> None:
    estimator = experienced([100] * 50)
    queue = [waiting(), waiting()]
    estimator.refresh([running(100)], queue, 1, 0.0)
    second_s = p50s(estimator, [2])
    estimator.on_started(queue[0], 0.0)
    assert p50s(estimator, [1]) == second_s


def test_a_refresh_is_due_twice_a_second_or_after_many_changes() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40)] * 4, [], 4, 10.0)
    assert not estimator.is_stale(10.49)
    assert estimator.is_stale(10.5)
    for _ in range(5):
        estimator.on_abandoned(waiting(admitted_s=10.0), 10.0)
    assert not estimator.is_stale(10.05)
    assert estimator.is_stale(10.11)


def test_far_positions_follow_at_the_pace_of_the_queue() -> None:
    estimator = experienced([100] * 50)
    estimator.refresh([running(40)] * 4, (waiting() for _ in range(10_000)), 4, 0.0)
    assert p50s(estimator, [128, 129, 10_001]) == pytest.approx(
        [6.0 + 31 * SERVICE_S, 6.0 + 31.25 * SERVICE_S, 6.0 + 2499.25 * SERVICE_S], rel=1e-3
    )


def test_the_spread_of_a_far_position_is_that_of_the_work_ahead_over_the_slots() -> None:
    estimator = experienced([50, 150] * 500)
    estimator.refresh([running(40)] * 4, (waiting() for _ in range(10_000)), 4, 0.0)
    eta = estimator.at(128 + 3200, 0.0)
    assert eta is not None
    by_work_s = sqrt(3200) * 5.0 / 4  # each differs from the mean by 5 s
    by_history_s = eta.p50_s * (5.0 / 9.9) / sqrt(1000)  # standard error of the mean of 1,000
    assert eta.p90_s - eta.p50_s == pytest.approx(1.2816 * hypot(by_work_s, by_history_s), rel=0.05)


def test_clients_have_their_own_lengths_once_enough_are_known() -> None:
    estimator = EtaEstimator()
    for _ in range(40):
        serve(estimator, 20, client="short")
        serve(estimator, 200, client="long")
    unknown = [waiting() for _ in range(10)]
    estimator.refresh([running(1)], [waiting(client="short"), waiting(client="long"), *unknown], 1, 0.0)
    _, second_s, third_s, last_s = p50s(estimator, [1, 2, 3, 13])
    assert third_s - second_s > 15.0
    assert 9.0 < (last_s - third_s) / 10 < 15.0  # the overall distribution has both lengths


def test_disconnecting_clients_shorten_the_wait_most_for_far_positions() -> None:
    def last_s(num_left: int) -> list[float]:
        estimator = experienced([100] * 50)
        for i in range(100):
            request = waiting()
            if i < num_left:
                estimator.on_abandoned(request, 20.0)
            else:
                estimator.on_started(request, 20.0)
        estimator.refresh([running(40)], [waiting() for _ in range(8)], 1, 0.0)
        return p50s(estimator, [2, 9, 200])

    patient, impatient = last_s(0), last_s(50)
    # Half of the requests are cancelled after 20 s: the rate is 0.025 per second.
    assert impatient[0] == pytest.approx(6.0 + SERVICE_S * exp(-0.025 * 6.0), rel=0.05)
    assert impatient[1] / patient[1] < 0.6
    assert impatient[2] < 300.0 < 1500.0 < patient[2]


def test_expiry_at_a_known_time_does_not_count_as_impatience() -> None:
    estimator = experienced([100] * 50)
    for _ in range(100):
        estimator.on_abandoned(waiting(expires_s=20.0), 20.0)
    estimator.refresh([running(40)], [waiting()], 1, 0.0)
    assert p50s(estimator, [2]) == pytest.approx([6.0 + SERVICE_S])


# --- any numbers -----------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 5000), min_size=10, max_size=60),
    tokens=st.lists(st.integers(0, 9000), max_size=6),
    num_waiting=st.integers(0, 150),
    allowed=st.none() | st.integers(1, 3000),
    slots=st.integers(1, 6),
    factor_moves=st.lists(st.booleans(), max_size=60),
    passed_s=st.floats(0, 1e4),
)
def test_estimates_are_finite_ordered_and_grow_with_the_position(
    lengths: list[int],
    tokens: list[int],
    num_waiting: int,
    allowed: int | None,
    slots: int,
    factor_moves: list[bool],
    passed_s: float,
) -> None:
    estimator = experienced(lengths)
    for is_late in factor_moves:
        estimator.measure(Eta(10.0, 20.0), 30.0 if is_late else 15.0)
    queue = [waiting(max_new_tokens=allowed) for _ in range(num_waiting)]
    estimator.refresh([running(n, 50.0) if n else waiting() for n in tokens], queue, slots, 50.0)
    before = Eta(0.0, 0.0)
    for position in range(1, num_waiting + 40):
        eta = estimator.at(position, 50.0 + passed_s)
        assert eta is not None
        assert isfinite(eta.p90_s)
        assert before.p50_s <= eta.p50_s <= eta.p90_s
        assert (eta.p50_s == 0) == (position <= slots - len(tokens))
        before = eta
        sooner, later = (estimator.probability_by(position, s, 50.0) for s in (5.0, 50.0))
        assert sooner is not None
        assert later is not None
        assert 0 <= sooner <= later <= 1


def test_the_probability_of_a_start_agrees_with_the_quantiles() -> None:
    random = Random(1)
    estimator = experienced([random.randint(10, 400) for _ in range(200)])
    estimator.refresh([running(5), running(200)], [waiting() for _ in range(200)], 2, 0.0)
    for position in (1, 20, 128, 150, 2000):
        eta = estimator.at(position, 0.0)
        assert eta is not None
        assert estimator.probability_by(position, eta.p50_s, 0.0) == pytest.approx(0.5, abs=0.02)
        assert estimator.probability_by(position, eta.p90_s, 0.0) == pytest.approx(0.9, abs=0.03)
        assert estimator.probability_by(position, 0.0, eta.p50_s) == pytest.approx(0.5, abs=0.02)


def test_the_same_facts_give_the_same_estimates() -> None:
    def estimates() -> list[float]:
        estimator = experienced([(37 * i) % 300 + 1 for i in range(100)])
        first, *queue = [LiveRequest(Arrival(request_id=str(i)), i, 0.0) for i in range(30)]
        estimator.refresh([first], queue, 1, 0.0)
        return p50s(estimator, range(1, 40))

    assert estimates() == estimates()


# --- answer lengths --------------------------------------------------------------------------------------------------


def lengths_of(seen: Sequence[int], cut: Sequence[int] = ()) -> Lengths:
    lengths = Lengths(window=1000)
    for tokens in seen:
        lengths.add(tokens, is_cut=False)
    for tokens in cut:
        lengths.add(tokens, is_cut=True)
    return lengths


SOME_LENGTHS = st.lists(st.integers(1, 500), min_size=1, max_size=47)  # too few for a detected change


@given(seen=SOME_LENGTHS, done=st.integers(1, 499))
def test_the_remaining_length_is_that_of_the_longer_known_answers(seen: list[int], done: int) -> None:
    draws = lengths_of(seen).draws_beyond(done)
    longer = [tokens for tokens in seen if tokens > done]
    assert len(draws) == NUM_DRAWS
    assert all(a <= b + 1e-6 for a, b in pairwise(draws))
    assert draws[0] > done
    if longer:
        assert sum(draws) / NUM_DRAWS == pytest.approx(sum(longer) / len(longer))
        assert min(longer) - 1e-6 <= draws[0]
        assert draws[-1] <= max(longer) + 1e-6


@given(seen=SOME_LENGTHS)
def test_draws_have_the_mean_of_the_known_lengths(seen: list[int]) -> None:
    draws = lengths_of(seen).draws()
    assert sum(draws) / NUM_DRAWS == pytest.approx(sum(seen) / len(seen))


@given(seen=st.lists(st.integers(1, 50), max_size=20), cut=st.lists(st.integers(1, 50), min_size=1, max_size=20))
def test_cut_answers_count_as_in_the_kaplan_meier_estimator(seen: list[int], cut: list[int]) -> None:
    survival, mean = 1.0, 0.0
    for tokens in sorted({*seen, *cut}):
        at_risk = sum(n >= tokens for n in [*seen, *cut])
        left = survival * (1 - seen.count(tokens) / at_risk)
        mean += tokens * (survival - left)
        survival = left
    mean += max([*seen, *cut]) * survival  # the longest counts as complete
    assert lengths_of(seen, cut).mean() == pytest.approx(mean)


def test_beyond_the_longest_known_answer_a_tenth_is_left() -> None:
    lengths = lengths_of([*range(1, 101)])
    draws = lengths.draws_beyond(120)
    assert sum(draws) / NUM_DRAWS == pytest.approx(120 + 0.1 * 120)
    assert 120 < draws[0] < draws[-1] < 200


def test_a_change_of_lengths_is_detected_after_forty_answers_and_noise_is_not() -> None:
    random = Random(3)
    lengths = Lengths(window=1000)
    for _ in range(3000):
        lengths.add(round(random.lognormvariate(5, 0.8)), is_cut=False)
        lengths.drop_before_change()
    assert len(lengths) == 1000
    for _ in range(40):
        lengths.add(round(1.8 * random.lognormvariate(5, 0.8)), is_cut=False)
        lengths.drop_before_change()
    assert len(lengths) < 60


def test_equal_lengths_are_not_a_change() -> None:
    lengths = lengths_of([123] * 400)
    assert not lengths.drop_before_change()
    assert lengths.mean() == 123


def test_a_small_change_of_lengths_that_hardly_vary_is_detected() -> None:
    lengths = lengths_of([100 + n % 3 for n in range(200)])
    for n in range(40):
        lengths.add(120 + n % 3, is_cut=False)
        lengths.drop_before_change()
    assert len(lengths) < 60


def test_the_cost_of_a_prompt_token_is_the_median_slope() -> None:
    prefill = Prefill()
    for prompt_tokens, seconds in ((0, 0.0), (1, 0.0), (2, 0.0), (10, 10.0), (11, 20.0), (12, 3000.0)):
        prefill.add(prompt_tokens, seconds)
    assert prefill.seconds(100) - prefill.seconds(0) == pytest.approx(200.0)


def test_an_even_number_of_slopes_has_the_mean_of_the_middle_two_as_median() -> None:
    prefill = Prefill()
    for prompt_tokens, seconds in ((0, 0.0), (1, 0.0), (10, 10.0), (11, 30.0)):
        prefill.add(prompt_tokens, seconds)
    assert prefill.seconds(100) - prefill.seconds(0) == pytest.approx(200.0)


def test_patience_follows_recent_cancellations() -> None:
    patience = Patience()
    for n in range(1000):
        patience.add(2.0, is_cancelled=n % 2 == 0)
    assert patience.hazard() == pytest.approx(0.25, rel=0.02)
    for _ in range(400):
        patience.add(2.0, is_cancelled=True)
    assert patience.hazard() > 0.4


def test_an_overall_change_of_lengths_clears_the_clients() -> None:
    history = LengthHistory()
    for i in range(200):
        history.add("a" if i % 2 else "b", 100 + i % 7, is_cut=False)
    assert history.of("a") is not history.overall
    for i in range(30):
        history.add("c", 300 + i % 7, is_cut=False)
    history.drop_before_change()
    assert history.of("a") is history.overall
    assert history.of("a").mean() == pytest.approx(303, abs=1)


def test_a_cut_answer_counts_as_longer_and_a_cancelled_one_as_complete() -> None:
    def first_s(**details: object) -> float:
        estimator = experienced([100] * 25)
        for _ in range(20):
            serve(estimator, 50, **details)
        estimator.refresh([running(20)], [waiting()], 1, 0.0)
        return p50s(estimator, [2])[0] - p50s(estimator, [1])[0]

    assert first_s(max_new_tokens=50) == pytest.approx(SERVICE_S, rel=0.02)
    assert first_s(is_complete=False) < 0.9 * SERVICE_S


def test_memory_does_not_grow_with_the_clients() -> None:
    history = LengthHistory()
    for i in range(100_000):
        history.add(f"client-{i}", 10, is_cut=False)
    assert history.num_clients == LengthHistory.MAX_CLIENTS
    assert len(history.overall) == LengthHistory.WINDOW


# --- speed of the engine ---------------------------------------------------------------------------------------------


def test_the_pace_is_measured_for_a_number_of_running_requests_or_fitted() -> None:
    pace = TokenPace()
    assert pace.seconds_per_token(1) == 0.0
    pace.add(100, 2.0, 1)
    assert pace.seconds_per_token(4) == pytest.approx(0.02)
    pace.add(100, 4.0, 2)
    assert pace.seconds_per_token(2) == pytest.approx(0.04)
    assert pace.seconds_per_token(4) == pytest.approx(0.08)
    pace.add(100, 30.0, 4)
    assert pace.seconds_per_token(2) == pytest.approx(0.04), "a measured mean counts, not the fit"


def test_the_pace_follows_recent_tokens() -> None:
    pace = TokenPace()
    for pace_s in (0.02, 0.06):
        for _ in range(400):
            pace.add(50, 50 * pace_s, 4)
    assert pace.seconds_per_token(4) == pytest.approx(0.06, rel=0.03)


def test_the_pace_of_one_number_of_running_requests_is_kept_while_another_runs() -> None:
    pace = TokenPace()
    pace.add(100, 8.0, 4)
    for _ in range(1000):
        pace.add(50, 1.0, 1)
    assert pace.seconds_per_token(4) == pytest.approx(0.08)


@settings(max_examples=40)
@given(
    constant_s=st.floats(0, 2),
    per_token_s=st.floats(0, 0.01),
    prompts=st.lists(st.integers(0, 4000), min_size=20, max_size=100, unique=True),
)
def test_the_prefill_fit_tolerates_one_outlier_in_ten(
    constant_s: float, per_token_s: float, prompts: list[int]
) -> None:
    prefill = Prefill()
    for i, n in enumerate(prompts):
        prefill.add(n, 60.0 if i % 10 == 7 else constant_s + per_token_s * n)
    assert prefill.seconds(1000) == pytest.approx(constant_s + per_token_s * 1000, abs=15.0)
    assert prefill.seconds(2000) >= prefill.seconds(1000) >= 0


def test_without_outliers_the_prefill_fit_is_exact() -> None:
    prefill = Prefill()
    for n in (10, 500, 90, 2000, 800):
        prefill.add(n, 0.3 + n / 1000)
    assert prefill.seconds(3000) == pytest.approx(3.3)
    for _ in range(3):
        prefill.add(700, 1.0)
    assert prefill.seconds(3000) == pytest.approx(3.3)


# --- simulation ------------------------------------------------------------------------------------------------------

SECONDS = st.floats(0, 100)


@given(free=st.lists(SECONDS, max_size=6), works=st.lists(SECONDS, max_size=20), slots=st.integers(1, 5))
def test_the_simulation_gives_each_work_to_the_first_free_slot(
    free: list[float], works: list[float], slots: int
) -> None:
    times = sorted(free)
    while len(times) > slots:
        times.pop(0)
    times += [0.0] * (slots - len(times))
    expected = []
    for work in works:
        slot = min(range(slots), key=times.__getitem__)
        expected.append(times[slot])
        times[slot] += work
    assert simulate(list(free), works, slots) == expected


def test_an_expired_request_leaves_the_slot_to_the_next() -> None:
    assert simulate([5.0], [10.0, 10.0, 10.0], 1, [4.0, 9.0, 9.0]) == [5.0, 5.0, 15.0]


# --- calibration and display -----------------------------------------------------------------------------------------


def test_late_starts_raise_p90_and_punctual_starts_lower_it() -> None:
    random = Random(1)
    estimator = experienced([random.randint(10, 400) for _ in range(100)])
    estimator.refresh([running(5)], [waiting() for _ in range(5)], 1, 0.0)
    start = estimator.at(5, 0.0)
    assert start is not None
    for _ in range(20):
        estimator.measure(start, start.p90_s + 1)
    wide = estimator.at(5, 0.0)
    for _ in range(400):
        estimator.measure(start, start.p50_s)
    narrow = estimator.at(5, 0.0)
    assert wide is not None
    assert narrow is not None
    assert wide.p50_s == start.p50_s == narrow.p50_s
    assert narrow.p90_s < start.p90_s < wide.p90_s


def test_waits_of_less_than_a_second_are_not_measured() -> None:
    estimator = EtaEstimator()
    estimator.measure(Eta(0.5, 0.6), 0.9)
    assert estimator.stats().num_measured == 0
    assert estimator.stats().p90_coverage is None
    for waited_s in (8.0, 10.0, 16.0, 20.0):
        estimator.measure(Eta(10.0, 18.0), waited_s)
    stats = estimator.stats()
    assert stats.num_measured == 4
    assert stats.median_abs_error_ratio == pytest.approx(0.375)
    assert stats.bias_ratio == pytest.approx(40 / 54 - 1)
    assert stats.p90_coverage == 0.75


@pytest.mark.parametrize(
    ("fresh", "after_s", "sent"),
    [
        (Eta(4.0, 8.0), 1.0, Eta(4.0, 8.0)),  # sooner: at once
        (Eta(30.0, 60.0), 1.0, Eta(12.0, 24.0)),  # later: by a fifth a second
        (Eta(30.0, 60.0), 0.0, Eta(10.0, 20.0)),
        (Eta(30.0, 60.0), 2.0, Eta(14.4, 28.8)),
        (Eta(30.0, 60.0), 1e6, Eta(30.0, 60.0)),
        (Eta(11.0, 60.0), 1.0, Eta(11.0, 24.0)),
    ],
)
def test_a_smoothed_eta_does_not_jump_up(fresh: Eta, after_s: float, sent: Eta) -> None:
    assert smoothed(Eta(10.0, 20.0), 5.0, fresh, 5.0 + after_s) == pytest.approx(sent)


def test_a_smoothed_eta_may_jump_when_allowed() -> None:
    assert smoothed(Eta(10.0, 20.0), 5.0, Eta(30.0, 60.0), 6.0, may_jump=True) == Eta(30.0, 60.0)


@given(st.tuples(SECONDS, SECONDS), st.tuples(SECONDS, SECONDS), SECONDS)
def test_a_smoothed_eta_is_ordered(before: tuple[float, float], after: tuple[float, float], passed_s: float) -> None:
    sent = smoothed(Eta(*sorted(before)), 0.0, Eta(*sorted(after)), passed_s)
    assert 0 <= sent.p50_s <= sent.p90_s


@pytest.mark.parametrize(
    ("seconds", "shown"),
    [(0.0, 0.0), (0.04, 0.0), (0.26, 0.3), (4.4, 4), (9.7, 10), (47.3, 47), (123, 120), (3456, 3500)],
)
def test_an_eta_is_rounded_to_its_accuracy(seconds: float, shown: float) -> None:
    assert rounded(seconds) == shown


# --- accuracy: a chat load on four slots -----------------------------------------------------------------------------


def measured(waits: list[Wait], *, since: int) -> tuple[Figures, Figures]:
    """The figures of the estimator and of Gradio's rule: requests ahead * mean duration of all so far / slots."""
    waits = [wait for wait in waits if wait.number >= since]
    return figures(waits), figures(waits, gradio=True)


def test_estimates_of_a_loaded_queue_are_better_than_gradios_rule() -> None:
    ours, gradio = measured(SimulatedQueue().run(conv_jobs(Random(3), 2000)), since=200)
    assert ours.median_abs_error < 0.19
    assert ours.mae < 0.18
    assert ours.median_abs_error < 0.93 * gradio.median_abs_error
    assert ours.mae < 0.93 * gradio.mae
    assert abs(ours.bias) < 0.05 < -gradio.bias
    assert abs(ours.coverage - 0.9) < 0.02


def test_longer_answers_are_detected_soon() -> None:
    """A mean of all lengths is still far too short at the end."""
    jobs = conv_jobs(Random(2), 2000, factor=lambda progress: 1.0 if progress < 0.5 else 1.8)
    ours, gradio = measured(SimulatedQueue(max_queue_size=22).run(jobs), since=1000)
    assert ours.median_abs_error < 0.14 < 0.3 < gradio.median_abs_error
    assert abs(ours.bias) < 0.04
    assert gradio.bias < -0.3
    assert abs(ours.coverage - 0.9) < 0.03


def test_expiring_requests_ahead_are_accounted_for() -> None:
    jobs = (replace(job, max_wait_s=30.0) for job in conv_jobs(Random(4), 1000, rho=lambda _: 2.0))
    ours, gradio = measured(SimulatedQueue(max_queue_size=64).run(jobs), since=100)
    assert ours.median_abs_error < 0.04 < 0.5 < gradio.median_abs_error
    assert abs(ours.bias) < 0.04
    assert ours.coverage > 0.88
