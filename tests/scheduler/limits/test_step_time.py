"""The fit of the step time to the number of running requests."""

from __future__ import annotations

from random import Random

import pytest

from chatstream.scheduler.limits.step_time import StepTime


def test_points_on_a_line_are_fitted_exactly() -> None:
    steps = StepTime()
    for running in (1, 4, 8, 2, 7):
        steps.add(running, 0.020 + 0.005 * running)
    fit = steps.fit()
    assert fit is not None
    assert (fit.fixed_s, fit.per_slot_s) == (pytest.approx(0.020), pytest.approx(0.005))
    assert steps.slot_gain(8) == pytest.approx(20 / 65)


def test_there_is_no_fit_without_variation_or_with_too_much_noise() -> None:
    steps = StepTime()
    for _ in range(50):
        steps.add(8, 0.060)
    assert steps.fit() is None
    assert steps.slot_gain(8) is None
    jitter = Random(1)
    for _ in range(20):
        steps.add(jitter.choice([7, 8]), 0.060 * jitter.uniform(0.8, 1.2))
    assert steps.fit() is None


def test_neither_the_slope_nor_the_constant_is_negative() -> None:
    steps = StepTime()
    for running in (1, 4, 8, 2, 7) * 3:
        steps.add(running, 0.100 - 0.005 * running)
    assert steps.slot_gain(4) == pytest.approx(1.0)
    steps = StepTime()
    for running in (4, 8, 5, 7) * 3:
        steps.add(running, 0.010 * running - 0.020)
    assert steps.slot_gain(4) == 0.0


def test_the_fit_is_scaled_when_the_engine_changes_its_speed() -> None:
    steps = StepTime()
    for running in (2, 4, 6, 8):
        steps.add(running, 0.020 + 0.005 * running)
    for _ in range(2):
        steps.add(8, 0.120)
    fit = steps.fit()
    assert fit is not None
    assert (fit.fixed_s, fit.per_slot_s) == (pytest.approx(0.040, rel=0.02), pytest.approx(0.010, rel=0.02))


def test_a_jump_with_more_running_is_not_taken_for_a_change_of_speed() -> None:
    """A wrong fit was once scaled to every new point instead of being corrected by it."""
    steps = StepTime()
    for running in (1, 2, 1, 4, 2, 8, 1, 8):
        steps.add(running, 0.010 * running)
    assert steps.slot_gain(4) == pytest.approx(0.0, abs=1e-9)
