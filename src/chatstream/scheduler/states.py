"""The states of a request, and the transitions between them.

               start            preempt              preempted
    WAITING ──────────▶ RUNNING ────────▶ PREEMPTING ──────────▶ PREEMPTED
       ▲     requeue     │ ▲ │                │                   │    │
       └─────────────────┘ │ │ abort          │ abort             │    │ abort
                           │ └──▶ ABORTING ◀──┘                   │    └────▶ LEAVING
                           └──────────────────────────────────────┘
                                              start
    Every state but ENDED also has an arrow `end` to ENDED.

state       in the queue  slot  engine state
WAITING     yes           -     -             The request has a position and nothing else.
RUNNING     -             yes   yes           The engine generates.
PREEMPTING  -             yes   yes           The scheduler wants its slot; the engine has not given it up yet.
PREEMPTED   yes           -     yes           The request waits with its original rank, and resumes where it stopped.
ABORTING    -             yes   yes           The request was cancelled; the engine has not released it yet. A slot is
                                              free only when the engine is, so the request keeps it. No more tokens
                                              are delivered to the client.
LEAVING     -             -     yes           Like ABORTING, for a preempted request, which has no slot.
ENDED       -             -     -             Absorbing. The call that ends a request releases all its resources.

A rejected request never enters the table: it has no state that could leak.
"""

from __future__ import annotations

from enum import StrEnum


class _Word(StrEnum):
    # Enum.__hash__ is a Python function. str's is faster, and the table is looked up for every request.
    __hash__ = str.__hash__


class State(_Word):
    # Set below, once for each state: a property would cost more than the rest of a transition.
    holds_slot: bool
    is_aborted: bool
    """The request was cancelled, and the engine has not released it yet."""

    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTING = "preempting"
    PREEMPTED = "preempted"
    ABORTING = "aborting"
    LEAVING = "leaving"
    ENDED = "ended"


for _state in State:
    _state.holds_slot = _state in (State.RUNNING, State.PREEMPTING, State.ABORTING)
    _state.is_aborted = _state in (State.ABORTING, State.LEAVING)


class Trigger(_Word):
    START = "start"
    REQUEUE = "requeue"
    PREEMPT = "preempt"
    PREEMPTED = "preempted"
    ABORT = "abort"
    END = "end"


TRANSITIONS: dict[tuple[State, Trigger], State] = {
    (State.WAITING, Trigger.START): State.RUNNING,
    (State.RUNNING, Trigger.REQUEUE): State.WAITING,
    (State.RUNNING, Trigger.PREEMPT): State.PREEMPTING,
    (State.PREEMPTING, Trigger.PREEMPTED): State.PREEMPTED,
    (State.PREEMPTED, Trigger.START): State.RUNNING,
    (State.RUNNING, Trigger.ABORT): State.ABORTING,
    (State.PREEMPTING, Trigger.ABORT): State.ABORTING,
    (State.PREEMPTED, Trigger.ABORT): State.LEAVING,
    (State.WAITING, Trigger.END): State.ENDED,
    (State.RUNNING, Trigger.END): State.ENDED,
    (State.PREEMPTING, Trigger.END): State.ENDED,
    (State.PREEMPTED, Trigger.END): State.ENDED,
    (State.ABORTING, Trigger.END): State.ENDED,
    (State.LEAVING, Trigger.END): State.ENDED,
}


class Phase(_Word):
    """Whether the scheduler admits and starts requests."""

    CLOSED = "closed"
    """Admits requests, starts none: the engine is not loaded yet."""
    OPEN = "open"
    DRAINING = "draining"
    """Admits none and starts none; requests that have started continue to their end."""


class InvalidTransition(AssertionError):
    """The scheduler applied a trigger that the state does not allow: a bug."""


def next_state(state: State, trigger: Trigger) -> State:
    """The state after `trigger`. Raises `InvalidTransition` when the table has no such transition."""
    try:
        return TRANSITIONS[state, trigger]
    except KeyError:
        raise InvalidTransition(f"{trigger} is impossible in state {state}") from None


class Outcome(_Word):
    """How an admitted request ended. The values are the metric's labels."""

    FINISHED = "finished"
    CANCELLED = "cancelled"
    FAILED = "failed"
    EXPIRED = "expired"
