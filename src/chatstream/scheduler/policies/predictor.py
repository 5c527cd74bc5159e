"""How long an answer will be, guessed at the door: what `spf` sorts by."""

from __future__ import annotations

from collections import OrderedDict
from typing import Protocol

from chatstream.scheduler.recent_mean import RecentMean
from chatstream.scheduler.request import Arrival


class LengthPredictor(Protocol):
    """Guesses from what is known at the door. Called for every request, so it must take microseconds."""

    def predict(self, arrival: Arrival) -> float:
        """Tokens that the answer will have, at least 0 and finite. Only the order that follows from it matters."""

    def observe(self, arrival: Arrival, generated_tokens: int) -> None:
        """The answer has ended by itself, or at its `max_new_tokens`."""


class HistoryPredictor:
    """What answers had before: to everybody, to prompts of this length, to this client.

    Three recent means, each drawn towards the one before it while there is little to go by (shrinkage). An answer that
    was cut off at its allowance says only that it would have been longer, so it never lowers a mean. Memory is bounded:
    the clients that ended something last.
    """

    MAX_CLIENTS = 1024
    FIRST_GUESS_TOKENS = 200.0
    """Before anybody has ended, all are alike."""
    PRIOR_WEIGHT = 4.0
    """What the mean before says counts for so many answers."""

    def __init__(self) -> None:
        self._everybody = RecentMean()
        self._by_prompt: dict[int, RecentMean] = {}
        self._by_client: OrderedDict[str, RecentMean] = OrderedDict()

    @property
    def num_clients(self) -> int:
        """Clients of whom anything is remembered."""
        return len(self._by_client)

    def predict(self, arrival: Arrival) -> float:
        tokens = self._uncut(arrival)
        return tokens if arrival.max_new_tokens is None else min(tokens, arrival.max_new_tokens)

    def observe(self, arrival: Arrival, generated_tokens: int) -> None:
        tokens = float(generated_tokens)
        if arrival.max_new_tokens is not None and generated_tokens >= arrival.max_new_tokens:
            tokens = max(tokens, self._uncut(arrival))
        self._everybody.add(tokens)
        self._by_prompt.setdefault(_bucket(arrival), RecentMean()).add(tokens)
        self._by_client.setdefault(arrival.client, RecentMean()).add(tokens)
        self._by_client.move_to_end(arrival.client)
        if len(self._by_client) > self.MAX_CLIENTS:
            self._by_client.popitem(last=False)

    def _uncut(self, arrival: Arrival) -> float:
        tokens = self._everybody.drawn_to(self.FIRST_GUESS_TOKENS, self.PRIOR_WEIGHT)
        for known in (self._by_prompt.get(_bucket(arrival)), self._by_client.get(arrival.client)):
            if known is not None:
                tokens = known.drawn_to(tokens, self.PRIOR_WEIGHT)
        return tokens


def _bucket(arrival: Arrival) -> int:
    """Prompts within a factor of two are alike, so there are few buckets."""
    return min(arrival.prompt_tokens.bit_length(), 24)
