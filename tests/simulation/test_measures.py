"""Figures, computed by hand."""

from __future__ import annotations

import pytest

from chatstream.scheduler import Eta
from chatstream.simulation import Call, CallRecord, EngineModel, Run, measure
from chatstream.simulation.measures import eta_figures, jain_index, max_min_shares, quantile

ENGINE = EngineModel(prefill_tokens_per_s=100.0, time_per_token_s=0.1)


def served(at_s: float, ttft_s: float, *, client: str = "", tokens: int = 10) -> CallRecord:
    """Return a finished call that started one second before its first token."""
    return CallRecord(
        Call(at_s, 100, tokens, client),
        attempts=1,
        admitted_s=at_s,
        started_s=at_s + ttft_s - 1.0,
        first_token_s=at_s + ttft_s,
        ended_s=at_s + ttft_s + 1,
        end="finished",
        generated_tokens=tokens,
        read_tokens=100,
    )


def rejected(at_s: float, *, client: str = "") -> CallRecord:
    return CallRecord(Call(at_s, 100, 10, client), attempts=2, ended_s=at_s, end="queue_full")


def run_of(*records: CallRecord) -> Run:
    return Run(list(records), [], end_s=10.0, busy_slot_s=8.0, num_events=0)


def test_attainment_covers_all_offered_calls() -> None:
    run = run_of(served(0, 3), served(2, 7), rejected(4), served(6, 3))
    figures = measure(run, ttft_slo_s=5.0, engine=ENGINE, num_slots=2, warm_up=0)
    assert (figures.offered, figures.good, figures.finished, figures.refused) == (4, 2, 3, 1)
    assert figures.attainment == 0.5
    # One request is 1 s of prompt and 1 s of answer: two slots do one request a second.
    assert figures.goodput_ratio == pytest.approx(2 / 6)
    assert figures.load == pytest.approx(4 / 6)
    assert figures.utilisation == pytest.approx(0.4)
    assert figures.attempts_per_request == pytest.approx(5 / 4)
    assert (figures.wait_p50_s, figures.ttft_p50_s, figures.ttft_p99_s) == (2.0, 3.0, 7.0)


def test_the_first_tenth_is_excluded_as_warm_up() -> None:
    records = [rejected(n) for n in range(2)] + [served(n, 1) for n in range(2, 20)]
    assert measure(run_of(*records), ttft_slo_s=5.0, engine=ENGINE, num_slots=1).attainment == 1.0


def test_a_failed_answer_is_not_good_despite_a_timely_first_token() -> None:
    record = served(0, 1)
    record.end = "failed"
    figures = measure(run_of(record, served(1, 1)), ttft_slo_s=5.0, engine=ENGINE, num_slots=1, warm_up=0)
    assert figures.good == 1


def test_simultaneous_calls_have_no_rate_and_no_load() -> None:
    for records in ([served(3, 1)], [served(3, 1), served(3, 2)]):
        figures = measure(run_of(*records), ttft_slo_s=5.0, engine=ENGINE, num_slots=2, warm_up=0)
        assert (figures.attainment, figures.duration_s) == (1.0, 0.0)
        assert (figures.load, figures.goodput_per_s, figures.goodput_ratio) == (None, None, None)


def test_max_min_shares_are_filled_equally_up_to_the_demand() -> None:
    assert max_min_shares({"a": 10, "b": 4, "c": 1}, 9) == {"c": 1, "b": 4, "a": 4}
    assert max_min_shares({"a": 1, "b": 1}, 5) == {"a": 1, "b": 1}
    assert max_min_shares({}, 5) == {}


def test_a_greedy_client_with_its_fair_share_is_served_fairly() -> None:
    records = [served(n, 1, client="greedy") if n < 2 else rejected(n, client="greedy") for n in range(10)]
    records += [served(10 + n, 1, client="modest") for n in range(2)]
    figures = measure(run_of(*records), ttft_slo_s=5.0, engine=ENGINE, num_slots=1, warm_up=0)
    assert figures.jain == figures.worst_share == 1.0
    assert [one.client for one in figures.clients] == ["greedy", "modest"]
    assert [one.attainment for one in figures.clients] == [0.2, 1.0]


def test_a_starved_client_shows_in_the_worst_share() -> None:
    records = [served(n, 1, client=f"c{n}") for n in range(9)] + [rejected(9, client="starved")]
    figures = measure(run_of(*records), ttft_slo_s=5.0, engine=ENGINE, num_slots=1, warm_up=0)
    assert figures.worst_share == 0.0
    assert figures.jain > 0.85


def test_jain_index() -> None:
    assert jain_index([1, 1, 1, 1]) == 1.0
    assert jain_index([1, 0, 0, 0]) == 0.25


def test_quantiles_are_values_that_occurred() -> None:
    assert quantile([], 0.5) is None
    assert quantile([1.0], 0.99) == 1.0
    assert quantile([1.0, 2.0, 3.0, 4.0], 0.5) == 3.0


def test_eta_errors_cover_waits_of_at_least_a_second() -> None:
    records = [served(0, 11), served(0, 21), served(0, 1.5), served(0, 6)]
    for record, eta in zip(records, (Eta(8, 12), Eta(22, 30), Eta(50, 60), None), strict=True):
        record.eta = eta
    figures = eta_figures(records)
    assert figures is not None
    assert figures.measured == 2
    assert figures.median_error_ratio == pytest.approx((2 / 10 + 2 / 20) / 2)
    assert figures.mean_error_ratio == pytest.approx(2 / 15)
    assert figures.bias_ratio == pytest.approx(0.0)
    assert figures.p90_coverage == 1.0
    assert eta_figures([served(0, 11)]) is None
