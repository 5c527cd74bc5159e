"""The scheduler's decisions as values, in the order in which they were made.

The shell acts on some events (`Started`, `AbortRequested`, the ends), metrics and logs read all of them, and the
whole state can be replayed from them. Every event has a gap-free number, the time of the call that caused it, and,
where it concerns one request, the id of the request. Events are named tuples: one is made for every token.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from chatstream.scheduler.slots import Grant


class Received(NamedTuple):
    """A request has arrived. `Admitted` or `Rejected` follows in the same call."""

    number: int
    at_s: float
    request_id: str
    client: str
    conversation: str | None


class Rejected(NamedTuple):
    """The request was not admitted. The scheduler keeps nothing of it."""

    number: int
    at_s: float
    request_id: str
    code: str
    """Code of the error: queue_full, shutting_down …"""
    retry_after_s: float | None


class Admitted(NamedTuple):
    """The request waits in the queue. `Started` may follow in the same call."""

    number: int
    at_s: float
    request_id: str
    seq: int
    position: int


class Started(NamedTuple):
    """The request has a slot. The shell must open its generation now."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    waited_s: float
    eta_error_s: float | None
    """First sent p50 - actual wait since it was sent; None when no ETA was sent."""


class Tokens(NamedTuple):
    """The engine generated tokens for the request."""

    number: int
    at_s: float
    request_id: str
    num_tokens: int
    total: int
    """Tokens of the answer so far, these included."""


class Requeued(NamedTuple):
    """The engine failed before the first token. The request waits again, with its original rank, and will restart."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    """The grant of the failed attempt."""


class PreemptRequested(NamedTuple):
    """The request must give up its slot. The shell must make the engine preempt it, then call `on_preempted`."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    why: str
    """slice: the time slice is used up and another request waits. limit: the concurrency limit fell."""


class Preempted(NamedTuple):
    """The engine has preempted the request. It waits again, with its original rank; the engine keeps its state."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    """The grant that was released."""


class Resumed(NamedTuple):
    """A preempted request has a slot again. The shell must make the engine resume it."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    preempted_s: float
    """Time since the preemption, in seconds."""


class AbortRequested(NamedTuple):
    """The shell must make the engine release the request now, then call `on_ended`.

    A running request keeps its slot until then.
    """

    number: int
    at_s: float
    request_id: str
    grant: Grant
    by: str


class Finished(NamedTuple):
    """End: the answer is complete."""

    number: int
    at_s: float
    request_id: str
    reason: str
    """Finish reason: stop or length."""
    total: int


class Cancelled(NamedTuple):
    """End: the request was cancelled, waiting or running."""

    number: int
    at_s: float
    request_id: str
    by: str
    """Origin of the cancellation: client, shutdown …"""
    total: int


class Failed(NamedTuple):
    """End: the engine failed."""

    number: int
    at_s: float
    request_id: str
    code: str
    """Code of the error: engine_error …"""
    total: int


class Expired(NamedTuple):
    """End: the request did not start within its maximum wait."""

    number: int
    at_s: float
    request_id: str
    waited_s: float


class SlotReclaimed(NamedTuple):
    """The watchdog took the slot from a request that made no progress or was not released: a bug in the engine.

    The end of the request follows in the same call.
    """

    number: int
    at_s: float
    request_id: str
    grant: Grant
    why: str
    """no progress, or not released"""


class LimitsChanged(NamedTuple):
    """A limit changed. Both numbers are those now in force."""

    number: int
    at_s: float
    max_concurrency: int
    max_queue_size: int
    by: str
    """The operator; "adaptive" or "auto" when the scheduler decided."""
    why: str


class PolicyChanged(NamedTuple):
    """The queue has another order from now on."""

    number: int
    at_s: float
    policy: str
    by: str
    """The operator; "scheduler" when the previous policy failed."""
    why: str


class Paused(NamedTuple):
    """New requests are rejected from now on. Waiting and running requests continue."""

    number: int
    at_s: float
    by: str
    why: str


class Unpaused(NamedTuple):
    """New requests are admitted again."""

    number: int
    at_s: float
    by: str
    why: str


class Opened(NamedTuple):
    """Requests start from now on. Also ends a drain."""

    number: int
    at_s: float
    by: str = ""
    why: str = ""


class DrainStarted(NamedTuple):
    """No request is admitted and no waiting request starts from now on. Requests that have not started are cancelled;
    preempted requests resume."""

    number: int
    at_s: float
    by: str = ""
    why: str = ""


End: TypeAlias = Finished | Cancelled | Failed | Expired
Event: TypeAlias = (
    Received
    | Rejected
    | Admitted
    | Started
    | Tokens
    | Requeued
    | PreemptRequested
    | Preempted
    | Resumed
    | AbortRequested
    | End
    | SlotReclaimed
    | LimitsChanged
    | PolicyChanged
    | Paused
    | Unpaused
    | Opened
    | DrainStarted
)
