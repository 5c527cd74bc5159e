"""Durations of prompts and tokens, computed by hand for each kind of engine."""

from __future__ import annotations

import pytest

from chatstream.errors import ConfigError
from chatstream.simulation import Call, EngineModel
from tests.simulation.builders import run

ALONE = EngineModel(prefill_tokens_per_s=100.0, time_per_token_s=0.1)
SHARED = EngineModel(prefill_tokens_per_s=100.0, time_per_token_s=0.1, slowdown_per_slot=1.0)
CHUNKED = EngineModel(prefill_tokens_per_s=100.0, time_per_token_s=0.1, slowdown_per_slot=1.0, prefill_chunk_tokens=10)


def times(engine: EngineModel, *calls: Call, **settings: int) -> list[tuple[float, float]]:
    """Return (first token, end) of each call."""
    records = run(list(calls), engine=engine, **{"max_concurrency": 4} | settings).records
    return [(record.first_token_s or -1.0, record.ended_s or -1.0) for record in records]


def about(*pairs: tuple[float, float]) -> list[object]:
    return [pytest.approx(pair) for pair in pairs]


def test_a_generation_computes_its_prompt_and_then_its_answer() -> None:
    assert times(ALONE, Call(0.0, 200, 50)) == about((2.1, 7.0))


def test_independent_slots_do_not_slow_each_other() -> None:
    assert times(ALONE, Call(0.0, 200, 50), Call(0.0, 200, 50)) == about((2.1, 7.0), (2.1, 7.0))


def test_two_generations_on_one_processor_take_twice_as_long() -> None:
    assert times(SHARED, Call(0.0, 0, 10), Call(0.0, 0, 10)) == about((0.2, 2.0), (0.2, 2.0))


def test_the_end_of_one_generation_speeds_up_the_other() -> None:
    """Both generate at half speed until the short one ends at 2 s; the long one has 20 of 30 tokens left."""
    assert times(SHARED, Call(0.0, 0, 10), Call(0.0, 0, 30)) == about((0.2, 2.0), (0.2, 4.0))


def test_a_later_generation_slows_only_the_remaining_tokens() -> None:
    """1 s alone (10 tokens), then 20 tokens at half speed: 1 + 4 s."""
    assert times(SHARED, Call(0.0, 0, 30), Call(1.0, 0, 20)) == about((0.1, 5.0), (1.2, 5.0))


def test_in_a_batch_that_scales_partly_a_step_grows_with_its_generations() -> None:
    """A step takes 20 + 5 b ms: 25 ms for one, 40 ms for four."""
    batched = EngineModel(time_per_token_s=0.025, slowdown_per_slot=0.2)
    four = [Call(0.0, 0, 100)] * 4
    assert times(batched, *four) == about(*[(0.04, 4.0)] * 4)


def test_with_chunks_the_last_prompt_step_generates_the_first_token() -> None:
    assert times(CHUNKED, Call(0.0, 200, 51)) == about((2.0, 7.0))


def test_with_chunks_a_prompt_delays_each_step_by_one_chunk() -> None:
    """40 prompt tokens are 4 chunks; each step is 0.1 s for the chunk and 0.1 s for the other generation's token."""
    (_, first_end), (second_first, _) = times(CHUNKED, Call(0.0, 10, 21), Call(0.1, 40, 2))
    assert second_first == pytest.approx(0.1 + 4 * 0.2)
    # 4 tokens until then, then two tokens of both (0.2 s each), then alone: 20 tokens after its first one.
    assert first_end == pytest.approx(0.9 + 0.2 + 15 * 0.1)


def test_with_chunks_prompts_are_computed_one_after_the_other() -> None:
    first, second = times(CHUNKED, Call(0.0, 100, 1), Call(0.0, 100, 1))
    assert (first[0], second[0]) == (pytest.approx(1.0), pytest.approx(2.0))


@pytest.mark.parametrize("engine", [ALONE, SHARED, CHUNKED])
@pytest.mark.parametrize("grain", [1, 7, 1000])
def test_the_grain_of_reports_changes_no_time(engine: EngineModel, grain: int) -> None:
    calls = [Call(n * 0.7, 37 * n % 90, 1 + 13 * n % 60) for n in range(40)]
    ends = [record.ended_s for record in run(calls, engine=engine, max_concurrency=3).records]
    fine = run(calls, engine=engine, max_concurrency=3, simulation={"grain_tokens": grain, "grain_prompt_tokens": 5})
    assert [record.ended_s for record in fine.records] == [pytest.approx(end) for end in ends]


@pytest.mark.parametrize("engine", [ALONE, SHARED, CHUNKED])
def test_time_slices_and_progress_reports_do_not_change_the_total_work(engine: EngineModel) -> None:
    """Simultaneous calls on one slot: the last end is the total work, with and without slices."""
    calls = [Call(0.0, 40, 60)] * 5
    whole = run(calls, engine=engine, max_concurrency=1)
    cut = run(
        calls,
        engine=engine,
        max_concurrency=1,
        slice_tokens=4,
        max_resident=5,
        simulation={"grain_tokens": 4, "is_exact": True},
    )
    assert sum(record.num_preempted for record in cut.records) > 20
    assert cut.end_s == pytest.approx(whole.end_s)


@pytest.mark.parametrize("engine", [ALONE, SHARED, CHUNKED, EngineModel(time_per_token_s=1e-9)])
def test_an_answer_ends_even_when_two_tokens_have_the_same_float_time(engine: EngineModel) -> None:
    """At 1e17 s, two floats are 16 s apart."""
    times_s: list[float] = []

    def watch(now_s: float) -> None:
        times_s.append(now_s)
        assert len(times_s) < 1_000, "it never ends"

    calls = [Call(1e17, 200, 50)] * 5
    simulation = {"grain_tokens": 4, "grain_prompt_tokens": 64, "is_exact": True, "watch": watch}
    records = run(calls, engine=engine, max_concurrency=2, simulation=simulation).records
    assert [(record.end, record.generated_tokens, record.read_tokens) for record in records] == [
        ("finished", 50, 200)
    ] * 5


def test_capacity_is_the_throughput_of_a_saturated_engine() -> None:
    for engine in (ALONE, SHARED, CHUNKED, EngineModel(time_per_token_s=0.025, slowdown_per_slot=0.2)):
        calls = [Call(0.0, 50, 40)] * 400
        result = run(calls, engine=engine, max_concurrency=4)
        assert result.end_s / 400 == pytest.approx(engine.seconds_per_request(4, 50, 40), rel=0.03)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("prefill_tokens_per_s", 0.0),
        ("prefill_tokens_per_s", 1e-300),
        ("time_per_token_s", float("nan")),
        ("time_per_token_s", 1e300),
        ("slowdown_per_slot", -0.1),
        ("slowdown_per_slot", 1e300),
        ("prefill_chunk_tokens", 0),
    ],
)
def test_an_impossible_engine_is_refused_by_name(name: str, value: float) -> None:
    with pytest.raises(ConfigError) as caught:
        EngineModel(**{name: value})  # type: ignore[arg-type]
    assert caught.value.param == name
