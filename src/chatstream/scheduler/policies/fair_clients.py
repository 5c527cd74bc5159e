"""State of a fair queue: for each client, for each waiting request and for each run."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter
from typing import TypeAlias

from chatstream.scheduler.policies.sorted_keys import Key, SortedKeys
from chatstream.scheduler.request import LiveRequest

PROMPT_COST = 1.0
"""Service units of one prompt token."""
TOKEN_COST = 2.0
"""Service units of one generated token. Both costs are those of the paper's experiments; most price lists have this
ratio or a larger one."""

Rank: TypeAlias = tuple[bool, int]
"""(`is_new`, `seq`): the order within a client. Preempted requests come before new ones, then by admission."""


class Client:
    """A client with requests, or an idle client with a kept counter. `counter`: service units over its weight."""

    __slots__ = (
        "counter",
        "eligible",
        "lag",
        "name",
        "num_near",
        "num_started",
        "prompt_cost",
        "tie",
        "token_cost",
        "waiting",
    )

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.prompt_cost = PROMPT_COST / weight
        self.token_cost = TOKEN_COST / weight
        self.counter = 0.0
        self.lag = 0.0
        """How far the counter was below the smallest waiting counter when its last eligible request started."""
        self.tie = 0
        """Breaks ties between equal counters: the client that returned first has the smallest."""
        self.num_started = 0
        """Requests that run or are preempted."""
        self.waiting: list[Entry] = []
        """By rank; the first `num_near` are near, the others far (`FairPositions`)."""
        self.num_near = 0
        self.eligible: list[Rank] = []
        """Ranks of the eligible requests."""

    @property
    def is_live(self) -> bool:
        return bool(self.waiting or self.num_started)

    @property
    def has_preempted(self) -> bool:
        return bool(self.eligible) and not self.eligible[0][0]

    def index(self, entry: Entry) -> int:
        """Index of the entry in `waiting`, or the one at which it would be inserted."""
        return bisect_left(self.waiting, entry.rank, key=attrgetter("rank"))

    def tag(self, index: int) -> float:
        """The expected counter when the request at `index` starts: its start tag."""
        if index == 0:
            return self.counter
        ahead = self.waiting[index - 1]
        return max(self.counter, ahead.key[0] + ahead.cost)


class Entry:
    """A waiting request. `is_new`: not preempted."""

    __slots__ = ("client", "cost", "is_eligible", "is_near", "is_new", "key", "rank", "request")

    def __init__(self, request: LiveRequest, client: Client) -> None:
        self.request = request
        self.client = client
        self.is_new = not request.is_preempted
        self.rank: Rank = (self.is_new, request.seq)
        self.is_eligible = False
        # `FairPositions` maintains the following.
        self.cost = 0.0
        """Expected charge for the rest of the request."""
        self.is_near = False
        self.key: Key = (0.0, request.seq)


class Run:
    """A running or preempted request, and the part of its prompt charge that is still an estimate."""

    __slots__ = ("client", "reports_prompt", "unreported_tokens")

    def __init__(self, client: Client, unreported_tokens: int) -> None:
        self.client = client
        self.unreported_tokens = unreported_tokens
        """Prompt tokens that are charged by estimate and that the engine has not reported yet."""
        self.reports_prompt = False
        """The engine reports prompt tokens."""


class Ranking:
    """Clients sorted by their counters.

    Counters change with every token, so keys are updated lazily, when `least` meets them. Counters normally grow, so an
    outdated key is too small and is met too early, never too late. A charged client costs O(log n) once.
    """

    def __init__(self) -> None:
        self._order = SortedKeys()
        self._keys: dict[Client, Key] = {}
        self._clients: dict[int, Client] = {}  # by tie

    def __len__(self) -> int:
        return len(self._order)

    def add(self, client: Client) -> None:
        """Add a client; no effect on a member."""
        if client not in self._keys:
            self._keys[client] = (client.counter, client.tie)
            self._clients[client.tie] = client
            self._order.add(self._keys[client])

    def remove(self, client: Client) -> None:
        """Remove a client; no effect if it is not a member."""
        key = self._keys.pop(client, None)
        if key is not None:
            self._order.remove(key)
            del self._clients[key[1]]

    def update(self, client: Client) -> None:
        """Update the key of a member. Required only after its counter decreased."""
        if client in self._keys:
            self.remove(client)
            self.add(client)

    def least(self) -> Client | None:
        """The client with the smallest counter; None if there is no client."""
        while (first := self._order.first) is not None:
            client = self._clients[first[1]]
            if client.counter == first[0]:
                return client
            self.update(client)
        return None
