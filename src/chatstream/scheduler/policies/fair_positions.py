"""Positions in a fair queue: estimates, because its order follows counters that change while requests wait."""

from __future__ import annotations

from collections.abc import Iterator
from math import inf, nextafter

from chatstream.scheduler.policies.fair_clients import Client, Entry
from chatstream.scheduler.policies.sorted_keys import SortedKeys
from chatstream.scheduler.recent_mean import RecentMean

NUM_NEAR = 16
"""The tags of the first requests of each client, up to this number, follow its counter."""

DEFAULT_ANSWER_TOKENS = 200.0
"""The expected answer length before the first request has ended."""


class FairPositions:
    """Start-time fair queuing (Goyal et al. 1996), with the counters of the clients as virtual time.

    The start tag of a request is the expected counter of its client when the earlier requests of the client have been
    charged. Charges differ from expectations, so tags must follow the counter; a client with thousands of waiting
    requests must not cost thousands of updates. So only the first `NUM_NEAR` requests of each client are near: their
    tags are updated. All others are far: they are behind every near request, and their tags stay. Preempted requests
    are always near.
    """

    def __init__(self) -> None:
        self._near, self._far = SortedKeys(), SortedKeys()
        self._answer_tokens = RecentMean()

    def __iter__(self) -> Iterator[int]:
        """The `seq` of each request, in order."""
        for part in (self._near, self._far):
            for _, seq in part.keys:
                yield seq

    def position(self, entry: Entry) -> int:
        return self._near.position(entry.key) if entry.is_near else len(self._near) + self._far.position(entry.key)

    def add(self, entry: Entry) -> None:
        entry.cost = self._expected_cost(entry)
        client = entry.client
        waiting, index = client.waiting, client.index(entry)
        waiting.insert(index, entry)
        if index < client.num_near or client.num_near < NUM_NEAR or not entry.is_new:
            tag = client.tag(index)
            if index < client.num_near:
                tag = min(tag, nextafter(waiting[index + 1].key[0], -inf))
            client.num_near += 1
            self._set(entry, tag, is_near=True)
        elif index + 1 < len(waiting):
            # Equal tags are sorted by seq.
            self._set(entry, waiting[index + 1].key[0], is_near=False)
        else:
            self._set(entry, client.tag(index), is_near=False)

    def remove(self, entry: Entry) -> None:
        client = entry.client
        del client.waiting[client.index(entry)]
        if not entry.is_near:
            self._far.remove(entry.key)
            return
        self._near.remove(entry.key)
        client.num_near -= 1
        if client.num_near < min(NUM_NEAR, len(client.waiting)):
            first_far = client.waiting[client.num_near]
            self._far.remove(first_far.key)
            self._set(first_far, client.tag(client.num_near), is_near=True)
            client.num_near += 1

    def on_ended(self, client: Client, generated_tokens: int) -> None:
        """A request of the client has ended: learn its length, and correct tags that are off by half a request."""
        if generated_tokens:
            self._answer_tokens.add(generated_tokens)
        waiting = client.waiting
        # On average, half of each started request is still to be charged.
        tag = client.counter + client.num_started * self._expected_answer_tokens * client.token_cost / 2
        if not waiting or abs(waiting[0].key[0] - tag) <= waiting[0].cost / 2:
            return
        for entry in waiting[: client.num_near]:
            self._near.remove(entry.key)
            self._set(entry, tag, is_near=True)
            tag += entry.cost

    def _set(self, entry: Entry, tag: float, *, is_near: bool) -> None:
        entry.key, entry.is_near = (tag, entry.request.seq), is_near
        (self._near if is_near else self._far).add(entry.key)

    @property
    def _expected_answer_tokens(self) -> float:
        return self._answer_tokens.value or DEFAULT_ANSWER_TOKENS

    def _expected_cost(self, entry: Entry) -> float:
        request, client = entry.request, entry.client
        tokens = self._expected_answer_tokens
        if request.arrival.max_new_tokens is not None:
            tokens = min(tokens, request.arrival.max_new_tokens)
        cost = max(1.0, tokens - request.generated_tokens) * client.token_cost
        return cost if request.is_preempted else cost + request.arrival.prompt_tokens * client.prompt_cost
