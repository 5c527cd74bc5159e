"""Synthetic workloads: deterministic by seed, with the requested load and the documented statistics."""

from __future__ import annotations

import statistics
from collections import Counter
from dataclasses import replace

import pytest

from chatstream.errors import ConfigError
from chatstream.simulation import WORKLOADS, Call, EngineModel

ENGINE = EngineModel()


def load_of(calls: list[Call], slots: int) -> float:
    prompt = statistics.fmean(call.prompt_tokens for call in calls)
    answer = statistics.fmean(call.output_tokens for call in calls)
    return len(calls) / calls[-1].at_s * ENGINE.seconds_per_request(slots, prompt, answer)


@pytest.mark.parametrize("name", WORKLOADS)
def test_same_seed_same_calls_in_order(name: str) -> None:
    first, second, other = (
        WORKLOADS[name].calls_at_load(0.7, ENGINE, 4, seed=seed, duration_s=500) for seed in (1, 1, 2)
    )
    assert first == second != other
    assert first == sorted(first, key=lambda call: call.at_s)
    assert first[0].at_s >= 0
    assert all(call.output_tokens >= 1 and call.prompt_tokens >= 1 for call in first)


@pytest.mark.parametrize("name", [name for name in WORKLOADS if name not in ("abuse", "spike")])
def test_the_load_is_exact(name: str) -> None:
    calls = WORKLOADS[name].calls_at_load(1.3, ENGINE, 4, seed=5, duration_s=20_000)
    assert load_of(calls, 4) == pytest.approx(1.3, rel=0.02)


@pytest.mark.parametrize("name", WORKLOADS)
def test_lengths_have_the_documented_mean(name: str) -> None:
    workload = replace(WORKLOADS[name], abuser_load=0.0)
    calls = workload.calls_at_rate(1.0, seed=1, duration_s=30_000)
    answer = statistics.fmean(call.output_tokens for call in calls)
    assert answer == pytest.approx(workload.output.mean, rel=0.05)
    prompt = statistics.fmean(call.prompt_tokens for call in calls)
    assert prompt == pytest.approx(workload.prompt.mean, rel=0.08)


def test_conv_has_the_quantiles_of_the_trace() -> None:
    calls = WORKLOADS["conv"].calls_at_rate(1.0, seed=1, duration_s=30_000)
    answers = sorted(call.output_tokens for call in calls)
    for q, tokens in ((0.25, 85), (0.5, 129), (0.75, 395), (0.95, 451)):
        assert answers[int(q * len(answers))] == pytest.approx(tokens, rel=0.05)


def dispersion(calls: list[Call], window_s: float) -> float:
    """Return the index of dispersion of the calls per window: 1 for Poisson arrivals."""
    counts = Counter(int(call.at_s / window_s) for call in calls)
    numbers = [counts[i] for i in range(int(calls[-1].at_s / window_s))]
    return statistics.pvariance(numbers) / statistics.fmean(numbers)


def test_each_workload_has_its_burstiness() -> None:
    calls = {name: WORKLOADS[name].calls_at_rate(1.0, seed=1, duration_s=30_000) for name in WORKLOADS}
    assert dispersion(calls["sharegpt"], 300) == pytest.approx(1.0, abs=0.3)
    assert 12 < dispersion(calls["conv"], 332) < 30
    assert dispersion(calls["code"], 332) > 30


def test_a_spike_is_five_times_the_rate_for_two_minutes() -> None:
    calls = WORKLOADS["spike"].calls_at_load(0.7, ENGINE, 4, seed=1, duration_s=3600)
    inside = sum(600 <= call.at_s < 720 for call in calls) / 120
    outside = sum(not 600 <= call.at_s < 720 for call in calls) / (calls[-1].at_s - 120)
    assert inside / outside == pytest.approx(5, rel=0.15)


def test_the_abuser_has_ten_times_the_capacity_and_the_others_half() -> None:
    calls = WORKLOADS["abuse"].calls_at_load(0.5, ENGINE, 4, seed=1, duration_s=3600)
    abuse = [call for call in calls if call.client == "abuser"]
    others = [call for call in calls if call.client != "abuser"]
    assert load_of(abuse, 4) == pytest.approx(10, rel=0.03)
    assert load_of(others, 4) == pytest.approx(0.5, rel=0.05)
    assert len({call.client for call in others}) > 40


def test_few_clients_have_most_of_the_demand() -> None:
    calls = WORKLOADS["conv"].calls_at_rate(1.0, seed=1, duration_s=20_000)
    counts = Counter(call.client for call in calls)
    assert counts["client 1"] / len(calls) == pytest.approx(0.3, abs=0.03)
    assert counts["client 1"] > counts["client 2"] > counts["client 10"] > counts["client 50"] > 0


def test_too_many_calls_are_refused() -> None:
    with pytest.raises(ConfigError, match="requests"):
        WORKLOADS["conv"].calls_at_rate(1e6, seed=1, duration_s=3600)
