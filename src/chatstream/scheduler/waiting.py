"""The waiting requests: the queue of the policy, eligibility, and the counts of each client."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice

from chatstream.scheduler.eligibility import Eligibility
from chatstream.scheduler.policies import BUILT_IN, QUEUES, GuardedQueue, WaitingQueue
from chatstream.scheduler.request import Arrival, LiveRequest
from chatstream.scheduler.settings import SchedulerSettings


class WaitingRequests:
    """The queue of a policy, with eligibility and counts, which do not depend on the policy.

    A request enters once, with `enter`, and ends once, with `end`. In between it may leave the queue for a slot and
    rejoin any number of times, with its original rank.
    """

    def __init__(self, settings: SchedulerSettings, queue: WaitingQueue | None = None) -> None:
        """`queue` replaces the queue of `settings.policy`."""
        self.policy = settings.policy
        self.tokens = 0
        """Estimated tokens of the prompts and answers that wait."""
        self._settings = settings
        self._queue = self._make(settings.policy) if queue is None else self._guard(queue)
        self._failure: str | None = None
        self._eligibility = Eligibility(settings.max_running_per_client)
        self._num_of_client: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def __iter__(self) -> Iterator[LiveRequest]:
        """The waiting requests, in the expected order of start."""
        return iter(self._queue)

    # --- changes ----------------------------------------------------------------------------------------------

    def enter(self, request: LiveRequest) -> None:
        """Add a new request; it is held when it is not eligible."""
        self._join(request, held=not self._eligibility.add(request))

    def rejoin(self, request: LiveRequest) -> None:
        """Add a request again that had a slot: it was preempted or requeued. It is still eligible."""
        self._join(request, held=False)

    def take(self, *, may_start_new: bool) -> LiveRequest | None:
        """Remove and return the next request to start; None when no request may start.

        Without `may_start_new`, only a preempted request may start.
        """
        request = self._queue.take(may_start_new=may_start_new)
        if request is not None:
            self._uncount(request)
        return request

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        """The request that should replace `running`, whose time slice is used up; None: `running` keeps its slot.

        The queue does not change. The caller must call `start` when the slot is free.
        """
        return self._queue.successor(running, may_start_new=may_start_new)

    def start(self, successor: LiveRequest) -> None:
        """Remove the successor from the queue, like `take`."""
        self._queue.start(successor)
        self._uncount(successor)

    def withdraw(self, request: LiveRequest) -> None:
        """Remove a waiting request that does not start."""
        self._queue.withdraw(request)
        self._uncount(request)

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        """Charge the tokens that the engine computed for a started request."""
        self._queue.charge(request, prompt_tokens=prompt_tokens, tokens=tokens)

    def end_run(self, request: LiveRequest) -> None:
        """A started request has ended, or was requeued: the policy forgets its run."""
        self._queue.end_run(request)

    def end(self, request: LiveRequest) -> None:
        """Forget a request that has ended and is not in the queue. Requests held for it become eligible."""
        for successor in self._eligibility.end(request):
            self._queue.unhold(successor)

    # --- queries ----------------------------------------------------------------------------------------------

    @property
    def is_exact(self) -> bool:
        return self._queue.is_exact

    @property
    def slice_tokens(self) -> int | None:
        """Tokens of a time slice, if the policy defines its own; None: `SchedulerSettings.slice_tokens` applies."""
        return self._queue.slice_tokens

    def position(self, request: LiveRequest) -> int:
        """Position in the queue, from 1."""
        return self._queue.position(request)

    def would_be_eligible(self, arrival: Arrival) -> bool:
        return self._eligibility.would_be_eligible(arrival)

    def is_eligible(self, request: LiveRequest) -> bool:
        return self._eligibility.is_eligible(request)

    def is_first_of_conversation(self, request: LiveRequest) -> bool:
        return self._eligibility.is_first_of_conversation(request)

    @property
    def num_eligible(self) -> int:
        """Number of waiting requests that may start as soon as slots are free."""
        return len(self._queue) - self._eligibility.num_held

    def first_eligible(self, num: int) -> Iterator[LiveRequest]:
        """The next `num` eligible requests. O(n) at worst; used only before the scheduler opens."""
        return islice((request for request in self._queue if self._eligibility.is_eligible(request)), num)

    @property
    def num_eligibility_keys(self) -> int:
        """Number of conversations and clients with an eligibility record."""
        return len(self._eligibility)

    @property
    def num_clients(self) -> int:
        """Number of clients with waiting requests."""
        return len(self._num_of_client)

    def num_of_client(self, client: str) -> int:
        """Number of waiting requests of one client."""
        return self._num_of_client.get(client, 0)

    # --- the policy -------------------------------------------------------------------------------------------

    def set_policy(self, policy: str) -> None:
        """Order the same requests by another policy from now on."""
        queue = self._make(policy)
        members = sorted(self._queue, key=lambda request: request.seq)
        # Cleared: a failure of the old queue, also while it was listed, no longer matters.
        self._failure, self.policy, self._queue = None, policy, queue
        for request in members:
            self._queue.push(request, held=not self._eligibility.is_eligible(request))

    def take_failure(self) -> str | None:
        """Why fcfs replaced the policy, reported once; None when it did not."""
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

    # --- counts -----------------------------------------------------------------------------------------------

    def _join(self, request: LiveRequest, *, held: bool) -> None:
        self._queue.push(request, held=held)
        self.tokens += request.waiting_tokens
        self._num_of_client[request.client] = self._num_of_client.get(request.client, 0) + 1

    def _uncount(self, request: LiveRequest) -> None:
        self.tokens -= request.waiting_tokens
        num = self._num_of_client[request.client] - 1
        if num:
            self._num_of_client[request.client] = num
        else:
            del self._num_of_client[request.client]
