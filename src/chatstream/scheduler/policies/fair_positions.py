"""Places in a fair line: estimates, because the order follows counters that are charged while people wait."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nextafter

from chatstream.scheduler.policies.fair_clients import Client, Waiter
from chatstream.scheduler.policies.sorted_keys import SortedKeys
from chatstream.scheduler.recent_mean import RecentMean

NUM_NEAR = 16
"""So many of the first requests of each client have places that follow its counter."""

DEFAULT_ANSWER_TOKENS = 200.0
"""Before anybody has ended."""


class FairPlaces:
    """Start-time fair queuing (Goyal et al. 1996), with equal tags for equal counters.

    Each request of a client is expected to start when its counter has been charged for those before it: that is its
    tag. The first requests of each client are in the near line, by their tags; those behind them are in the far line.
    Charges differ from expectations, so tags must follow the counter; but who has thousands waiting must not cost
    thousands of updates. Those who have begun are always near.
    """

    def __init__(self) -> None:
        self._near, self._far = SortedKeys(), SortedKeys()
        self._answer_tokens = RecentMean()

    def __iter__(self) -> Iterator[int]:
        """The `seq` of each, in order."""
        for line in (self._near, self._far):
            for _, seq in line.keys:
                yield seq

    def position(self, waiter: Waiter) -> int:
        return self._near.position(waiter.key) if waiter.is_near else len(self._near) + self._far.position(waiter.key)

    def add(self, waiter: Waiter) -> None:
        waiter.cost = self._expected_cost(waiter)
        client = waiter.client
        waiting, index = client.waiting, client.index(waiter)
        waiting.insert(index, waiter)
        if index < client.num_near or client.num_near < NUM_NEAR or not waiter.is_fresh:
            tag = client.tag(index)
            if index < client.num_near:
                tag = min(tag, nextafter(waiting[index + 1].key[0], -inf))
            client.num_near += 1
            self._set(waiter, tag, is_near=True)
        elif index + 1 < len(waiting):
            # Of equal tags the smaller seq is first.
            self._set(waiter, waiting[index + 1].key[0], is_near=False)
        else:
            self._set(waiter, client.tag(index), is_near=False)

    def remove(self, waiter: Waiter) -> None:
        client = waiter.client
        del client.waiting[client.index(waiter)]
        if not waiter.is_near:
            self._far.remove(waiter.key)
            return
        self._near.remove(waiter.key)
        client.num_near -= 1
        if client.num_near < min(NUM_NEAR, len(client.waiting)):
            first_far = client.waiting[client.num_near]
            self._far.remove(first_far.key)
            self._set(first_far, client.tag(client.num_near), is_near=True)
            client.num_near += 1

    def on_ended(self, client: Client, generated_tokens: int) -> None:
        """One that ran. Expectations may have been wrong, which matters from half a request on."""
        if generated_tokens:
            self._answer_tokens.add(generated_tokens)
        waiting = client.waiting
        # Of those who have begun about half is still to come.
        tag = client.counter + client.num_begun * self._expected_answer_tokens * client.token_cost / 2
        if not waiting or abs(waiting[0].key[0] - tag) <= waiting[0].cost / 2:
            return
        for waiter in waiting[: client.num_near]:
            self._near.remove(waiter.key)
            self._set(waiter, tag, is_near=True)
            tag += waiter.cost

    def _set(self, waiter: Waiter, tag: float, *, is_near: bool) -> None:
        waiter.key, waiter.is_near = (tag, waiter.request.seq), is_near
        (self._near if is_near else self._far).add(waiter.key)

    @property
    def _expected_answer_tokens(self) -> float:
        return self._answer_tokens.value or DEFAULT_ANSWER_TOKENS

    def _expected_cost(self, waiter: Waiter) -> float:
        request, client = waiter.request, waiter.client
        tokens = self._expected_answer_tokens
        if request.arrival.max_new_tokens is not None:
            tokens = min(tokens, request.arrival.max_new_tokens)
        cost = max(1.0, tokens - request.generated_tokens) * client.token_cost
        return cost if request.is_preempted else cost + request.arrival.prompt_tokens * client.prompt_cost
