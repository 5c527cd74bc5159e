"""A request as the scheduler sees it: where it came from and how far it is. No text, no tokens."""

from __future__ import annotations

from dataclasses import dataclass

from chatstream.scheduler.slots import Grant
from chatstream.scheduler.states import State, Trigger, next_state


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """What is known at the door, before anything costly is done for the request."""

    request_id: str
    client: str = ""
    """The fairness key: who is asking, never the socket."""
    conversation: str | None = None
    """Requests of one conversation run one after the other; a later one waits without holding a slot."""
    priority: int = 0
    max_wait_s: float | None = None
    """Give up when it has not started after so long."""


@dataclass(slots=True, eq=False)
class LiveRequest:
    """One admitted request until it ends. Only the scheduler changes it; policies read it."""

    arrival: Arrival
    seq: int
    """Order of admission; unique, and kept when the request comes back after a failed start."""
    admitted_s: float
    expires_s: float | None = None
    """It never starts at or after this time."""
    state: State = State.WAITING
    attempt: int = 0
    grant: Grant | None = None
    """Set while it holds a slot."""
    started_s: float = 0.0
    generated_tokens: int = 0
    last_progress_s: float = 0.0
    """Start, or the last token."""
    abort_by: str = ""
    """Who wanted it to end, while ABORTING."""

    @property
    def request_id(self) -> str:
        return self.arrival.request_id

    @property
    def client(self) -> str:
        return self.arrival.client

    @property
    def priority(self) -> int:
        return self.arrival.priority

    def move(self, trigger: Trigger) -> None:
        self.state = next_state(self.state, trigger)
