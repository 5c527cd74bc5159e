"""What the scheduler asks of a policy: who is next."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from chatstream.scheduler.request import LiveRequest


class WaitingQueue(Protocol):
    """The requests that wait, and the order in which they start.

    - A request may be pushed as *held*: it has its place and counts for everybody's position, but must not be taken
      until `unhold` (it waits for an earlier request of its own conversation).
    - A request may come back with the `seq` it had: its engine failed before the first token, or it was preempted
      (`request.is_preempted`: its engine keeps its state, so it goes on where it was).
    - No method may scan the line, except `__iter__`.
    """

    @property
    def is_exact(self) -> bool:
        """Positions are promises: they never grow. Otherwise they are estimates, and told as such."""

    @property
    def slice_tokens(self) -> int | None:
        """A policy that lives from time slices says how long one is, and its successors need not have waited. None: the
        operator decides (`slice_tokens`)."""

    def push(self, request: LiveRequest, *, held: bool) -> None:
        """A request joins, or comes back."""

    def unhold(self, request: LiveRequest) -> None:
        """A held request may be taken from now on."""

    def take(self, *, may_start_new: bool = True) -> LiveRequest | None:
        """Remove and return the request that starts next; None when nobody may start.

        Without `may_start_new` the engine can hold no more unfinished generations: only a preempted one may.
        """

    def successor(self, running: LiveRequest, *, may_start_new: bool) -> LiveRequest | None:
        """Who should have the slot of `running`, which has used up its time slice; None: it keeps the slot.

        Only looks. `may_start_new` as for `take`.
        """

    def start(self, request: LiveRequest) -> None:
        """The successor takes over: as if it had been taken."""

    def withdraw(self, request: LiveRequest) -> None:
        """A waiting request, held or not, leaves without starting."""

    def charge(self, request: LiveRequest, *, prompt_tokens: int, tokens: int) -> None:
        """The engine has read or generated so many tokens for a request. Called for every token of those who run, and
        for the last ones of those who were preempted or cancelled meanwhile."""

    def end_run(self, request: LiveRequest) -> None:
        """A request that ran has ended: forget what was kept of it."""

    def position(self, request: LiveRequest) -> int:
        """1 for the next. Counts everybody ahead, the held ones too."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[LiveRequest]:
        """In the order of their positions."""
