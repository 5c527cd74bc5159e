"""Adaptive concurrency: gaps in, limits out, in virtual time.

First the rule, one window at a time. Then the controller with a small model of an engine, compared with every fixed
limit on the same random numbers, and with two simpler controllers that must fail.

    python -m tests.scheduler.limits.test_adaptive      prints the figures of docs/adaptive-concurrency.md
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from math import inf, nan
from random import Random
from statistics import mean, median
from typing import Protocol

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatstream.errors import ConfigError
from chatstream.scheduler.limits.adaptive import AdaptiveLimit, Move

TARGET_S = 0.070
MS = 0.001


# --- the rule, one window at a time -----------------------------------------------------------------------------------


class Driver:
    """Feeds steps of running requests to a limit. The target is 100 ms, so a gap in ms reads as a percentage."""

    def __init__(self, initial: int = 4, floor: int = 1, ceiling: int = 64) -> None:
        self.limit = AdaptiveLimit(initial=initial, floor=floor, ceiling=ceiling, target_itl_s=0.100)
        self.now_s = 1000.0
        self.moves: list[Move] = []

    def steps(
        self, num: int, gap_ms: float, running: int | None = None, waiting: int = 5, every_ms: float = 0
    ) -> Driver:
        for _ in range(num):
            # By default as many requests run as the limit allows.
            num_running = self.limit.value if running is None else running
            self.now_s += max(gap_ms, every_ms) * MS
            for _ in range(num_running):
                if move := self.limit.observe(gap_ms * MS, num_running, waiting, self.now_s):
                    self.moves.append(move)
        return self

    def windows(self, num: int, gap_ms: float, running: int | None = None, waiting: int = 5) -> Driver:
        """Feed `num` windows of gaps, each at least 2 s long."""
        for _ in range(num):
            num_running = self.limit.value if running is None else running
            self.steps(max(-(-200 // num_running), 20), gap_ms, num_running, waiting, every_ms=110)
        return self

    @property
    def values(self) -> list[int]:
        return [move.new for move in self.moves]


def test_the_limit_grows_by_one_while_gaps_are_short_and_a_request_waits() -> None:
    driver = Driver().windows(1, 89)
    assert [(move.old, move.new) for move in driver.moves] == [(4, 5)]
    assert driver.limit.value == 5
    assert driver.moves[0].why == (
        "p90 of the gaps between tokens was 89.5 ms with 4 running, below 90 ms (0.9 of the target), and 5 waited; "
        "with 5 running it is not known yet: a trial"
    )


@pytest.mark.parametrize(
    ("why", "gap_ms", "running", "waiting"),
    [
        ("the gaps are within the target, but not far below", 91, 4, 5),
        ("no request waits", 50, 4, 0),
        ("a slot is free: the limit does not bind", 50, 3, 5),
    ],
)
def test_does_not_grow(why: str, gap_ms: float, running: int, waiting: int) -> None:
    assert Driver().windows(10, gap_ms, running, waiting).moves == [], why


def test_does_not_grow_when_slots_were_full_for_less_than_half_of_the_window() -> None:
    driver = Driver().steps(26, 80, waiting=0).steps(24, 80)
    assert driver.moves == []
    assert driver.steps(24, 80, waiting=0).steps(26, 80).values == [5]


def test_a_window_has_two_seconds_and_two_hundred_gaps_and_twenty_steps() -> None:
    assert Driver(10).steps(40, 50).moves == []  # 400 gaps, but only 1.95 s from the first to the last
    assert Driver(10).steps(42, 50).values == [11]
    assert Driver(2).steps(99, 80).moves == []  # 8 s, but 198 gaps
    assert Driver(2).steps(100, 80).values == [3]
    assert Driver(40, ceiling=99).steps(19, 89).moves == []  # 760 gaps, but 19 steps
    assert Driver(40, ceiling=99).steps(20, 89, running=100).moves == []
    assert Driver(40, ceiling=99).steps(24, 89).values == [41]


def test_is_cut_after_two_windows_above_the_target() -> None:
    driver = Driver(10).windows(1, 150)
    assert driver.moves == []
    driver.windows(1, 150)
    assert driver.values == [6], "without a fit: at most 10 * 100 / 150 * 0.95"
    assert driver.moves[0].why == (
        "p90 of the gaps between tokens was 150 ms with 10 running, above 100 ms, in 2 windows; "
        "with 6 running it should be at best 90.3 ms"
    )
    assert Driver(10).windows(2, 110).values == [7], "at most 0.7"


def test_a_good_window_resets_the_count_of_bad_ones() -> None:
    assert Driver(10).windows(1, 150).windows(1, 95).windows(1, 150).windows(1, 95).moves == []


def test_the_limit_is_cut_while_the_gaps_stay_long() -> None:
    """A cool-down that every bad window restarts would freeze the limit."""
    assert Driver(64).windows(30, 120).values[-1] == 1


def test_a_cut_leaves_at_least_a_quarter() -> None:
    assert Driver(40).windows(2, 5000).values == [10]


def test_a_cut_starts_from_the_running_requests_when_fewer_than_the_limit_run() -> None:
    assert Driver(20).windows(2, 110, running=5).values == [3]


def test_steps_back_when_only_some_gaps_are_long() -> None:
    """Prefills between the tokens: fewer running requests make the long gaps rarer, not shorter."""
    driver = Driver(8)
    for _ in range(3 * 7):  # windows of less than 7 times 32 gaps
        driver.steps(3, 60, waiting=0).steps(1, 180, waiting=0)
    assert driver.moves == [], "three windows may be chance"
    for _ in range(7):
        driver.steps(3, 60, waiting=0).steps(1, 180, waiting=0)
    assert driver.values == [7]
    assert "half of them were within 60.5 ms: a step back is enough" in driver.moves[0].why


def test_a_step_back_is_a_tenth_but_not_below_the_floor() -> None:
    for floor, limit in ((1, 36), (38, 38)):
        driver = Driver(40, floor=floor)
        while not driver.moves:
            driver.steps(3, 60, waiting=0).steps(1, 180, waiting=0)
        assert driver.values == [limit]


def test_growth_waits_three_windows_after_a_cut_and_thirty_after_a_step_back() -> None:
    driver = Driver(10).windows(2, 110)
    assert driver.values == [7]
    assert driver.windows(2, 83).values == [7]
    assert driver.windows(1, 83).values == [7, 8]

    driver = Driver(8)
    while not driver.moves:
        driver.steps(3, 60, waiting=0).steps(1, 180, waiting=0)
    assert driver.windows(29, 60).values == [7]
    assert driver.windows(1, 60).values == [7, 8]


def test_makes_no_further_cut_while_more_run_than_the_limit() -> None:
    """Without preemption a cut takes effect as generations end. Further cuts would end at the floor."""
    driver = Driver(10).windows(2, 150)
    assert driver.windows(20, 130, running=10).values == [6]
    assert driver.windows(1, 110, running=6).values == [6]
    assert driver.windows(1, 110, running=6).values == [6, 4]


def test_the_limit_stays_between_floor_and_ceiling() -> None:
    assert Driver(4, floor=3).windows(20, 500).values == [3]
    assert Driver(4, ceiling=5).windows(20, 20).values == [5]


def test_with_a_fit_a_cut_goes_where_the_gaps_should_meet_the_target() -> None:
    driver = Driver(2, ceiling=8)
    while driver.limit.value < 8:
        driver.windows(1, 20 + 5 * driver.limit.value)
    assert driver.windows(5, 60).values[-1] == 8
    driver.windows(2, 120)  # twice as slow: 40 + 10 b, so 95 ms allow 5
    assert driver.values[-1] == 5
    assert driver.moves[-1].why.endswith("with 5 running it should be 90.1 ms")


def test_a_cut_aims_slightly_below_the_target() -> None:
    driver = Driver(2, ceiling=8)
    while driver.limit.value < 8:
        driver.windows(1, 14 + 7 * driver.limit.value)
    driver.windows(5, 70).windows(2, 140)  # 28 + 14 b: 98 ms with 5 would be within the target, but just
    assert driver.values[-1] == 4


def test_with_a_fit_growth_stops_below_the_target() -> None:
    """Otherwise it would try the step from 80 to 110 ms again and again."""
    driver = Driver(1)
    for _ in range(80):
        driver.windows(1, 20 + 30 * driver.limit.value)
    assert driver.values == [2]


def test_with_a_fit_growth_is_by_a_quarter() -> None:
    """On a large machine growth by 1 would take too long: t = 20 + 0.1 b ms, so 90 ms allow 700."""
    driver = Driver(8, ceiling=400)
    windows = 0
    while driver.limit.value < 400:
        driver.windows(1, 20 + 0.1 * driver.limit.value)
        windows += 1
    assert windows < 50


def test_growth_on_a_serial_engine_is_undone() -> None:
    driver = Driver(2)
    while len(driver.moves) < 2:
        driver.windows(1, 15 * driver.limit.value)
    assert driver.values == [3, 2]
    assert driver.moves[1].why == (
        "beyond 2 a slot adds 0% of the tokens a second that an average one gives, less than 10%: "
        "more slots only share the same speed"
    )
    for _ in range(30):
        driver.windows(1, 15 * driver.limit.value)
    assert driver.values == [3, 2], "the fit is known now"


def test_a_trial_without_a_known_gain_continues_and_is_undone_as_a_whole() -> None:
    """Growth from 20 to 21 does not reveal a serial engine; growth from 20 to 23 does."""
    driver = Driver(20, ceiling=99)
    while not any(move.new < move.old for move in driver.moves):
        driver.windows(1, 1.0 * driver.limit.value)
    assert driver.values[:2] == [21, 22]
    assert driver.values[-1] == 20


@pytest.mark.parametrize("running", [1, 8, 64, 300])
def test_one_pause_of_the_whole_process_changes_nothing(running: int) -> None:
    """Every running request has one gap as long as the pause."""
    driver = Driver(running, ceiling=300).windows(3, 95)
    driver.steps(1, 20_000).windows(3, 95).steps(1, 3_600_000).windows(3, 95)
    assert driver.moves == []


def test_single_long_gaps_change_nothing() -> None:
    driver = Driver(8)
    for _ in range(200):
        driver.steps(19, 80, waiting=0).steps(1, 2000, waiting=0)
    assert driver.moves == []


def test_a_burst_of_prefills_changes_nothing() -> None:
    driver = Driver(8)
    for _ in range(5):
        driver.windows(3, 92).steps(8, 300)
    assert driver.windows(3, 92).moves == []


def test_measurements_before_a_long_silence_are_discarded() -> None:
    driver = Driver(8).windows(1, 150).steps(20, 150)
    driver.now_s += 3600
    assert driver.windows(1, 150).moves == []
    assert driver.windows(1, 150).values == [5]


def test_the_controller_continues_from_an_operators_limit() -> None:
    driver = Driver(8, floor=2, ceiling=20).windows(1, 150)
    driver.limit.set(16)
    assert driver.limit.value == 16
    assert driver.windows(1, 150).moves == [], "earlier windows had another limit"
    assert driver.windows(1, 150).values == [11]
    with pytest.raises(ConfigError, match="max_concurrency must be a whole number between 2 and 1,000,000") as caught:
        driver.limit.set(1)
    assert caught.value.param == "max_concurrency"
    assert driver.limit.value == 11


def test_an_operators_limit_above_the_ceiling_raises_the_ceiling() -> None:
    driver = Driver(4, floor=2, ceiling=4).windows(3, 20)
    assert driver.limit.value == 4
    driver.limit.set(6)
    assert (driver.limit.value, driver.limit.stats().ceiling) == (6, 6)
    driver.limit.set(5)
    assert driver.windows(3, 20).limit.value == 6


@pytest.mark.parametrize(
    ("initial", "floor", "ceiling", "target_s", "param"),
    [
        (4, 0, 8, 0.1, "min_concurrency"),
        (4, 9, 8, 0.1, "min_concurrency"),
        (1, 2, 8, 0.1, "max_concurrency"),
        (9, 2, 8, 0.1, "max_concurrency"),
        (4, 1, 8, 0.0, "itl_target_s"),
        (4, 1, 8, inf, "itl_target_s"),
        (4, 1, 8, nan, "itl_target_s"),
    ],
)
def test_invalid_values_are_refused_by_name(
    initial: int, floor: int, ceiling: int, target_s: float, param: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        AdaptiveLimit(initial=initial, floor=floor, ceiling=ceiling, target_itl_s=target_s)
    assert caught.value.param == param


def test_with_more_running_than_the_limit_it_is_cut_once_and_grows_again_with_short_gaps() -> None:
    """8 requests continue to run, as where the engine cannot preempt."""
    driver = Driver(8).windows(20, 150, running=8)
    assert driver.values == [5]
    assert driver.windows(40, 50, running=8).limit.value >= 8


def test_stats_show_the_measurements_behind_the_decision() -> None:
    driver = Driver()
    stats = driver.limit.stats()
    assert (stats.p90_itl_s, stats.num_running, stats.slot_gain) == (None, None, None)
    for _ in range(6):
        driver.windows(1, 20 + 5 * driver.limit.value)
    stats = driver.limit.stats()
    assert (stats.value, stats.floor, stats.ceiling, stats.target_itl_s) == (driver.limit.value, 1, 64, 0.100)
    assert stats.num_running == pytest.approx(driver.limit.value, abs=1.01)
    assert stats.num_running is not None
    assert stats.p90_itl_s == pytest.approx((20 + 5 * stats.num_running) * MS, abs=1 * MS)
    assert stats.slot_gain == pytest.approx(20 / (20 + 5 * (stats.value + 1)), rel=0.02)
    assert repr(driver.limit) == f"AdaptiveLimit({stats.value} of 1..64, target 100 ms)"


# --- any sequence of gaps ---------------------------------------------------------------------------------------------


FACTS = st.tuples(
    st.sampled_from([0.0, 0.01, 0.05, 0.069, 0.0701, 0.1, 1.0, 45.0, 1e6]),  # seconds of the gaps
    st.integers(1, 200),  # steps
    st.integers(1, 40),  # running
    st.sampled_from([0, 0, 1, 1000]),  # waiting
)


@given(st.lists(FACTS, max_size=30), st.integers(1, 5), st.integers(0, 20))
def test_any_gaps_keep_the_limit_within_bounds_and_give_reasons(
    facts: list[tuple[float, int, int, int]], floor: int, span: int
) -> None:
    def moves() -> list[tuple[float, Move]]:
        limit = AdaptiveLimit(initial=floor + span // 2, floor=floor, ceiling=floor + span, target_itl_s=TARGET_S)
        now_s, value, seen = 0.0, limit.value, []
        for gap_s, steps, running, waiting in facts:
            for _ in range(steps):
                now_s += gap_s
                for _ in range(running):
                    move = limit.observe(gap_s, running, waiting, now_s)
                    if move is not None:
                        seen.append((now_s, move))
                        assert move.old == value != move.new
                        assert floor <= move.new <= floor + span
                        assert waiting or move.new < move.old, "never grows while no request waits"
                        assert move.new <= move.old + max(1, move.old // 4)
                        assert "p90 of the gaps between tokens was" in move.why or "share the same speed" in move.why
                        value = move.new
                    assert limit.value == value
        return seen

    assert moves() == moves(), "the same gaps give the same moves"


# --- with a model of an engine ----------------------------------------------------------------------------------------


def batched(running: int) -> float:
    """Seconds of a step; within 70 ms for up to 10 running requests."""
    return 0.020 + 0.005 * running


def serial(running: int) -> float:
    """Seconds of a step of an engine with the same throughput for any number of running requests."""
    return 0.020 * running


class Controller(Protocol):
    @property
    def value(self) -> int: ...

    def observe(self, gap_s: float, running: int, waiting: int, now_s: float) -> Move | None: ...


class Fixed:
    def __init__(self, value: int) -> None:
        self.value = value

    def observe(self, gap_s: float, running: int, waiting: int, now_s: float) -> Move | None:
        return None


@dataclass
class PlainAimd:
    """Textbook AIMD: no trial, no fit. With the settings of `AdaptiveLimit`, or with a known pitfall."""

    value: int = 2
    grow_below: float = 0.9
    cool_down: int = 3
    is_reset_by_bad_windows: bool = False
    left: int = 0
    gaps: list[float] = field(default_factory=list)
    since_s: float = 0.0

    def observe(self, gap_s: float, running: int, waiting: int, now_s: float) -> Move | None:
        self.gaps.append(gap_s)
        if len(self.gaps) < 200 or now_s - self.since_s < 2.0:
            return None
        p90_s = sorted(self.gaps)[int(0.9 * len(self.gaps))]
        self.gaps, self.since_s, old = [], now_s, self.value
        if p90_s > TARGET_S:
            if self.left <= 0:
                self.value = max(1, int(0.7 * min(self.value, running)))
            if self.left <= 0 or self.is_reset_by_bad_windows:
                self.left = self.cool_down
        elif running >= self.value and waiting and p90_s < self.grow_below * TARGET_S:
            self.value += 1
        self.left -= 1
        return Move(old, self.value, "") if self.value != old else None


@dataclass
class Generation:
    tokens_left: int
    last_token_s: float | None = None


@dataclass
class EngineModel:
    """Generations of random length that step together, and a queue that is never empty.

    A step takes `step_s(number running)`, times a random 1 ± `noise`, times `slow`, plus `prefill_s` for each
    generation in its first step. Lengths are exponential: the mean remaining length is the mean length.
    """

    limit: Controller
    step_s: Callable[[int], float]
    seed: int = 0
    noise: float = 0.05
    slow: float = 1.0
    prefill_s: float = 0.0
    mean_tokens: int = 200
    can_preempt: bool = True
    now_s: float = 0.0
    num_tokens: int = 0
    running: list[Generation] = field(default_factory=list)
    preempted: deque[Generation] = field(default_factory=deque)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """End and length of each gap."""
    moves: list[tuple[float, Move]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lengths, self.jitter = Random(self.seed), Random(self.seed + 1)

    def run(self, until_s: float) -> EngineModel:
        while self.now_s < until_s:
            self.fill()
            self.step()
        return self

    def fill(self) -> None:
        while self.can_preempt and len(self.running) > self.limit.value:
            newest = self.running.pop()
            newest.last_token_s = None  # a gap that contains a preemption is not reported
            self.preempted.appendleft(newest)
        while len(self.running) < self.limit.value:
            length = 1 + int(self.lengths.expovariate(1 / self.mean_tokens))
            self.running.append(self.preempted.popleft() if self.preempted else Generation(length))

    def step(self) -> None:
        num = len(self.running)
        duration_s = self.slow * self.step_s(num) * (1 + self.jitter.uniform(-self.noise, self.noise))
        self.now_s += duration_s + self.prefill_s * sum(one.last_token_s is None for one in self.running)
        for one in self.running:
            if one.last_token_s is not None:
                gap_s = self.now_s - one.last_token_s
                self.gaps.append((self.now_s, gap_s))
                if move := self.limit.observe(gap_s, num, 1000, self.now_s):
                    self.moves.append((self.now_s, move))
            one.last_token_s = self.now_s
            one.tokens_left -= 1
        self.num_tokens += num
        self.running = [one for one in self.running if one.tokens_left > 0]

    def p90_s(self, since_s: float, until_s: float = inf) -> float:
        gaps = sorted(gap_s for end_s, gap_s in self.gaps if since_s < end_s <= until_s)
        return gaps[int(0.9 * len(gaps))]

    def values(self, since_s: float) -> list[int]:
        """The values of the limit from `since_s` on."""
        first = next((move.old for when_s, move in self.moves if when_s > since_s), self.limit.value)
        return [first, *(move.new for when_s, move in self.moves if when_s > since_s)]

    def back_within_target_s(self, since_s: float) -> float:
        """Seconds from `since_s` to the first 2 s with a p90 within the target, in steps of a quarter second."""
        after_s = 0.0
        gaps = [gap for gap in self.gaps if gap[0] > since_s]
        while since_s + after_s < self.now_s - 2:
            begin_s = since_s + after_s
            within = sorted(gap_s for end_s, gap_s in gaps if begin_s < end_s <= begin_s + 2)
            if within[int(0.9 * len(within))] <= TARGET_S:
                return after_s
            after_s += 0.25
        return inf


def adaptive(initial: int = 2, target_s: float = TARGET_S) -> AdaptiveLimit:
    return AdaptiveLimit(initial=initial, floor=1, ceiling=64, target_itl_s=target_s)


def without_hysteresis() -> PlainAimd:
    return PlainAimd(grow_below=1.0, cool_down=0)


def freezing() -> PlainAimd:
    return PlainAimd(is_reset_by_bad_windows=True)


@dataclass(frozen=True)
class Comparison:
    best: int
    """The fixed limit with the most tokens per second of those whose p90 is within the target."""
    best_tokens_per_s: float
    tokens_per_s: float
    """In the second half of the run."""
    whole_tokens_per_s: float
    """In the whole run, with the climb from 2."""
    values: tuple[int, ...]
    """Values of the limit in the second half."""
    p90_s: float

    @property
    def ratio(self) -> float:
        return self.tokens_per_s / self.best_tokens_per_s

    @property
    def whole_ratio(self) -> float:
        return self.whole_tokens_per_s / self.best_tokens_per_s

    @property
    def swing(self) -> int:
        return max(self.values) - min(self.values)


@cache
def rate_within_target(
    limit: int, step_s: Callable[[int], float], noise: float, seed: int, prefill_s: float, mean_tokens: int
) -> float:
    """Tokens per second with a fixed limit; 0 when its p90 is above the target."""
    engine = EngineModel(Fixed(limit), step_s, seed, noise, prefill_s=prefill_s, mean_tokens=mean_tokens).run(300)
    return engine.num_tokens / engine.now_s if engine.p90_s(0) <= TARGET_S + 1e-9 else 0.0


@cache
def compare(
    make: Callable[[], Controller],
    step_s: Callable[[int], float],
    noise: float,
    seed: int = 0,
    prefill_s: float = 0.0,
    mean_tokens: int = 200,
) -> Comparison:
    engine = EngineModel(make(), step_s, seed, noise, prefill_s=prefill_s, mean_tokens=mean_tokens).run(300)
    begin_s, begin_tokens = engine.now_s, engine.num_tokens
    engine.run(600)
    rates = {n: rate_within_target(n, step_s, noise, seed, prefill_s, mean_tokens) for n in range(1, 12)}
    best = max(rates, key=lambda limit: rates[limit])
    return Comparison(
        best,
        rates[best],
        (engine.num_tokens - begin_tokens) / (engine.now_s - begin_s),
        engine.num_tokens / engine.now_s,
        tuple(engine.values(begin_s)),
        engine.p90_s(begin_s),
    )


@dataclass(frozen=True)
class Slowdown:
    """The engine becomes twice as slow at once, in the steady state."""

    back_s: float
    mean_residual_s: float
    """Mean remaining time of the requests that ran at that moment, at the new speed."""


@cache
def slow_down(make: Callable[[], Controller], can_preempt: bool, seed: int) -> Slowdown:
    # The moment is anywhere in a window.
    engine = EngineModel(make(), batched, seed, can_preempt=can_preempt).run(100 + 0.37 * seed)
    then_s = engine.now_s
    residual_s = mean(one.tokens_left for one in engine.running) * 2 * batched(len(engine.running))
    engine.slow = 2.0
    engine.run(then_s + 150)
    return Slowdown(engine.back_within_target_s(then_s), residual_s)


SEEDS = range(8)


@pytest.mark.parametrize("noise", [0.02, 0.05, 0.08])
def test_a_batched_engine_reaches_the_best_fixed_limit_and_the_limit_rests(noise: float) -> None:
    for seed in range(2):
        result = compare(adaptive, batched, noise, seed)
        assert result.ratio >= 0.97
        assert result.whole_ratio >= 0.97
        assert result.swing <= 1
        assert result.p90_s <= TARGET_S


def test_a_serial_engine_keeps_its_limit_and_loses_nothing() -> None:
    result = compare(adaptive, serial, 0.05)
    assert result.ratio >= 0.99
    assert set(result.values) <= {2, 3}
    assert result.p90_s <= TARGET_S


def test_with_preemption_a_slowdown_is_corrected_within_ten_seconds() -> None:
    assert max(slow_down(adaptive, True, seed).back_s for seed in SEEDS) <= 10


def test_without_preemption_a_slowdown_is_corrected_when_the_running_requests_have_ended() -> None:
    runs = [slow_down(adaptive, False, seed) for seed in SEEDS]
    assert mean(run.back_s for run in runs) <= mean(run.mean_residual_s for run in runs) + 10


def test_prefills_between_tokens_cost_little() -> None:
    """Every prefill makes one step longer by the whole target."""
    result = compare(adaptive, batched, 0.05, prefill_s=TARGET_S)
    assert result.ratio >= 0.97
    assert result.swing <= 1


def test_the_limit_of_a_large_machine_is_reached_in_minutes() -> None:
    """t = 20 + 0.1 b ms. A threshold of 2 % of the total would stop at 45: one slot of b cannot add more than 1 / b."""
    limit = AdaptiveLimit(initial=8, floor=1, ceiling=256, target_itl_s=0.040)
    engine = EngineModel(limit, lambda running: 0.020 + 0.0001 * running, noise=0.03).run(120)
    assert limit.value >= 0.9 * 160
    assert engine.p90_s(100) <= 0.040


def test_without_hysteresis_the_limit_swings() -> None:
    """The baseline must fail where the controller is stable."""
    baseline = compare(without_hysteresis, batched, 0.05)
    assert baseline.swing >= 3
    assert baseline.swing > compare(adaptive, batched, 0.05).swing


def test_with_a_cool_down_reset_by_bad_windows_the_limit_freezes() -> None:
    """The baseline must fail where the controller recovers."""
    assert slow_down(freezing, True, 0).back_s == inf
    assert slow_down(adaptive, True, 0).back_s < 10


@settings(max_examples=15)
@given(
    fixed_ms=st.floats(2, 40),
    per_slot_ms=st.floats(0.5, 10),
    room=st.floats(1.3, 6),
    noise=st.sampled_from([0.0, 0.03, 0.08]),
    initial=st.integers(1, 12),
)
def test_any_linear_engine_meets_the_target_and_the_limit_rests(
    fixed_ms: float, per_slot_ms: float, room: float, noise: float, initial: int
) -> None:
    target_s = room * (fixed_ms + per_slot_ms) * MS
    limit = adaptive(initial, target_s)
    engine = EngineModel(limit, lambda running: (fixed_ms + per_slot_ms * running) * MS, noise=noise)
    engine.run(3000 * target_s)
    values = engine.values(2000 * target_s)
    assert max(values) - min(values) <= 2, "±1"
    assert engine.p90_s(2000 * target_s) <= 1.02 * target_s


# --- the figures of docs/adaptive-concurrency.md ----------------------------------------------------------------------


def print_figures() -> None:
    def spread(values: Iterable[float], digits: int) -> str:
        known = sorted(values)
        return f"{median(known):.{digits}f} ({known[0]:.{digits}f} to {known[-1]:.{digits}f})"

    print("steady state, medians of 5 runs (least to most)\n")
    print("engine     noise  best fixed  adaptive  ratio                   with the climb          p90 ms")
    for step_s in (batched, serial):
        for percent in (0, 2, 4, 6, 8, 9, 10):
            runs = [compare(adaptive, step_s, percent / 100, seed) for seed in range(5)]
            values = [value for run in runs for value in run.values]
            print(
                f"{step_s.__name__:9} {percent:4} %  {median(run.best for run in runs):10}  "
                f"{f'{min(values)}..{max(values)}':8}  {spread((run.ratio for run in runs), 3):22}  "
                f"{spread((run.whole_ratio for run in runs), 3):22}  {median(1000 * run.p90_s for run in runs):.1f}"
            )
    print()
    for mean_tokens, targets in ((200, 0.5), (200, 1), (200, 2), (90, 0.5), (90, 1), (90, 2)):
        runs = [compare(adaptive, batched, 0.05, seed, targets * TARGET_S, mean_tokens) for seed in range(5)]
        values = [value for run in runs for value in run.values]
        print(
            f"prefill {targets:3g} x target, {mean_tokens:3} tokens  {median(run.best for run in runs):2}  "
            f"{f'{min(values)}..{max(values)}':8}  {spread((run.ratio for run in runs), 3):22}  "
            f"{median(1000 * run.p90_s for run in runs):.1f}"
        )
    print("\nseconds until back within the target, after a slowdown by 2, of 20 runs\n")
    for name, make in (("adaptive", adaptive), ("plain AIMD", PlainAimd)):
        for can_preempt in (True, False):
            slow = [slow_down(make, can_preempt, seed) for seed in range(20)]
            beyond = spread((run.back_s - run.mean_residual_s for run in slow), 1)
            engine = "preempts" if can_preempt else "cannot preempt"
            print(
                f"{name:11} {engine:14} {spread((run.back_s for run in slow), 1)}"
                + ("" if can_preempt else f", beyond the mean residual {beyond}")
            )
    one = compare(without_hysteresis, batched, 0.05)
    print(f"\nplain AIMD without hysteresis: {min(one.values)}..{max(one.values)}, p90 {1000 * one.p90_s:.1f} ms")


if __name__ == "__main__":
    print_figures()
