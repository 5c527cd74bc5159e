"""The line of step times: what is known of an engine from its gaps, and when nothing is."""

from __future__ import annotations

from random import Random

import pytest

from chatstream.scheduler.limits.step_time import StepTime


def test_the_line_is_the_one_the_points_lie_on() -> None:
    steps = StepTime()
    for running in (1, 4, 8, 2, 7):
        steps.add(running, 0.020 + 0.005 * running)
    line = steps.fit()
    assert line is not None
    assert (line.fixed_s, line.per_slot_s) == (pytest.approx(0.020), pytest.approx(0.005))
    assert steps.slot_gain(8) == pytest.approx(20 / 65)


def test_there_is_no_line_while_all_points_are_at_one_place_or_are_too_noisy() -> None:
    steps = StepTime()
    for _ in range(50):
        steps.add(8, 0.060)
    assert steps.fit() is None
    assert steps.slot_gain(8) is None
    jitter = Random(1)
    for _ in range(20):
        steps.add(jitter.choice([7, 8]), 0.060 * jitter.uniform(0.8, 1.2))
    assert steps.fit() is None


def test_the_line_never_says_that_more_take_less_or_that_nobody_takes_less_than_nothing() -> None:
    steps = StepTime()
    for running in (1, 4, 8, 2, 7) * 3:
        steps.add(running, 0.100 - 0.005 * running)
    assert steps.slot_gain(4) == pytest.approx(1.0)
    steps = StepTime()
    for running in (4, 8, 5, 7) * 3:
        steps.add(running, 0.010 * running - 0.020)
    assert steps.slot_gain(4) == 0.0


def test_the_line_is_scaled_when_the_engine_changes_its_speed() -> None:
    steps = StepTime()
    for running in (2, 4, 6, 8):
        steps.add(running, 0.020 + 0.005 * running)
    for _ in range(2):
        steps.add(8, 0.120)
    line = steps.fit()
    assert line is not None
    assert (line.fixed_s, line.per_slot_s) == (pytest.approx(0.040, rel=0.02), pytest.approx(0.010, rel=0.02))


def test_a_jump_with_more_running_is_not_taken_for_a_change_of_speed() -> None:
    """It was once: a wrong line was scaled to every new point instead of being corrected by it."""
    steps = StepTime()
    for running in (1, 2, 1, 4, 2, 8, 1, 8):
        steps.add(running, 0.010 * running)
    assert steps.slot_gain(4) == pytest.approx(0.0, abs=1e-9)
