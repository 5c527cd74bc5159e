"""The recommended concurrency, and its explanation."""

from __future__ import annotations

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.tuning import Recommendation, recommend
from tests.tuning.levels import level, levels

POWERS = (1, 2, 4, 8, 16, 32, 64)


def explanation(recommendation: Recommendation) -> str:
    return " ".join(recommendation.why)


def test_the_largest_number_within_the_target_may_lie_between_two_levels() -> None:
    found = recommend(levels(lambda n: 0.02 + 0.005 * n, POWERS), itl_target_s=0.0951)
    assert (found.max_concurrency, found.keeps_target, found.is_measured) == (15, True, False)
    assert found.why[0].startswith("15: 99 of 100 gaps between tokens within 95 ms, where 95.1 ms are allowed; 158 ")
    assert "interpolated between measured levels" in found.why[0]
    assert (
        found.why[1]
        == "16 streams would give 1% more tokens/s by the curve, but 1 of 100 gaps would be 100 ms or more."
    )
    assert found.why[2].startswith("Universal scalability law: 25 ms a step for one stream, contention 0.2, coherency")


def test_the_quantile_of_the_gaps_must_be_within_the_target() -> None:
    machine = levels(lambda n: 0.02 + 0.005 * n, POWERS, tail=2.0)
    assert recommend(machine, itl_target_s=0.1201).max_concurrency == 8
    assert recommend(machine, itl_target_s=0.1201, tail="p90").max_concurrency == 20
    assert "9 of 10 gaps" in recommend(machine, itl_target_s=0.1201, tail="p90").why[0]


def test_a_long_target_does_not_lead_beyond_the_knee() -> None:
    """Step a + b n: stream n + 1 adds a / (a + b (n + 1)) of the average; below a tenth from n = 9 a / b - 1."""
    found = recommend(levels(lambda n: 0.02 + 0.01 * n, POWERS), itl_target_s=10.0)
    assert found.max_concurrency == pytest.approx(18, abs=1)
    assert f"beyond {found.max_concurrency}, each further stream adds less than 10%" in found.why[1]


def test_a_serial_engine_gets_one_stream() -> None:
    found = recommend(levels(lambda n: 0.02 * n, (1, 2, 4, 8)), itl_target_s=1.0)
    assert found.max_concurrency == 1
    assert found.why[1].startswith(
        "2 streams would give no more tokens/s by the curve: beyond 1, each further stream adds less than 10%"
    )


def test_falling_throughput_is_not_recommended() -> None:
    found = recommend(levels(lambda n: 0.01 + 0.0001 * n * n, POWERS), itl_target_s=10.0)
    assert found.law is not None
    assert found.law.peak == pytest.approx(10.0, abs=0.5)
    assert 6 <= found.max_concurrency < found.law.peak
    assert "maximum tokens/s with 10 streams" in found.why[2]


def test_a_machine_that_scales_to_the_last_level_reports_why_it_was_the_last() -> None:
    found = recommend(levels(lambda n: 0.02, POWERS), itl_target_s=0.1, why_no_more="the time limit was reached")
    assert found.max_concurrency == 64
    assert found.why[1] == "More than 64 streams were not tried: the time limit was reached."


def test_one_stream_is_recommended_if_even_one_misses_the_target() -> None:
    found = recommend(levels(lambda n: 0.3 + 0.001 * n, POWERS), itl_target_s=0.1)
    assert (found.max_concurrency, found.keeps_target) == (1, False)
    assert found.why[0].startswith("Even one stream alone misses the target: 1 of 100 gaps between tokens is 301 ms")
    assert (
        found.why[1]
        == "2 streams would give 99% more tokens/s by the curve, but 1 of 100 gaps would be 302 ms or more."
    )


def test_an_outlier_at_a_low_level_does_not_end_the_search() -> None:
    machine = [level(1, 0.02, p99_s=0.5), level(2, 0.021), level(4, 0.022), level(8, 0.024), level(16, 0.2)]
    assert recommend(machine, itl_target_s=0.1).max_concurrency >= 8


def test_the_gain_mentions_the_curve_only_if_one_is_used() -> None:
    """The ratio of two measured rows is another number."""
    machine = [level(1, 0.02), level(2, 0.0295), level(4, 0.051), level(8, 0.09), level(16, 0.18)]
    found = recommend(machine, itl_target_s=0.05)
    assert found.why[1].startswith("4 streams would give ")
    assert "tokens/s by the curve, but" in found.why[1]
    without = recommend(machine[:3], itl_target_s=0.05)
    assert "tokens/s, but" in without.why[1]


def test_few_levels_and_a_bad_fit_are_reported_and_interpolated() -> None:
    few = recommend([level(1, 0.02), level(2, 0.03)], itl_target_s=0.025)
    assert few.law is None
    assert few.max_concurrency == 1
    assert few.why[2].startswith("No curve: 2 measured levels are too few to test one")
    odd = recommend(levels(lambda n: 0.1 if n == 4 else 0.02, POWERS), itl_target_s=0.1)
    assert re.match(r"No curve: the universal scalability law misses a measured step by \d+%", odd.why[2])
    assert odd.max_concurrency == 64


@given(
    a=st.floats(0.001, 0.2),
    b=st.floats(0.0, 0.05),
    c=st.floats(0.0, 0.001),
    target_s=st.floats(0.01, 2.0),
    more=st.floats(1.0, 3.0),
    num_levels=st.integers(1, 7),
)
def test_a_longer_target_never_lowers_the_limit_and_the_target_is_kept(
    a: float, b: float, c: float, target_s: float, more: float, num_levels: int
) -> None:
    machine = levels(lambda n: a + b * n + c * n * n, POWERS[:num_levels])
    found = recommend(machine, itl_target_s=target_s)
    assert 1 <= found.max_concurrency <= machine[-1].num_streams
    if found.keeps_target:
        n = found.max_concurrency
        assert a + b * n + c * n * n <= target_s * (1 + 1e-9)  # the interpolation lies above a convex curve
    assert recommend(machine, itl_target_s=more * target_s).max_concurrency >= found.max_concurrency
    assert len(found.why) == 3
    assert all(sentence.endswith((".", "?")) for sentence in found.why)
