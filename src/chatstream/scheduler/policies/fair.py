"""Clients share by tokens: the virtual token counter of Sheng et al. (OSDI 2024, "Fairness in Serving LLMs").

Each client has a counter of the service that it got, in tokens over its weight. Whoever has the least is next, first
come, first served within a client. A client that returns after it had nothing waiting is lifted to the least counter of
those who wait: what it did not ask for it cannot save up. docs/policies/fair.md has the bounds and their proof.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping
from math import inf, nextafter
from operator import attrgetter
from typing import TypeAlias

from chatstream.scheduler.line import Key, Line
from chatstream.scheduler.recent_mean import RecentMean
from chatstream.scheduler.request import LiveRequest
from chatstream.scheduler.states import State

PROMPT_COST = 1.0
"""Of a token that is read."""
TOKEN_COST = 2.0
"""Of a token that is generated. The weights of the paper's experiments, and of most price lists or below them."""

MAX_IDLE_CLIENTS = 1024
"""Clients with nothing to do whose counters are remembered, because they are ahead of everybody who waits.

Where more are, those with the least advantage are forgotten first. Who is forgotten and comes back starts beside the
least of those who wait instead of behind them, so it gains what it was ahead: at most the cost of one full batch, the
same that a new client could have had. The bound between those who wait all the time does not depend on it.
"""

SLICE_TOKENS = 32
"""Under `fair-token`: 64 units of service. Two clients on one slot take turns every second or two on a slow engine."""

LONG_SLICE_TOKENS = 512
"""Under `fair`, where the operator decides how long a slice is, this counts as one."""

NUM_NEAR = 16
"""So many of the first requests of each client have places that follow its counter."""

DEFAULT_ANSWER_TOKENS = 200.0
"""Before anybody has ended. Only positions depend on it."""

_Rank: TypeAlias = tuple[bool, int]
"""The order within a client: those who have begun go on before others start, then by admission."""


class FairQueue:
    """Requests by the counters of their clients; with `slice_tokens` also those that run give way (`fair-token`).

    The counter of a client is charged the estimated prompt when a request starts, and what the engine reports beyond
    it; with the first token an estimate that was too high is given back. An engine that reports no prompts leaves the
    estimates as they are. A client is lifted when it gets its first request that may start, also if others of its
    requests run, as in the paper: what counts is whether it wants more than it has.

    Positions are estimates: with equal tags for equal counters (start-time fair queuing, Goyal et al. 1996), each
    request of a client is expected to start when its counter has been charged for those before it.
    """

    is_exact = False

    def __init__(self, weights: Mapping[str, float] | None = None, *, slice_tokens: int | None = None) -> None:
        """`weights`: shares of clients, above 0; 1 for those who are not named."""
        self.slice_tokens = slice_tokens
        self._weights = dict(weights or {})
        self._clients: dict[str, _Client] = {}
        self._waiters: dict[int, _Waiter] = {}
        self._runs: dict[int, _Run] = {}  # by seq, of those who have begun: running or preempted
        self._ready = _Ranking()  # clients with somebody who may start
        self._parked = _Ranking()  # clients with somebody preempted
        self._idle = _Ranking()  # clients with nothing, but ahead of those who wait
        self._last_taken: _Client | None = None
        self._num_returns = 0
        self._near, self._far = Line(), Line()
        self._answer_tokens = RecentMean()

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[LiveRequest]:
        for line in (self._near, self._far):
            for _, seq in line.keys:
                yield self._waiters[seq].request

    @property
    def num_clients(self) -> int:
        """Clients of whom anything is known."""
        return len(self._clients)

    def counter(self, client: str) -> float:
        """The service that the client is taken to have had: where it would stand if it asked for something now."""
        known = self._clients.get(client)
        if known is not None and known.ready:
            return known.counter
        return max(known.counter if known is not None else 0.0, self._least_counter())

    # --- the protocol -----------------------------------------------------------------------------------------

    def push(self, request: LiveRequest, *, held: bool) -> None:
        client = self._client(request.client)
        waiter = _Waiter(request, client, self._expected_cost(request, client))
        self._waiters[request.seq] = waiter
        self._lift(client)
        self._add_place(client, waiter)
        if not held:
            self._add_ready(client, waiter)

    def unhold(self, request: LiveRequest) -> None:
        waiter = self._waiters[request.seq]
        self._lift(waiter.client)
        self._add_ready(waiter.client, waiter)

    def take(self, *, may_grow: bool = True) -> LiveRequest | None:
        client = (self._ready if may_grow else self._parked).least()
        if client is None:
            return None
        request = self._waiters[client.ready[0][1]].request
        self.start(request)
        return request

    def start(self, request: LiveRequest) -> None:
        client = self._remove(request.seq).client
        self._last_taken = client
        self._forget_idle_up_to(min(client.counter, self._least_counter()))
        if request.seq not in self._runs:
            self._begin(request, client, has_begun=request.is_preempted)

    def successor(self, running: LiveRequest, *, may_grow: bool) -> LiveRequest | None:
        # No margin: the slice itself keeps changes rare, and a margin would only be added to the bound.
        run = self._runs.get(running.seq)
        if run is None:
            return None
        self._catch_up(run.client)
        client = (self._ready if may_grow else self._parked).least()
        if client is None or client.counter >= run.client.counter:
            return None
        return self._waiters[client.ready[0][1]].request

    def discard(self, request: LiveRequest) -> None:
        client = self._remove(request.seq).client
        if request.seq not in self._runs:
            self._retire(client)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        run = self._runs.get(request.seq)
        if run is None:
            # It ran already when this policy was chosen.
            client = self._client(request.client)
            if not client.is_live:
                self._lift(client)
            run = self._begin(request, client, has_begun=True)
        client = run.client
        if prompt_tokens:
            run.is_reported = True
            expected = min(prompt_tokens, run.unread_tokens)
            run.unread_tokens -= expected
            client.counter += (prompt_tokens - expected) * client.prompt_cost
        if tokens:
            client.counter += tokens * client.token_cost
            if run.unread_tokens:
                self._settle(run)

    def leave(self, request: LiveRequest) -> None:
        run = self._runs.pop(request.seq, None)
        if run is None:
            return
        if request.state is State.WAITING:
            run.is_reported = True  # its engine failed; it starts again, and pays then
        self._settle(run)
        if request.generated_tokens:
            self._answer_tokens.add(request.generated_tokens)
        run.client.num_begun -= 1
        self._retire(run.client)
        self._update_places(run.client)

    def position(self, request: LiveRequest) -> int:
        waiter = self._waiters[request.seq]
        return self._near.place(waiter.key) if waiter.is_near else len(self._near) + self._far.place(waiter.key)

    # --- service ----------------------------------------------------------------------------------------------

    def _begin(self, request: LiveRequest, client: _Client, *, has_begun: bool) -> _Run:
        """`has_begun`: under another policy, so its prompt has been read."""
        prompt_tokens = 0 if has_begun else request.arrival.prompt_tokens
        run = self._runs[request.seq] = _Run(client, prompt_tokens)
        client.num_begun += 1
        client.counter += prompt_tokens * client.prompt_cost
        return run

    def _settle(self, run: _Run) -> None:
        """The prompt has been read. If the engine says how long it was, what was expected beyond that is given back."""
        client = run.client
        if run.is_reported and run.unread_tokens:
            client.counter -= run.unread_tokens * client.prompt_cost
            for ranking in (self._ready, self._parked):
                ranking.update(client)
        run.unread_tokens = 0

    def _lift(self, client: _Client) -> None:
        """Before it gets its first request that may start."""
        if not client.ready:
            client.counter = max(client.counter, self._least_counter())

    def _catch_up(self, client: _Client) -> None:
        """At the end of a slice. What a lift is to those who return, for those who run on and on and never wait.

        Without it a client that is content with one slot, while others use the rest, would fall behind for as long as
        it runs, and keep its slot for as long again once many want it. So while it has nothing in line, it does not
        fall behind those who wait by more than it was then and what everybody gets in a slice: so much is chance.
        Where nobody waits, whoever has had most is in front of the line, so nothing is held against it later.
        """
        if client.ready:
            return
        least = self._least_counter()
        if not self._ready and client.counter > least:
            self._last_taken = client
        slack = len(self._runs) * TOKEN_COST * (self.slice_tokens or LONG_SLICE_TOKENS)
        client.counter = max(client.counter, least - client.behind - slack)

    def _least_counter(self) -> float:
        """Of those who wait; when nobody does, of the one who was taken last."""
        client = self._ready.least() or self._last_taken
        return client.counter if client is not None else 0.0

    # --- clients ----------------------------------------------------------------------------------------------

    def _client(self, name: str) -> _Client:
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = _Client(name, self._weights.get(name, 1.0))
        self._idle.remove(client)
        return client

    def _retire(self, client: _Client) -> None:
        """Forget it if it has nothing any more and would be lifted to the same counter when it came back."""
        if client.is_live:
            return
        if not self._waiters and not self._runs:
            self._clients.clear()
            self._idle = _Ranking()
            self._last_taken = None
        elif client.counter <= self._least_counter():
            del self._clients[client.name]
        else:
            self._num_returns += 1
            client.tie = self._num_returns
            self._idle.add(client)
            if len(self._idle) > MAX_IDLE_CLIENTS:
                self._forget_idle()

    def _forget_idle_up_to(self, counter: float) -> None:
        while (client := self._idle.least()) is not None and client.counter <= counter:
            self._forget_idle()

    def _forget_idle(self) -> None:
        client = self._idle.least()
        assert client is not None
        self._idle.remove(client)
        del self._clients[client.name]

    # --- who may start ----------------------------------------------------------------------------------------

    def _add_ready(self, client: _Client, waiter: _Waiter) -> None:
        if not client.ready:
            self._num_returns += 1
            client.tie = self._num_returns
        waiter.is_ready = True
        insort(client.ready, waiter.rank)
        self._ready.add(client)
        if client.has_preempted:
            self._parked.add(client)

    def _remove(self, seq: int) -> _Waiter:
        waiter = self._waiters.pop(seq)
        client = waiter.client
        self._remove_place(client, waiter)
        if waiter.is_ready:
            del client.ready[bisect_left(client.ready, waiter.rank)]
            if not client.ready:
                self._ready.remove(client)
                client.behind = max(0.0, self._least_counter() - client.counter)
            if not client.has_preempted:
                self._parked.remove(client)
        return waiter

    # --- places -----------------------------------------------------------------------------------------------

    # The first requests of each client are in the near line, by their tags; those behind them are in the far line.
    # Charges differ from expectations, so tags must follow the counter; but who has thousands waiting must not cost
    # thousands of updates. Those who have begun are always near.

    @property
    def _expected_answer_tokens(self) -> float:
        return self._answer_tokens.value or DEFAULT_ANSWER_TOKENS

    def _expected_cost(self, request: LiveRequest, client: _Client) -> float:
        tokens = self._expected_answer_tokens
        if request.arrival.max_new_tokens is not None:
            tokens = min(tokens, request.arrival.max_new_tokens)
        cost = max(1.0, tokens - request.generated_tokens) * client.token_cost
        return cost if request.is_preempted else cost + request.arrival.prompt_tokens * client.prompt_cost

    def _add_place(self, client: _Client, waiter: _Waiter) -> None:
        waiting, index = client.waiting, client.index(waiter)
        waiting.insert(index, waiter)
        if index < client.num_near or client.num_near < NUM_NEAR or not waiter.is_fresh:
            tag = client.tag(index)
            if index < client.num_near:
                tag = min(tag, nextafter(waiting[index + 1].key[0], -inf))
            client.num_near += 1
            self._set_place(waiter, tag, is_near=True)
        elif index + 1 < len(waiting):
            # Of equal tags the smaller seq is first.
            self._set_place(waiter, waiting[index + 1].key[0], is_near=False)
        else:
            self._set_place(waiter, client.tag(index), is_near=False)

    def _set_place(self, waiter: _Waiter, tag: float, *, is_near: bool) -> None:
        waiter.key, waiter.is_near = (tag, waiter.request.seq), is_near
        (self._near if is_near else self._far).add(waiter.key)

    def _remove_place(self, client: _Client, waiter: _Waiter) -> None:
        del client.waiting[client.index(waiter)]
        if not waiter.is_near:
            self._far.remove(waiter.key)
            return
        self._near.remove(waiter.key)
        client.num_near -= 1
        if client.num_near < min(NUM_NEAR, len(client.waiting)):
            first_far = client.waiting[client.num_near]
            self._far.remove(first_far.key)
            self._set_place(first_far, client.tag(client.num_near), is_near=True)
            client.num_near += 1

    def _update_places(self, client: _Client) -> None:
        """After one of them has ended: expectations may have been wrong, which matters from half a request on."""
        waiting = client.waiting
        # Of those who have begun about half is still to come.
        tag = client.counter + client.num_begun * self._expected_answer_tokens * client.token_cost / 2
        if not waiting or abs(waiting[0].key[0] - tag) <= waiting[0].cost / 2:
            return
        for waiter in waiting[: client.num_near]:
            self._near.remove(waiter.key)
            self._set_place(waiter, tag, is_near=True)
            tag += waiter.cost


class _Client:
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
        self.waiting: list[_Waiter] = []
        """By rank; the first `num_near` are in the near line."""
        self.num_near = 0
        self.ready: list[_Rank] = []
        """Of those who may start."""

    @property
    def is_live(self) -> bool:
        return bool(self.waiting or self.num_begun)

    @property
    def has_preempted(self) -> bool:
        return bool(self.ready) and not self.ready[0][0]

    def index(self, waiter: _Waiter) -> int:
        """Where it is, or would be, among those who wait."""
        return bisect_left(self.waiting, waiter.rank, key=attrgetter("rank"))

    def tag(self, index: int) -> float:
        """The counter at which the request at `index` is expected to start."""
        if index == 0:
            return self.counter
        ahead = self.waiting[index - 1]
        return max(self.counter, ahead.key[0] + ahead.cost)


class _Waiter:
    __slots__ = ("client", "cost", "is_fresh", "is_near", "is_ready", "key", "rank", "request")

    def __init__(self, request: LiveRequest, client: _Client, cost: float) -> None:
        self.request = request
        self.client = client
        self.cost = cost
        """Expected, of what is left of it."""
        self.is_fresh = not request.is_preempted
        self.rank: _Rank = (self.is_fresh, request.seq)
        self.is_ready = False
        self.is_near = False
        self.key: Key = (0.0, request.seq)


class _Run:
    __slots__ = ("client", "is_reported", "unread_tokens")

    def __init__(self, client: _Client, unread_tokens: int) -> None:
        self.client = client
        self.unread_tokens = unread_tokens
        """Of the prompt, by estimate: charged, but not reported by the engine yet."""
        self.is_reported = False
        """The engine says how much of a prompt it reads."""


class _Ranking:
    """Clients by their counters.

    A counter is charged for every token, so keys are brought up to date only when they are looked at: as counters grow,
    an outdated key is looked at too early, never too late. Each charged client costs O(log n), once.
    """

    def __init__(self) -> None:
        self._line = Line()
        self._keys: dict[_Client, Key] = {}
        self._clients: dict[int, _Client] = {}  # by tie

    def __len__(self) -> int:
        return len(self._line)

    def add(self, client: _Client) -> None:
        """Harmless for a member."""
        if client not in self._keys:
            self._keys[client] = (client.counter, client.tie)
            self._clients[client.tie] = client
            self._line.add(self._keys[client])

    def remove(self, client: _Client) -> None:
        """Harmless for those who are no member."""
        key = self._keys.pop(client, None)
        if key is not None:
            self._line.remove(key)
            del self._clients[key[1]]

    def update(self, client: _Client) -> None:
        """Necessary only when the counter fell."""
        if client in self._keys:
            self.remove(client)
            self.add(client)

    def least(self) -> _Client | None:
        while (first := self._line.first) is not None:
            client = self._clients[first[1]]
            if client.counter == first[0]:
                return client
            self.update(client)
        return None
