"""Everybody who waits: in the order of the policy, each with its turn or held, and what each client has in line."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from chatstream.scheduler.eligibility import Eligibility
from chatstream.scheduler.policies import BUILT_IN, QUEUES, GuardedQueue, WaitingQueue
from chatstream.scheduler.request import Arrival, LiveRequest
from chatstream.scheduler.settings import SchedulerSettings


class WaitingRequests:
    """A policy's queue and the accounts around it, which no policy can get wrong.

    A request enters once and is forgotten once, when it ends. Between the two it may leave the line for a slot and
    come back any number of times, with the place it had.
    """

    def __init__(self, settings: SchedulerSettings, queue: WaitingQueue | None = None) -> None:
        """`queue` is for those who bring their own; otherwise the settings choose it."""
        self.policy = settings.policy
        self.tokens = 0
        """Of prompts and answers in line, by estimate."""
        self._settings = settings
        self._queue = self._make(settings.policy) if queue is None else self._guard(queue)
        self._failure: str | None = None
        self._eligibility = Eligibility(settings.max_running_per_client)
        self._num_of_client: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[LiveRequest]:
        """In the expected order of start."""
        return iter(self._queue)

    # --- in and out -------------------------------------------------------------------------------------------

    def enter(self, request: LiveRequest) -> None:
        """A new request joins; without a turn it is held."""
        self._join(request, held=not self._eligibility.add(request))

    def rejoin(self, request: LiveRequest) -> None:
        """One that had left for a slot is back: preempted, or its engine failed. It has its turn still."""
        self._join(request, held=False)

    def take(self, *, may_start_new: bool) -> LiveRequest | None:
        """Who starts next leaves the line; None: nobody may. Without `may_start_new`, only a preempted one may."""
        request = self._queue.take(may_start_new=may_start_new)
        if request is not None:
            self._discount(request)
        return request

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        """Who should have the slot of one whose time slice is over; None: nobody. It must then `start`."""
        return self._queue.successor(running, may_start_new=may_start_new)

    def start(self, successor: LiveRequest) -> None:
        """It leaves the line, as if it had been taken."""
        self._queue.start(successor)
        self._discount(successor)

    def withdraw(self, request: LiveRequest) -> None:
        """It leaves the line without starting."""
        self._queue.withdraw(request)
        self._discount(request)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        """The engine has read or generated so many tokens for a request that has left for a slot."""
        self._queue.charge(request, prompt_tokens=prompt_tokens, tokens=tokens)

    def end_run(self, request: LiveRequest) -> None:
        """It has lost its slot, for good or to rejoin as if it had never started."""
        self._queue.end_run(request)

    def end(self, request: LiveRequest) -> None:
        """It has ended, and is not in line any more: whoever was held for it gets the turn."""
        for successor in self._eligibility.end(request):
            self._queue.unhold(successor)

    # --- what is known ----------------------------------------------------------------------------------------

    @property
    def is_exact(self) -> bool:
        return self._queue.is_exact

    @property
    def slice_tokens(self) -> int | None:
        """How long the policy's own time slices are, if it lives from them."""
        return self._queue.slice_tokens

    def position(self, request: LiveRequest) -> int:
        """1 for the next."""
        return self._queue.position(request)

    def would_be_eligible(self, arrival: Arrival) -> bool:
        return self._eligibility.would_be_eligible(arrival)

    def is_eligible(self, request: LiveRequest) -> bool:
        return self._eligibility.is_eligible(request)

    def is_first_of_conversation(self, request: LiveRequest) -> bool:
        return self._eligibility.is_first_of_conversation(request)

    @property
    def num_eligible(self) -> int:
        """Waiting requests that may start as soon as slots are free."""
        return len(self._queue) - self._eligibility.num_held

    def first_eligible(self, num: int) -> Iterator[LiveRequest]:
        """The next to start. O(line) at worst: for the time before the opening."""
        return islice((request for request in self._queue if self._eligibility.is_eligible(request)), num)

    @property
    def num_eligibility_keys(self) -> int:
        """Conversations and clients of whom turns are kept."""
        return len(self._eligibility)

    @property
    def num_clients(self) -> int:
        """Clients with requests in line."""
        return len(self._num_of_client)

    def num_of_client(self, client: str) -> int:
        """So many of its requests are in line."""
        return self._num_of_client.get(client, 0)

    # --- the policy -------------------------------------------------------------------------------------------

    def set_policy(self, policy: str) -> None:
        """Another order from now on, among the same requests."""
        queue = self._make(policy)
        members = sorted(self._queue, key=lambda request: request.seq)  # if the old one fails now, nobody need know
        self._failure, self.policy, self._queue = None, policy, queue
        for request in members:
            self._queue.push(request, held=not self._eligibility.is_eligible(request))

    def take_failure(self) -> str | None:
        """Why fcfs has taken over from the policy, once; None: it has not."""
        failure, self._failure = self._failure, None
        return failure

    def _make(self, policy: str) -> WaitingQueue:
        make = QUEUES[policy]
        queue = make(self._settings)
        return queue if make in BUILT_IN else self._guard(queue)

    def _guard(self, queue: WaitingQueue) -> WaitingQueue:
        return GuardedQueue(queue, self._on_policy_failed)

    def _on_policy_failed(self, error: Exception) -> None:
        self._failure = f"{self.policy} failed: {error!r}"
        self.policy = "fcfs"

    # --- the accounts -----------------------------------------------------------------------------------------

    def _join(self, request: LiveRequest, *, held: bool) -> None:
        self._queue.push(request, held=held)
        self.tokens += request.waiting_tokens
        self._num_of_client[request.client] = self._num_of_client.get(request.client, 0) + 1

    def _discount(self, request: LiveRequest) -> None:
        self.tokens -= request.waiting_tokens
        num = self._num_of_client[request.client] - 1
        if num:
            self._num_of_client[request.client] = num
        else:
            del self._num_of_client[request.client]
