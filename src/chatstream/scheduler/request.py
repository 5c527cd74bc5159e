"""A request as the scheduler sees it: its origin, its state and its progress. No text, no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from chatstream.scheduler.slots import Grant
from chatstream.scheduler.states import State, Trigger, next_state


class Eta(NamedTuple):
    """Seconds from now until the start. Both are finite, and 0 <= p50_s <= p90_s."""

    p50_s: float
    """The median: an earlier start is as likely as a later one."""
    p90_s: float
    """Nine of ten requests start by then."""


class SentEta(NamedTuple):
    """An ETA that was sent to the client of a request."""

    eta: Eta
    sent_s: float
    position: int
    """Position of the request at `sent_s`."""
    epoch: int
    """`EtaEstimator.epoch` at `sent_s`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """A new request: the facts that are known before any costly work is done for it."""

    request_id: str
    client: str = ""
    """The fairness key: an API key, a user, a session or an address, never a socket."""
    conversation: str | None = None
    """Requests of one conversation run one after the other; a later one is held, without a slot."""
    priority: int = 0
    max_wait_s: float | None = None
    """The request expires when it has not started within this time. None: no limit of its own."""
    prompt_tokens: int = 0
    """Estimated length of the prompt, which has not been tokenised yet."""
    max_new_tokens: int | None = None
    """Maximum length of the answer; None: not specified."""


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One admitted request, until its end. Only the scheduler changes it; policies read it."""

    arrival: Arrival
    seq: int
    """Order of admission; unique, and kept when the request is requeued."""
    admitted_s: float
    expires_s: float | None = None
    """The request never starts at or after this time; None: it does not expire."""
    state: State = State.WAITING
    attempt: int = 0
    grant: Grant | None = None
    """The grant of the latest start or resumption; in use while `holds_slot`."""
    started_s: float = 0.0
    """Start of the latest attempt; time slices do not change it."""
    slot_since_s: float = 0.0
    """Start or resumption, whichever was last."""
    generated_tokens: int = 0
    last_progress_s: float = 0.0
    """Start, resumption, or the last token, whichever was last."""
    slice_tokens: int = 0
    """Tokens generated in this time slice."""
    preempted_s: float = 0.0
    """When the request lost its slot, while PREEMPTED."""
    abort_by: str = ""
    """Origin of the cancellation, while ABORTING or LEAVING."""
    slot_time_s: float = 0.0
    """Total time in slots that the request has released."""
    waiting_tokens: int = 0
    """Estimated tokens of prompt and answer, for `max_waiting_tokens`."""
    first_sent_eta: SentEta | None = None
    """The first ETA sent to the client, until the start of the request is compared with it."""
    last_sent_eta: SentEta | None = None
    """The latest ETA sent to the client: the next one is smoothed against it."""

    @property
    def request_id(self) -> str:
        return self.arrival.request_id

    @property
    def client(self) -> str:
        return self.arrival.client

    @property
    def priority(self) -> int:
        return self.arrival.priority

    @property
    def holds_slot(self) -> bool:
        return self.state.holds_slot

    @property
    def is_preempted(self) -> bool:
        """The request waits to resume, and its engine keeps its state."""
        return self.state is State.PREEMPTED

    @property
    def is_aborted(self) -> bool:
        """The request was cancelled, and the engine has not released it yet."""
        return self.state.is_aborted

    def move(self, trigger: Trigger) -> None:
        """Raises `InvalidTransition` when the state does not allow `trigger`."""
        self.state = next_state(self.state, trigger)
