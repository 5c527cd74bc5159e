"""The saturation curve: exact parameters are recovered, and a bad fit is reported."""

from __future__ import annotations

from math import inf

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatstream.tuning.curve import Interpolation, fit_law
from tests.tuning.levels import level, levels

POWERS = (1, 2, 4, 8, 16, 32, 64)


@given(a=st.floats(0.0, 0.5), b=st.floats(1e-4, 0.1), num_levels=st.integers(4, 7))
def test_the_parameters_of_a_plus_b_n_are_recovered(a: float, b: float, num_levels: int) -> None:
    law = fit_law(levels(lambda n: a + b * n, POWERS[:num_levels]))
    assert law is not None
    assert law.is_good
    assert law.alone_s == pytest.approx(a + b)
    assert law.contention == pytest.approx(b / (a + b), abs=1e-6)
    assert law.step_s(100) == pytest.approx(a + 100 * b, rel=1e-6)


@given(st.lists(st.floats(0.001, 1.0), min_size=4, max_size=8))
def test_no_parameter_is_negative_and_the_error_ratio_is_the_maximum(steps_s: list[float]) -> None:
    measured = [level(n, step_s) for n, step_s in enumerate(steps_s, start=1)]
    law = fit_law(measured)
    assert law is not None
    assert min(law.alone_s, law.contention, law.coherency) >= 0
    errors = [abs(law.step_s(one.num_streams) / one.step_s - 1) for one in measured]
    assert max(errors) == pytest.approx(law.error_ratio)
    assert law.is_good == (law.error_ratio <= 0.1)


@given(st.lists(st.floats(0.5, 2.0), min_size=7, max_size=7), st.floats(0, 1), st.floats(0, 0.1))
def test_no_other_law_fits_better(noise: list[float], contention: float, coherency: float) -> None:
    """Least sum of squared relative errors, compared with a random law at its best scale."""
    measured = [level(n, 0.02 * factor) for n, factor in zip(POWERS, noise, strict=True)]
    law = fit_law(measured)
    assert law is not None
    n = np.array(POWERS)
    other = (1 + contention * (n - 1) + coherency * n * (n - 1)) / np.array([one.step_s for one in measured])
    other *= other.sum() / (other @ other)
    ours = np.array([law.step_s(one.num_streams) / one.step_s for one in measured])
    assert ((ours - 1) ** 2).sum() <= ((other - 1) ** 2).sum() + 1e-9


def test_a_machine_with_falling_throughput_has_a_peak() -> None:
    law = fit_law(levels(lambda n: 0.01 * (1 + 0.1 * (n - 1) + 0.01 * n * (n - 1)), POWERS))
    assert law is not None
    assert law.coherency == pytest.approx(0.01)
    assert law.peak == pytest.approx((0.9 / 0.01) ** 0.5)
    rates = [n / law.step_s(n) for n in range(1, 65)]
    assert rates.index(max(rates)) + 1 == round(law.peak)


def test_without_coherency_throughput_never_falls() -> None:
    law = fit_law(levels(lambda n: 0.01 + 0.001 * n, POWERS))
    assert law is not None
    assert (law.coherency, law.peak) == (pytest.approx(0.0, abs=1e-9), inf) or law.peak > 10_000


def test_three_levels_are_too_few_for_a_fit() -> None:
    assert fit_law(levels(lambda n: 0.01 + 0.001 * n, (1, 2, 4))) is None


def test_an_outlier_makes_the_fit_unusable() -> None:
    law = fit_law(levels(lambda n: 0.1 if n == 4 else 0.02, POWERS))
    assert law is not None
    assert not law.is_good


def test_interpolation_is_linear_between_measured_steps() -> None:
    curve = Interpolation([level(2, 0.02), level(4, 0.03)])
    assert [curve.step_s(n) for n in (1, 2, 3, 4, 5)] == pytest.approx([0.02, 0.02, 0.025, 0.03, 0.03])


def test_a_step_gives_each_stream_one_token() -> None:
    assert level(8, 0.05).tokens_per_s == pytest.approx(160)
    assert level(8, 0.05).step_s == pytest.approx(0.05)
