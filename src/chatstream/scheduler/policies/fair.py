"""Clients share by tokens: the virtual token counter of Sheng et al. (OSDI 2024, "Fairness in Serving LLMs").

Each client has a counter of the service that it got, in tokens over its weight. Whoever has the least is next, first
come, first served within a client. A client that returns after it had nothing waiting is lifted to the least counter of
those who wait: what it did not ask for it cannot save up. docs/policies/fair.md has the bounds and their proof.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from chatstream.scheduler.policies.fair_clients import TOKEN_COST, Client, Ranking, Run, Waiter
from chatstream.scheduler.policies.fair_positions import FairPlaces
from chatstream.scheduler.request import LiveRequest
from chatstream.scheduler.states import State

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


class FairQueue:
    """Requests by the counters of their clients; with `slice_tokens` also those that run give way (`fair-token`).

    The counter of a client is charged the estimated prompt when a request starts, and what the engine reports beyond
    it; with the first token an estimate that was too high is given back. An engine that reports no prompts leaves the
    estimates as they are. A client is lifted when it gets its first request that may start, also if others of its
    requests run, as in the paper: what counts is whether it wants more than it has.

    Positions are estimates (`FairPlaces`).
    """

    is_exact = False

    def __init__(self, weights: Mapping[str, float] | None = None, *, slice_tokens: int | None = None) -> None:
        """`weights`: shares of clients, above 0; 1 for those who are not named."""
        self.slice_tokens = slice_tokens
        self._weights = dict(weights or {})
        self._clients: dict[str, Client] = {}
        self._waiters: dict[int, Waiter] = {}
        self._runs: dict[int, Run] = {}  # by seq, of those who have begun: running or preempted
        self._ready = Ranking()  # clients with somebody who may start
        self._preempted = Ranking()  # clients with somebody preempted
        self._idle = Ranking()  # clients with nothing, but ahead of those who wait
        self._last_taken: Client | None = None
        self._num_returns = 0
        self._places = FairPlaces()

    def __len__(self) -> int:
        return len(self._waiters)

    def __iter__(self) -> Iterator[LiveRequest]:
        for seq in self._places:
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
        waiter = Waiter(request, client)
        self._waiters[request.seq] = waiter
        self._lift(client)
        self._places.add(waiter)
        if not held:
            self._add_ready(client, waiter)

    def unhold(self, request: LiveRequest) -> None:
        waiter = self._waiters[request.seq]
        self._lift(waiter.client)
        self._add_ready(waiter.client, waiter)

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        client = (self._ready if may_start_new else self._preempted).least()
        if client is None:
            return None
        request = self._first_ready(client)
        self.start(request)
        return request

    def start(self, request: LiveRequest) -> None:
        client = self._remove(request.seq).client
        self._last_taken = client
        self._forget_idle_up_to(min(client.counter, self._least_counter()))
        if request.seq not in self._runs:
            self._begin(request, client, has_begun=request.is_preempted)

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        # No margin: the slice itself keeps changes rare, and a margin would only be added to the bound.
        run = self._runs.get(running.seq)
        if run is None:
            return None
        self._catch_up(run.client)
        client = (self._ready if may_start_new else self._preempted).least()
        if client is None or client.counter >= run.client.counter:
            return None
        return self._first_ready(client)

    def withdraw(self, request: LiveRequest) -> None:
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

    def end_run(self, request: LiveRequest) -> None:
        run = self._runs.pop(request.seq, None)
        if run is None:
            return
        if request.state is State.WAITING:
            run.is_reported = True  # its engine failed; it starts again, and pays then
        self._settle(run)
        run.client.num_begun -= 1
        self._retire(run.client)
        self._places.on_ended(run.client, request.generated_tokens)

    def position(self, request: LiveRequest) -> int:
        return self._places.position(self._waiters[request.seq])

    # --- service ----------------------------------------------------------------------------------------------

    def _begin(self, request: LiveRequest, client: Client, *, has_begun: bool) -> Run:
        """`has_begun`: under another policy, so its prompt has been read."""
        prompt_tokens = 0 if has_begun else request.arrival.prompt_tokens
        run = self._runs[request.seq] = Run(client, prompt_tokens)
        client.num_begun += 1
        client.counter += prompt_tokens * client.prompt_cost
        return run

    def _settle(self, run: Run) -> None:
        """The prompt has been read. If the engine says how long it was, what was expected beyond that is given back."""
        client = run.client
        if run.is_reported and run.unread_tokens:
            client.counter -= run.unread_tokens * client.prompt_cost
            for ranking in (self._ready, self._preempted):
                ranking.update(client)
        run.unread_tokens = 0

    def _lift(self, client: Client) -> None:
        """Before it gets its first request that may start."""
        if not client.ready:
            client.counter = max(client.counter, self._least_counter())

    def _catch_up(self, client: Client) -> None:
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

    def _client(self, name: str) -> Client:
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(name, self._weights.get(name, 1.0))
        self._idle.remove(client)
        return client

    def _retire(self, client: Client) -> None:
        """Forget it if it has nothing any more and would be lifted to the same counter when it came back."""
        if client.is_live:
            return
        if not self._waiters and not self._runs:
            self._clients.clear()
            self._idle = Ranking()
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

    def _add_ready(self, client: Client, waiter: Waiter) -> None:
        if not client.ready:
            self._num_returns += 1
            client.tie = self._num_returns
        waiter.is_ready = True
        insort(client.ready, waiter.rank)
        self._ready.add(client)
        if client.has_preempted:
            self._preempted.add(client)

    def _first_ready(self, client: Client) -> LiveRequest:
        """It must have one."""
        return self._waiters[client.ready[0][1]].request

    def _remove(self, seq: int) -> Waiter:
        waiter = self._waiters.pop(seq)
        client = waiter.client
        self._places.remove(waiter)
        if waiter.is_ready:
            del client.ready[bisect_left(client.ready, waiter.rank)]
            if not client.ready:
                self._ready.remove(client)
                client.behind = max(0.0, self._least_counter() - client.counter)
            if not client.has_preempted:
                self._preempted.remove(client)
        return waiter
