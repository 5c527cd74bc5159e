"""What a fair queue keeps of its clients and of their requests."""

from __future__ import annotations

from bisect import bisect_left
from operator import attrgetter
from typing import TypeAlias

from chatstream.scheduler.policies.sorted_keys import Key, SortedKeys
from chatstream.scheduler.request import LiveRequest

PROMPT_COST = 1.0
"""Of a token that is read."""
TOKEN_COST = 2.0
"""Of a token that is generated. The weights of the paper's experiments, and of most price lists or below them."""

Rank: TypeAlias = tuple[bool, int]
"""The order within a client: those who have begun go on before others start, then by admission."""


class Client:
    """Somebody with requests, or who had some and is ahead. `counter`: the service it got, over its weight."""

    __slots__ = (
        "behind",
        "counter",
        "name",
        "num_begun",
        "num_near",
        "prompt_cost",
        "ready",
        "tie",
        "token_cost",
        "waiting",
    )

    def __init__(self, name: str, weight: float) -> None:
        self.name = name
        self.prompt_cost = PROMPT_COST / weight
        self.token_cost = TOKEN_COST / weight
        self.counter = 0.0
        self.behind = 0.0
        """Those who wait, when it last had somebody in line."""
        self.tie = 0
        """Among equal counters, who came back first."""
        self.num_begun = 0
        """Requests that run or are preempted."""
        self.waiting: list[Waiter] = []
        """By rank; the first `num_near` are in the near line."""
        self.num_near = 0
        self.ready: list[Rank] = []
        """Of those who may start."""

    @property
    def is_live(self) -> bool:
        return bool(self.waiting or self.num_begun)

    @property
    def has_preempted(self) -> bool:
        return bool(self.ready) and not self.ready[0][0]

    def index(self, waiter: Waiter) -> int:
        """Where it is, or would be, among those who wait."""
        return bisect_left(self.waiting, waiter.rank, key=attrgetter("rank"))

    def tag(self, index: int) -> float:
        """The counter at which the request at `index` is expected to start."""
        if index == 0:
            return self.counter
        ahead = self.waiting[index - 1]
        return max(self.counter, ahead.key[0] + ahead.cost)


class Waiter:
    """A request in line. `is_fresh`: it has not begun; `is_ready`: it may start."""

    __slots__ = ("client", "cost", "is_fresh", "is_near", "is_ready", "key", "rank", "request")

    def __init__(self, request: LiveRequest, client: Client) -> None:
        self.request = request
        self.client = client
        self.is_fresh = not request.is_preempted
        self.rank: Rank = (self.is_fresh, request.seq)
        self.is_ready = False
        # Its place, kept by `FairPlaces`.
        self.cost = 0.0
        """Expected, of what is left of it."""
        self.is_near = False
        self.key: Key = (0.0, request.seq)


class Run:
    """A request that has begun, running or preempted: what its client still owes for it, or is owed."""

    __slots__ = ("client", "is_reported", "unread_tokens")

    def __init__(self, client: Client, unread_tokens: int) -> None:
        self.client = client
        self.unread_tokens = unread_tokens
        """Of the prompt, by estimate: charged, but not reported by the engine yet."""
        self.is_reported = False
        """The engine says how much of a prompt it reads."""


class Ranking:
    """Clients by their counters.

    A counter is charged for every token, so keys are brought up to date only when they are looked at: as counters grow,
    an outdated key is looked at too early, never too late. Each charged client costs O(log n), once.
    """

    def __init__(self) -> None:
        self._line = SortedKeys()
        self._keys: dict[Client, Key] = {}
        self._clients: dict[int, Client] = {}  # by tie

    def __len__(self) -> int:
        return len(self._line)

    def add(self, client: Client) -> None:
        """Harmless for a member."""
        if client not in self._keys:
            self._keys[client] = (client.counter, client.tie)
            self._clients[client.tie] = client
            self._line.add(self._keys[client])

    def remove(self, client: Client) -> None:
        """Harmless for those who are no member."""
        key = self._keys.pop(client, None)
        if key is not None:
            self._line.remove(key)
            del self._clients[key[1]]

    def update(self, client: Client) -> None:
        """Necessary only when the counter fell."""
        if client in self._keys:
            self.remove(client)
            self.add(client)

    def least(self) -> Client | None:
        while (first := self._line.first) is not None:
            client = self._clients[first[1]]
            if client.counter == first[0]:
                return client
            self.update(client)
        return None
