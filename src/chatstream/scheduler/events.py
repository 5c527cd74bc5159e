"""The scheduler's decisions as values, in the order they were made.

The shell acts on some of them (`Started`, `AbortRequested`, the ends), metrics and logs read all of them, and the
whole state can be replayed from them. Every event has a gap-free number, the time of the call that caused it, and
(where there is one) the request it is about. They are named tuples, because one is made for every token.
"""

from __future__ import annotations

from typing import NamedTuple, TypeAlias

from chatstream.scheduler.slots import Grant


class Received(NamedTuple):
    """A request is at the door. `Admitted` or `Rejected` follows in the same call."""

    number: int
    at_s: float
    request_id: str
    client: str
    conversation: str | None


class Rejected(NamedTuple):
    number: int
    at_s: float
    request_id: str
    code: str
    """The error's code: queue_full, shutting_down …"""
    retry_after_s: float | None


class Admitted(NamedTuple):
    """It holds a place; `Started` may follow in the same call."""

    number: int
    at_s: float
    request_id: str
    seq: int
    position: int


class Started(NamedTuple):
    """It has a slot: open the engine's stream now."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    waited_s: float
    eta_error_s: float | None
    """Expected wait - actual wait, since its client was told of it first; None when it was never told."""


class Tokens(NamedTuple):
    number: int
    at_s: float
    request_id: str
    num_tokens: int
    total: int
    """Generated so far, these included."""


class Requeued(NamedTuple):
    """The engine failed before the first token: the request is back in its old place."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    """The one it has lost."""


class PreemptRequested(NamedTuple):
    """Its time slice is used up and somebody waits: make the engine preempt it, then report `on_preempted`."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    why: str
    """slice, or limit: fewer may run now"""


class Preempted(NamedTuple):
    """The engine has preempted it: it is back in its place in line, and its engine keeps its state."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    """The one it has lost."""


class Resumed(NamedTuple):
    """It has a slot again: make the engine go on."""

    number: int
    at_s: float
    request_id: str
    grant: Grant
    preempted_s: float
    """How long it was without one."""


class AbortRequested(NamedTuple):
    """Make the engine let go of this request now, then report `on_ended`. It still holds its slot."""

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
    """stop or length"""
    total: int


class Cancelled(NamedTuple):
    """End: somebody ended it, waiting or running."""

    number: int
    at_s: float
    request_id: str
    by: str
    total: int


class Failed(NamedTuple):
    """End: the engine failed."""

    number: int
    at_s: float
    request_id: str
    code: str
    total: int


class Expired(NamedTuple):
    """End: it waited as long as it was allowed to."""

    number: int
    at_s: float
    request_id: str
    waited_s: float


class SlotReclaimed(NamedTuple):
    """The watchdog took a slot from a generation that made no progress or did not let go: an engine's bug.

    The request's end follows in the same call.
    """

    number: int
    at_s: float
    request_id: str
    grant: Grant
    why: str


class LimitsChanged(NamedTuple):
    number: int
    at_s: float
    max_concurrency: int
    max_queue_size: int
    by: str
    """Who asked for it; adaptive or auto: nobody."""
    why: str


class PolicyChanged(NamedTuple):
    number: int
    at_s: float
    policy: str
    by: str
    why: str


class Paused(NamedTuple):
    """New requests are refused; those who wait and run go on."""

    number: int
    at_s: float
    by: str
    why: str


class Unpaused(NamedTuple):
    number: int
    at_s: float
    by: str
    why: str


class Opened(NamedTuple):
    """Requests start from now on."""

    number: int
    at_s: float
    by: str = ""
    why: str = ""


class DrainStarted(NamedTuple):
    """Nothing is admitted and nothing starts any more; those who had not begun are ended in the same call."""

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
