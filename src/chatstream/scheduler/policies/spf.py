"""Shortest predicted answer first, with ageing: most requests start sooner, without starvation."""

from __future__ import annotations

from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.policies.predictor import HistoryPredictor, LengthPredictor
from chatstream.scheduler.request import LiveRequest


class SpfQueue(KeyedQueue):
    """One predicted token is worth `ageing_s_per_token` seconds of waiting.

    The key is admission time + predicted tokens * `ageing_s_per_token`. A request is passed only by requests with a
    shorter prediction: by one of n tokens less only if it arrives less than n * `ageing_s_per_token` seconds later.
    """

    def __init__(self, ageing_s_per_token: float, predictor: LengthPredictor | None = None) -> None:
        super().__init__()
        self._ageing_s_per_token = ageing_s_per_token
        self._predictor = predictor if predictor is not None else HistoryPredictor()

    def key(self, request: LiveRequest) -> float:
        return request.admitted_s + self._ageing_s_per_token * self._predictor.predict(request.arrival)

    def end_run(self, request: LiveRequest) -> None:
        # A cancelled request, or one that failed before its first token, does not show the length of answers.
        if request.generated_tokens and not request.abort_by:
            self._predictor.observe(request.arrival, request.generated_tokens)
