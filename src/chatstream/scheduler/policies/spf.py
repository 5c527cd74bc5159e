"""Shortest predicted first, with ageing: most answers start sooner, and no long one waits for ever."""

from __future__ import annotations

from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.policies.predictor import HistoryPredictor, LengthPredictor
from chatstream.scheduler.request import LiveRequest


class SpfQueue(KeyedQueue):
    """One predicted token is worth `ageing_s_per_token` seconds of waiting.

    The key is arrival time + predicted tokens * `ageing_s_per_token`. So a request is passed only by shorter ones, and
    by one that is predicted to have n tokens less only if it comes within n * `ageing_s_per_token` seconds after it.
    """

    def __init__(self, ageing_s_per_token: float, predictor: LengthPredictor | None = None) -> None:
        super().__init__()
        self._ageing_s_per_token = ageing_s_per_token
        self._predictor = predictor if predictor is not None else HistoryPredictor()

    def key(self, request: LiveRequest) -> float:
        return request.admitted_s + self._ageing_s_per_token * self._predictor.predict(request.arrival)

    def end_run(self, request: LiveRequest) -> None:
        # One that somebody ended, or that failed before its first token, says nothing about the length of answers.
        if request.generated_tokens and not request.abort_by:
            self._predictor.observe(request.arrival, request.generated_tokens)
