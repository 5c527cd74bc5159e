"""The protocol of a policy: the queue of waiting requests."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from chatstream.scheduler.request import LiveRequest


class WaitingQueue(Protocol):
    """The waiting requests, in the order in which they start.

    The scheduler moves a request through the queue with these calls:

        push ──▶ (unhold) ──▶ take, or successor and start ──▶ charge … ──▶ end_run
          ▲                                                       │
          └─────────────────────── preempted ─────────────────────┘
        push ──▶ withdraw     the request is cancelled or expires while it waits

    - `push` adds a request. With `held=True` the request counts in every position, but is not eligible: `take` and
      `successor` do not return it before `unhold`. An earlier request of its conversation has not ended, or its client
      already runs `max_running_per_client` requests.
    - `push` is called again, with the same `seq`, for a request that was preempted (`request.is_preempted`; the engine
      keeps its state) and, after `end_run`, for a request whose engine failed before the first token.
    - A preempted request that is cancelled is withdrawn; `end_run` follows.
    - After a change of policy the new queue gets `charge`, `end_run` and `push` of requests that it has never started.
    - Each method takes microseconds with 10,000 waiting requests: no loop over the queue, except in `__iter__`.

    `chatstream.testing.check_policy` checks an implementation.
    """

    @property
    def is_exact(self) -> bool:
        """Positions never grow. False: positions are estimates, and clients receive them as estimates."""

    @property
    def slice_tokens(self) -> int | None:
        """Generated tokens of a time slice, for a policy that depends on slices; its successors need not have waited.

        None: the setting `slice_tokens` applies.
        """

    def push(self, request: LiveRequest, *, held: bool) -> None:
        """Add a request, new or returning. A preempted request is never held."""

    def unhold(self, request: LiveRequest) -> None:
        """Make a held request eligible."""

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        """Remove and return the request that starts next; None only if no request is eligible.

        Without `may_start_new` only preempted requests are eligible: the engine has as many unfinished generations as
        it may have.
        """

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        """Return the request that gets the slot of `running`, whose time slice is over; None: `running` keeps the slot.

        Does not change the queue. `may_start_new` as for `take`.
        """

    def start(self, request: LiveRequest) -> None:
        """Remove the successor, as `take` does. The queue may have changed since `successor` returned it."""

    def withdraw(self, request: LiveRequest) -> None:
        """Remove a waiting request, held or not, that does not start."""

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        """Account for prompt tokens that the engine computed and answer tokens that it generated for a request.

        Called for each delta of the engine. The last call for a request may come after it was preempted or cancelled.
        """

    def end_run(self, request: LiveRequest) -> None:
        """Forget a request that had started: it has ended, or its engine failed and `push` follows."""

    def position(self, request: LiveRequest) -> int:
        """The rank of a waiting request, 1 for the first: 1 + the waiting requests ahead, held ones included.

        Agrees with the order of iteration.
        """

    def __len__(self) -> int:
        """The number of waiting requests, held ones included."""

    def __iter__(self) -> Iterator[LiveRequest]:
        """The waiting requests in the order of their positions. May take time in proportion to their number."""
