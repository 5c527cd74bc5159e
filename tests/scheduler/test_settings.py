"""Every setting refuses an invalid value by name, and accepts the values at its bounds."""

from __future__ import annotations

from math import inf, nan
from typing import Any

import pytest

from chatstream.errors import ConfigError
from chatstream.scheduler import QUEUES, SchedulerSettings
from chatstream.scheduler.settings import AUTO_CEILING, AUTO_START, MAX_COUNT

COUNTS = {
    "max_concurrency": 1,
    "max_queue_size": 0,
    "max_waiting_tokens": 1,
    "max_running_per_client": 1,
    "max_waiting_per_client": 0,
    "slice_tokens": 1,
    "max_attempts": 1,
    "min_concurrency": 1,
}
"""Settings that are counts, with their minimum."""
SECONDS = ("max_wait_s", "ttft_slo_s", "stall_timeout_s", "abort_timeout_s")
ABOVE_0 = ("itl_target_s", "ageing_s", "spf_ageing_s_per_token")


def refused(**settings: Any) -> ConfigError:
    with pytest.raises(ConfigError) as caught:
        SchedulerSettings(**settings)
    [name] = settings.keys() - {"max_concurrency"} or ["max_concurrency"]
    assert caught.value.param == name
    return caught.value


@pytest.mark.parametrize(("name", "least"), COUNTS.items())
def test_a_count_is_a_whole_number_within_bounds(name: str, least: int) -> None:
    assert getattr(SchedulerSettings(**{name: least}), name) == least
    has_no_maximum = name == "max_waiting_tokens"
    auto = '"auto" or ' if name == "max_queue_size" else ""
    bounds = f", at least {least}" if has_no_maximum else f" between {least} and 1,000,000"
    for wrong in (least - 1, 1.5, True, "many"):
        assert refused(**{name: wrong}).message == f"{name} must be {auto}a whole number{bounds}, not {wrong!r}"
    if has_no_maximum:
        assert SchedulerSettings(max_waiting_tokens=10 * MAX_COUNT).max_waiting_tokens == 10 * MAX_COUNT
    else:
        assert refused(**{name: MAX_COUNT + 1}).message == f"{name} must be {auto}a whole number{bounds}, not 1000001"


@pytest.mark.parametrize("name", SECONDS)
def test_a_time_is_above_0_or_none(name: str) -> None:
    assert getattr(SchedulerSettings(**{name: None}), name) is None
    assert getattr(SchedulerSettings(**{name: 0.001}), name) == 0.001
    for wrong in (0, -1.0, inf, nan, "5", True):
        assert refused(**{name: wrong}).message == f"{name} must be a number of seconds above 0, not {wrong!r}"


@pytest.mark.parametrize("name", ABOVE_0)
def test_a_number_that_divides_is_above_0_and_finite(name: str) -> None:
    assert getattr(SchedulerSettings(**{name: 0.001}), name) == 0.001
    for wrong in (0.0, -1.0, inf, nan, True, "much", None):
        kind = "number" if name == "spf_ageing_s_per_token" else "number of seconds"
        assert refused(**{name: wrong}).message == f"{name} must be a {kind} above 0, not {wrong!r}"


def test_a_probability_is_from_0_to_1() -> None:
    for good in (0.0, 1.0):
        assert SchedulerSettings(admit_probability=good).admit_probability == good
    for wrong in (-0.001, 1.001, nan):
        message = f"admit_probability must be a number between 0 and 1, not {wrong!r}"
        assert refused(admit_probability=wrong).message == message


def test_an_unknown_choice_is_refused() -> None:
    for policy in QUEUES:
        assert SchedulerSettings(policy=policy).policy == policy
    for wrong in ("lifo", None, ["fcfs"]):
        message = f"policy must be one of fcfs, priority, fair, fair-token, spf, not {wrong!r}"
        assert refused(policy=wrong).message == message
    for adaptive in ("off", "on"):
        assert SchedulerSettings(adaptive=adaptive).is_adaptive == (adaptive == "on")  # type: ignore[arg-type]
    for wrong in ("suggest", True, None):
        assert refused(adaptive=wrong).message == f"adaptive must be one of off, on, not {wrong!r}"
    bounds = "between 0 and 1,000,000"
    assert (
        refused(max_queue_size="Auto").message
        == f"max_queue_size must be \"auto\" or a whole number {bounds}, not 'Auto'"
    )


def test_limits_agree_with_each_other() -> None:
    assert SchedulerSettings(max_concurrency=3, min_concurrency=3, max_resident=3).max_resident == 3
    error = refused(max_concurrency=3, min_concurrency=4)
    assert error.message == "min_concurrency must be at most max_concurrency (3), not 4"
    error = refused(max_concurrency=3, max_resident=2)
    assert error.message == "max_resident must be at least max_concurrency (3), not 2"
    assert refused(max_resident=AUTO_CEILING - 1, max_concurrency="auto").message.startswith("max_resident")
    assert refused(max_resident=0).message == "max_resident must be a whole number between 1 and 1,000,000, not 0"


def test_automatic_limits_start_small_and_have_a_ceiling() -> None:
    settings = SchedulerSettings(max_concurrency="auto")
    assert settings.is_adaptive
    assert (settings.first_concurrency, settings.highest_concurrency) == (AUTO_START, AUTO_CEILING)
    assert SchedulerSettings(max_concurrency="auto", min_concurrency=9).first_concurrency == 9
    settings = SchedulerSettings(max_concurrency=3)
    assert (settings.first_concurrency, settings.highest_concurrency) == (3, 3)
    assert refused(min_concurrency=AUTO_CEILING + 1, max_concurrency="auto").message.startswith("min_concurrency")


def test_weights_are_positive_numbers_by_client() -> None:
    assert SchedulerSettings(client_weights={"a": 0.5}).client_weights == {"a": 0.5}
    assert refused(client_weights=["a"]).message == "client_weights must be a mapping of clients to numbers"
    with pytest.raises(ConfigError, match=r"^client_weights\['a'\] must be a number above 0, not 0\.0$") as caught:
        SchedulerSettings(client_weights={"a": 0.0})
    assert caught.value.param == "client_weights['a']"
