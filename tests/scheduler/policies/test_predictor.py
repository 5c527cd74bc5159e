"""`HistoryPredictor`: predictions before and after observations."""

from __future__ import annotations

import random

import pytest

from chatstream.scheduler import Arrival
from chatstream.scheduler.policies.predictor import HistoryPredictor


def arrival(client: str = "a", prompt_tokens: int = 100, max_new_tokens: int | None = None) -> Arrival:
    return Arrival(request_id="r", client=client, prompt_tokens=prompt_tokens, max_new_tokens=max_new_tokens)


def test_the_first_prediction_is_a_constant_capped_by_max_new_tokens() -> None:
    predictor = HistoryPredictor()
    assert predictor.predict(arrival("a")) == predictor.predict(arrival("b")) == predictor.FIRST_GUESS_TOKENS
    assert predictor.predict(arrival(max_new_tokens=16)) == 16


def test_predictions_differ_by_client_after_a_few_answers() -> None:
    predictor = HistoryPredictor()
    rng = random.Random(1)
    for _ in range(30):
        predictor.observe(arrival("brief"), rng.randint(10, 30))
        predictor.observe(arrival("wordy"), rng.randint(400, 800))
    assert predictor.predict(arrival("brief")) < 100
    assert predictor.predict(arrival("wordy")) > 450
    assert 200 < predictor.predict(arrival("new")) < 400


def test_one_answer_changes_the_prediction_for_its_client_only_partly() -> None:
    predictor = HistoryPredictor()
    for n in range(30):
        predictor.observe(arrival(f"c{n}"), 100)
    predictor.observe(arrival("once"), 1000)
    assert 100 < predictor.predict(arrival("once")) < 400


def test_predictions_differ_by_prompt_length() -> None:
    predictor = HistoryPredictor()
    for n in range(50):
        predictor.observe(arrival(f"c{n}", prompt_tokens=20), 500)
        predictor.observe(arrival(f"d{n}", prompt_tokens=5000), 30)
    assert predictor.predict(arrival("new", prompt_tokens=25)) > 400
    assert predictor.predict(arrival("new", prompt_tokens=6000)) < 100


def test_an_answer_cut_off_at_max_new_tokens_does_not_lower_the_prediction() -> None:
    predictor = HistoryPredictor()
    for _ in range(20):
        predictor.observe(arrival("a"), 300)
    before = predictor.predict(arrival("a"))
    for _ in range(20):
        predictor.observe(arrival("a", max_new_tokens=5), 5)
    assert predictor.predict(arrival("a")) == pytest.approx(before, rel=0.01)
    predictor.observe(arrival("a", max_new_tokens=5), 4)
    assert predictor.predict(arrival("a")) < before


def test_predictions_follow_a_change_of_lengths() -> None:
    predictor = HistoryPredictor()
    for tokens in (1000, 50):
        for _ in range(300):
            predictor.observe(arrival(), tokens)
    assert predictor.predict(arrival()) < 100


def test_only_the_latest_clients_are_kept() -> None:
    predictor = HistoryPredictor()
    for n in range(3 * predictor.MAX_CLIENTS):
        predictor.observe(arrival(f"c{n}"), 10)
        predictor.observe(arrival("regular"), 1000)
    assert predictor.num_clients == predictor.MAX_CLIENTS
    assert predictor.predict(arrival("regular")) > 800
