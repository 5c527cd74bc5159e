"""Fair sharing between clients: the virtual token counter (VTC) of Sheng et al., "Fairness in Serving Large Language
Models", OSDI 2024.

The counter of a client is the service that it received: weighted tokens, divided by the weight of the client. The
client with the smallest counter is next; the requests of one client start first come, first served. A client that had
no eligible request is lifted to the smallest counter of the waiting clients, so that idle time earns no credit.
docs/policies/fair.md has the bounds and their proofs.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Mapping

from chatstream.scheduler.policies.fair_clients import TOKEN_COST, Client, Entry, Ranking, Run
from chatstream.scheduler.policies.fair_positions import FairPositions
from chatstream.scheduler.request import LiveRequest
from chatstream.scheduler.states import State

MAX_IDLE_CLIENTS = 1024
"""Limit of the counters kept for idle clients. An idle client has no requests, but a counter above the smallest one.

Beyond this number, the clients with the smallest counters are forgotten first. A forgotten client that returns starts
at the smallest counter of the waiting clients. It gains its old lead, at most the cost of one full batch, which is what
a new client gains too. The bound between clients that wait all the time does not depend on this number.
"""

SLICE_TOKENS = 32
"""Time slice of `fair-token`, in generated tokens: 64 units of service, a second or two on a slow engine."""

LONG_SLICE_TOKENS = 512
"""The slice length that `fair` assumes for its lift of running clients; the real one is the operator's."""


class FairQueue:
    """`fair`; with `slice_tokens`, `fair-token`, where running requests are preempted too.

    A start charges the estimated prompt to the counter of the client. Prompt tokens that the engine reports beyond the
    estimate are charged as they come; with the first answer token, an overestimate is refunded. If the engine does not
    report prompt tokens, the estimate stands.
    As in the paper, a client is lifted when it gets its first eligible request, even if other requests of it run.

    Positions are estimates (`FairPositions`).
    """

    is_exact = False

    def __init__(self, weights: Mapping[str, float] | None = None, *, slice_tokens: int | None = None) -> None:
        """`weights`: the share of each client, above 0; 1 for a client that is not in the mapping."""
        self.slice_tokens = slice_tokens
        self._weights = dict(weights or {})
        self._clients: dict[str, Client] = {}
        self._entries: dict[int, Entry] = {}
        self._runs: dict[int, Run] = {}  # by seq; running or preempted
        self._eligible = Ranking()  # clients with an eligible request
        self._preempted = Ranking()  # clients with a preempted request
        self._idle = Ranking()  # clients without requests, but with a counter above the smallest one
        self._last_taken: Client | None = None
        self._num_returns = 0
        self._positions = FairPositions()

    def __len__(self) -> int:
        return len(self._entries)

    def __iter__(self) -> Iterator[LiveRequest]:
        for seq in self._positions:
            yield self._entries[seq].request

    @property
    def num_clients(self) -> int:
        """Number of clients with state."""
        return len(self._clients)

    def counter(self, client: str) -> float:
        """The counter that the client would have if it sent a request now."""
        known = self._clients.get(client)
        if known is not None and known.eligible:
            return known.counter
        return max(known.counter if known is not None else 0.0, self._least_counter())

    # --- the protocol -----------------------------------------------------------------------------------------

    def push(self, request: LiveRequest, *, held: bool) -> None:
        client = self._client(request.client)
        entry = Entry(request, client)
        self._entries[request.seq] = entry
        self._lift(client)
        self._positions.add(entry)
        if not held:
            self._add_eligible(client, entry)

    def unhold(self, request: LiveRequest) -> None:
        entry = self._entries[request.seq]
        self._lift(entry.client)
        self._add_eligible(entry.client, entry)

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        client = (self._eligible if may_start_new else self._preempted).least()
        if client is None:
            return None
        request = self._first_eligible(client)
        self.start(request)
        return request

    def start(self, request: LiveRequest) -> None:
        client = self._remove(request.seq).client
        self._last_taken = client
        self._forget_idle_up_to(min(client.counter, self._least_counter()))
        if request.seq not in self._runs:
            self._open_run(request, client, has_started=request.is_preempted)

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        # No margin: the slice already limits the rate of preemptions, and a margin would add to the bound.
        run = self._runs.get(running.seq)
        if run is None:
            return None
        self._lift_running(run.client)
        client = (self._eligible if may_start_new else self._preempted).least()
        if client is None or client.counter >= run.client.counter:
            return None
        return self._first_eligible(client)

    def withdraw(self, request: LiveRequest) -> None:
        client = self._remove(request.seq).client
        if request.seq not in self._runs:
            self._retire(client)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        run = self._runs.get(request.seq)
        if run is None:
            # The request started under another policy.
            client = self._client(request.client)
            if not client.is_live:
                self._lift(client)
            run = self._open_run(request, client, has_started=True)
        client = run.client
        if prompt_tokens:
            run.reports_prompt = True
            expected = min(prompt_tokens, run.unreported_tokens)
            run.unreported_tokens -= expected
            client.counter += (prompt_tokens - expected) * client.prompt_cost
        if tokens:
            client.counter += tokens * client.token_cost
            if run.unreported_tokens:
                self._settle(run)

    def end_run(self, request: LiveRequest) -> None:
        run = self._runs.pop(request.seq, None)
        if run is None:
            return
        if request.state is State.WAITING:
            run.reports_prompt = True  # the engine failed: refund the prompt, the next start charges it again
        self._settle(run)
        run.client.num_started -= 1
        self._retire(run.client)
        self._positions.on_ended(run.client, request.generated_tokens)

    def position(self, request: LiveRequest) -> int:
        return self._positions.position(self._entries[request.seq])

    # --- service ----------------------------------------------------------------------------------------------

    def _open_run(self, request: LiveRequest, client: Client, *, has_started: bool) -> Run:
        """Charge the estimated prompt; not if the request `has_started` under another policy."""
        prompt_tokens = 0 if has_started else request.arrival.prompt_tokens
        run = self._runs[request.seq] = Run(client, prompt_tokens)
        client.num_started += 1
        client.counter += prompt_tokens * client.prompt_cost
        return run

    def _settle(self, run: Run) -> None:
        """The prompt is complete: refund the part of the estimate that the engine did not report, if it reports any."""
        client = run.client
        if run.reports_prompt and run.unreported_tokens:
            client.counter -= run.unreported_tokens * client.prompt_cost
            for ranking in (self._eligible, self._preempted):
                ranking.update(client)
        run.unreported_tokens = 0

    def _lift(self, client: Client) -> None:
        """Raise the counter of a client without eligible requests, before it gets one."""
        if not client.eligible:
            client.counter = max(client.counter, self._least_counter())

    def _lift_running(self, client: Client) -> None:
        """The lift for a client that runs without waiting requests, at the end of a time slice.

        Without this lift, a client that uses one slot while others use the rest falls behind for as long as it runs,
        and later keeps its slot as long again when many clients want it. So while no request of the client waits, its
        counter is at most `client.lag` and one slice of every running request below the smallest waiting counter.
        When no request is eligible, the largest running counter becomes the reference for new clients, so that the
        service of that time does not count against its client later.
        """
        if client.eligible:
            return
        least = self._least_counter()
        if not self._eligible and client.counter > least:
            self._last_taken = client
        slack = len(self._runs) * TOKEN_COST * (self.slice_tokens or LONG_SLICE_TOKENS)
        client.counter = max(client.counter, least - client.lag - slack)

    def _least_counter(self) -> float:
        """The smallest counter of the waiting clients; if none waits, the counter of the client taken last."""
        client = self._eligible.least() or self._last_taken
        return client.counter if client is not None else 0.0

    # --- clients ----------------------------------------------------------------------------------------------

    def _client(self, name: str) -> Client:
        client = self._clients.get(name)
        if client is None:
            client = self._clients[name] = Client(name, self._weights.get(name, 1.0))
        self._idle.remove(client)
        return client

    def _retire(self, client: Client) -> None:
        """Forget a client without requests, unless its counter is above the one to which a lift would raise it."""
        if client.is_live:
            return
        if not self._entries and not self._runs:
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

    # --- eligible requests ------------------------------------------------------------------------------------

    def _add_eligible(self, client: Client, entry: Entry) -> None:
        if not client.eligible:
            self._num_returns += 1
            client.tie = self._num_returns
        entry.is_eligible = True
        insort(client.eligible, entry.rank)
        self._eligible.add(client)
        if client.has_preempted:
            self._preempted.add(client)

    def _first_eligible(self, client: Client) -> LiveRequest:
        """The next request of a client that has an eligible one."""
        return self._entries[client.eligible[0][1]].request

    def _remove(self, seq: int) -> Entry:
        entry = self._entries.pop(seq)
        client = entry.client
        self._positions.remove(entry)
        if entry.is_eligible:
            del client.eligible[bisect_left(client.eligible, entry.rank)]
            if not client.eligible:
                self._eligible.remove(client)
                client.lag = max(0.0, self._least_counter() - client.counter)
            if not client.has_preempted:
                self._preempted.remove(client)
        return entry
