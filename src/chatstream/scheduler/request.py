"""A request as the scheduler sees it: where it came from and how far it is. No text, no tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from chatstream.scheduler.slots import Grant
from chatstream.scheduler.states import State, Trigger, next_state

if TYPE_CHECKING:
    from chatstream.scheduler.eta.calibration import Eta


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
    prompt_tokens: int = 0
    """Length of the prompt, by estimate: nothing has been tokenised yet."""
    max_new_tokens: int | None = None
    """The answer has at most so many tokens; None: nobody said."""


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
    """Of its latest start or resumption. Its slot belongs to the request while `holds_slot`."""
    started_s: float = 0.0
    """Its latest attempt began; time slices do not change it."""
    slot_since_s: float = 0.0
    generated_tokens: int = 0
    last_progress_s: float = 0.0
    """Start, resumption, or the last token."""
    slice_tokens: int = 0
    """Generated in this time slice."""
    preempted_s: float = 0.0
    """When it lost its slot, while PREEMPTED."""
    abort_by: str = ""
    """What asked for its end, while ABORTING or LEAVING."""
    held_s: float = 0.0
    """So long has it held slots that it does not hold any more."""
    waiting_tokens: int = 0
    """What it counts for while it waits: prompt and answer, by estimate."""
    first_told: tuple[Eta, float] | None = None
    """What its client was told first of its start, and when: measured against what comes true."""
    last_told: tuple[Eta, float, int, int] | None = None
    """What it was told last and when, at which place in line, and in which era of the estimates."""

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
        """It waits for a slot again, and its engine keeps its state."""
        return self.state is State.PREEMPTED

    @property
    def is_aborted(self) -> bool:
        """Its end was requested; the engine has not released it yet."""
        return self.state is State.ABORTING or self.state is State.LEAVING

    def move(self, trigger: Trigger) -> None:
        self.state = next_state(self.state, trigger)
