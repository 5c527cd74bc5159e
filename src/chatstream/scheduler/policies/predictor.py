"""Predictions of answer length at arrival, for `spf`."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from chatstream.scheduler.recent_mean import RecentMean
from chatstream.scheduler.request import Arrival


class LengthPredictor(Protocol):
    """Predicts from the arrival. Both methods are called for every request and must take microseconds."""

    def predict(self, arrival: Arrival) -> float:
        """The expected number of answer tokens, finite and at least 0. `spf` uses the differences between requests."""

    def observe(self, arrival: Arrival, generated_tokens: int) -> None:
        """Learn from an answer that ended by itself or at its `max_new_tokens`."""


class HistoryPredictor:
    """Predicts from earlier answers: of all requests, of prompts of this length, of this client.

    Three recent means, each shrunk towards the previous one while it has few observations. An answer that was cut off
    at `max_new_tokens` never lowers a mean: its full length is unknown. Only the last `MAX_CLIENTS` clients to finish
    an answer are kept.
    """

    MAX_CLIENTS = 1024
    FIRST_GUESS_TOKENS = 200.0
    """The prediction before the first observation."""
    PRIOR_WEIGHT = 4.0
    """The previous mean counts as this many observations."""

    def __init__(self) -> None:
        self._overall = RecentMean()
        self._by_prompt: dict[int, RecentMean] = {}
        self._by_client: OrderedDict[str, RecentMean] = OrderedDict()

    @property
    def num_clients(self) -> int:
        """Number of clients with observations."""
        return len(self._by_client)

    def predict(self, arrival: Arrival) -> float:
        tokens = self._uncapped(arrival)
        return tokens if arrival.max_new_tokens is None else min(tokens, arrival.max_new_tokens)

    def observe(self, arrival: Arrival, generated_tokens: int) -> None:
        tokens = float(generated_tokens)
        if arrival.max_new_tokens is not None and generated_tokens >= arrival.max_new_tokens:
            tokens = max(tokens, self._uncapped(arrival))
        self._overall.add(tokens)
        self._by_prompt.setdefault(_bucket(arrival), RecentMean()).add(tokens)
        self._by_client.setdefault(arrival.client, RecentMean()).add(tokens)
        self._by_client.move_to_end(arrival.client)
        if len(self._by_client) > self.MAX_CLIENTS:
            self._by_client.popitem(last=False)

    def _uncapped(self, arrival: Arrival) -> float:
        tokens = self._overall.drawn_to(self.FIRST_GUESS_TOKENS, self.PRIOR_WEIGHT)
        for known in (self._by_prompt.get(_bucket(arrival)), self._by_client.get(arrival.client)):
            if known is not None:
                tokens = known.drawn_to(tokens, self.PRIOR_WEIGHT)
        return tokens


def _bucket(arrival: Arrival) -> int:
    """Prompt lengths within a factor of two share a bucket."""
    return min(arrival.prompt_tokens.bit_length(), 24)
