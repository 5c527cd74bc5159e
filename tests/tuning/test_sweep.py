"""The sweep, in virtual time, recovers the parameters of a simulated machine."""

from __future__ import annotations

import asyncio
from math import inf
from typing import Any

import pytest

from chatstream.errors import ConfigError, EngineError
from chatstream.testing import run_virtual
from chatstream.tuning import Sweep, SweepSettings, sweep
from tests.tuning.machine import Machine


def measured(machine: Machine, **settings: Any) -> Sweep:
    """Run a sweep, and check that it keeps its time limit and leaves nothing running."""

    async def main() -> Sweep:
        loop = asyncio.get_running_loop()
        found = await sweep(machine, limits := SweepSettings(**settings))
        assert loop.time() <= limits.seconds + 1e-9
        assert machine.num_active == 0
        return found

    return run_virtual(main())


def numbers(found: Sweep) -> list[int]:
    return [level.num_streams for level in found.levels]


def test_the_law_is_recovered_and_the_recommendation_is_right() -> None:
    found = measured(Machine(lambda n: 0.02 + 0.005 * n))
    for level in found.levels:
        step_s = 0.02 + 0.005 * level.num_streams
        assert level.tokens_per_s == pytest.approx(level.num_streams / step_s, rel=1e-3)
        assert (level.itl_p50_s, level.itl_p99_s) == pytest.approx((step_s, step_s), rel=1e-3)
    law = found.recommendation.law
    assert law is not None
    assert law.alone_s == pytest.approx(0.025, rel=1e-3)
    assert law.contention == pytest.approx(0.2, rel=1e-2)
    assert not found.engine_failed
    assert 15 <= found.recommendation.max_concurrency <= 16  # with 16 a step is 100 ms, the target
    assert numbers(found)[:5] == [1, 2, 4, 8, 15] or numbers(found)[:5] == [1, 2, 4, 8, 16]


def test_the_recommended_level_is_measured() -> None:
    found = measured(Machine(lambda n: 0.02 + 0.005 * n), itl_target_s=0.0751)
    assert found.recommendation.max_concurrency == 11
    assert found.recommendation.is_measured
    assert numbers(found) == [1, 2, 4, 8, 11, 16, 32]


def test_falling_throughput_is_fitted_with_a_peak() -> None:
    found = measured(Machine(lambda n: 0.01 + 0.001 * n + 0.00005 * n * n), itl_target_s=1.0)
    law = found.recommendation.law
    assert law is not None
    assert law.peak == pytest.approx(14.1, abs=0.5)
    assert 10 <= found.recommendation.max_concurrency <= 14


def test_a_joining_request_is_timed_and_its_prompt_shows_in_the_gaps() -> None:
    found = measured(Machine(lambda n: 0.02, prefill_s=0.03), max_streams=8, answer_tokens=50)
    at_8 = found.levels[-1]
    assert at_8.num_streams == 8
    # Eight streams join once in 50 steps each, so every sixth step has a prompt.
    assert at_8.itl_p50_s == pytest.approx(0.02)
    assert at_8.itl_p90_s == pytest.approx(0.05)
    assert 0.05 <= at_8.ttft_s <= 0.07
    assert at_8.tokens_per_s == pytest.approx(8 / (0.02 + 0.03 * 8 / 50), rel=0.03)


def test_the_number_of_streams_is_constant_although_answers_end_early() -> None:
    found = measured(Machine(lambda n: 0.02, ends_after=3), max_streams=4)
    assert [level.tokens_per_s for level in found.levels] == pytest.approx([50, 100, 200], rel=0.05)


def test_the_ends_of_the_answers_are_spread_evenly() -> None:
    machine = Machine(lambda n: 0.02, prefill_s=0.01)
    at_16 = measured(machine, max_streams=16, answer_tokens=100).levels[-1]
    assert at_16.itl_p99_s <= 0.04 + 1e-9  # at most two joins in one step


def test_prompts_are_distinct_and_have_the_requested_length() -> None:
    machine = Machine(lambda n: 0.02)
    measured(machine, max_streams=4, prompt_tokens=40)
    assert {len(prompt.token_ids) for prompt in machine.prompts} == {40}
    assert len({prompt.token_ids[:8] for prompt in machine.prompts}) == len(machine.prompts) > 20


def test_the_capacity_of_the_engine_is_the_highest_level() -> None:
    machine = Machine(lambda n: 0.02, max_concurrency=6)
    found = measured(machine)
    assert numbers(found) == [1, 2, 4, 6]
    assert machine.most_active == 6
    assert "this is the capacity of the engine" in found.recommendation.why[1]


def test_the_sweep_ends_when_throughput_stops_growing() -> None:
    found = measured(Machine(lambda n: 0.02 * n), itl_target_s=10.0)
    assert numbers(found) == [1, 2, 4, 8]
    assert found.why_ended == "two doublings in a row gained less than 5% tokens/s"


def test_the_sweep_ends_far_beyond_the_target_after_the_minimum_of_levels() -> None:
    found = measured(Machine(lambda n: 0.25 + 0.01 * n))
    assert numbers(found) == [1, 2, 4, 8]
    assert found.why_ended == "the median gap exceeded 2 times the target"
    assert not found.recommendation.keeps_target


def test_the_sweep_keeps_its_time_limit_and_reports_it() -> None:
    found = measured(Machine(lambda n: 0.5), seconds=30.0, itl_target_s=1.0)
    assert found.why_ended == "the time limit was reached"
    assert numbers(found)[0] == 1
    assert max(numbers(found)) < 64
    assert (
        f"More than {max(numbers(found))} streams were not tried: the time limit was reached."
        in found.recommendation.why
    )


def test_a_time_limit_too_short_for_one_stream_is_refused() -> None:
    with pytest.raises(ConfigError, match="seconds: 3 are too few") as caught:
        measured(Machine(lambda n: 1.0), seconds=3.0)
    assert caught.value.param == "seconds"


def test_a_failure_with_many_streams_ends_the_sweep() -> None:
    machine = Machine(lambda n: 0.02, fails_with=lambda n: EngineError("out of memory") if n > 5 else None)
    found = measured(machine)
    assert numbers(found) == [1, 2, 4]
    assert (found.why_ended, found.engine_failed) == ("the engine failed: out of memory", True)
    assert found.recommendation.max_concurrency == 4


def test_a_failure_with_one_stream_is_raised() -> None:
    with pytest.raises(EngineError, match="the engine failed: ZeroDivisionError: by zero"):
        measured(Machine(lambda n: 0.02, fails_with=lambda n: ZeroDivisionError("by zero")))


def test_an_engine_without_tokens_is_an_error() -> None:
    class Silent(Machine):
        async def stream(self, request: Any) -> Any:
            await asyncio.sleep(0.1)
            for _ in ():
                yield

    with pytest.raises(EngineError, match="without a token"):
        measured(Silent(lambda n: 0.02))


def test_a_cancelled_sweep_leaves_nothing_running() -> None:
    async def main() -> None:
        machine = Machine(lambda n: 0.02)
        task = asyncio.create_task(sweep(machine, SweepSettings()))
        await asyncio.sleep(15.0)
        assert machine.num_active > 4
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert machine.num_active == 0
        assert len(asyncio.all_tasks()) <= 2  # this task and the clock of the machine

    run_virtual(main())


def test_prompt_and_answer_must_fit_the_context() -> None:
    with pytest.raises(ConfigError, match="context of 100 tokens") as caught:
        measured(Machine(lambda n: 0.02, context_len=100), prompt_tokens=64, answer_tokens=40)
    assert caught.value.param == "prompt_tokens"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_streams", 0),
        ("max_streams", 5000),
        ("prompt_tokens", 0),
        ("answer_tokens", 0),
        ("seconds", 0.0),
        ("seconds", inf),
        ("itl_target_s", 0.0),
    ],
)
def test_invalid_settings_are_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        SweepSettings(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
