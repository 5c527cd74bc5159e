"""The states of a request, and every way from one to the next.

              start              abort
    WAITING ─────────▶ RUNNING ─────────▶ ABORTING
       │  ▲            │  │  ▲               │   ▲
       │  └──requeue───┤  │  └──start──┐     │   │ abort
       │               │  preempt      │     │   │
       │           end │  └▶ PREEMPTING ─▶ PREEMPTED
       │ end           │        parked       │ end
       └───────────────┴─────────────────────┴────────▶ ENDED

WAITING     holds a place in line and nothing else.
RUNNING     holds a slot; the engine generates.
PREEMPTING  has used up its time slice, but the engine has not parked it yet: it still holds its slot.
PREEMPTED   holds a place in line again, the one it had; its engine keeps its state, so it goes on where it was.
ABORTING    somebody wants it to end, but the engine has not let go yet. It keeps the slot that it held, because a slot
            is free only when the engine is. Nothing more is delivered.
ENDED       absorbing. Whatever the request held was given back in the call that got it here.

A request that is refused never enters the table: it has no state to leak.
"""

from __future__ import annotations

from enum import StrEnum


class _Word(StrEnum):
    # Enum hashes in Python; the table is looked up for every request, so it takes str's own.
    __hash__ = str.__hash__


class State(_Word):
    WAITING = "waiting"
    RUNNING = "running"
    PREEMPTING = "preempting"
    PREEMPTED = "preempted"
    ABORTING = "aborting"
    ENDED = "ended"


class Trigger(_Word):
    START = "start"
    REQUEUE = "requeue"
    PREEMPT = "preempt"
    PARKED = "parked"
    ABORT = "abort"
    END = "end"


TRANSITIONS: dict[tuple[State, Trigger], State] = {
    (State.WAITING, Trigger.START): State.RUNNING,
    (State.RUNNING, Trigger.REQUEUE): State.WAITING,
    (State.RUNNING, Trigger.PREEMPT): State.PREEMPTING,
    (State.PREEMPTING, Trigger.PARKED): State.PREEMPTED,
    (State.PREEMPTED, Trigger.START): State.RUNNING,
    (State.RUNNING, Trigger.ABORT): State.ABORTING,
    (State.PREEMPTING, Trigger.ABORT): State.ABORTING,
    (State.PREEMPTED, Trigger.ABORT): State.ABORTING,
    (State.WAITING, Trigger.END): State.ENDED,
    (State.RUNNING, Trigger.END): State.ENDED,
    (State.PREEMPTING, Trigger.END): State.ENDED,
    (State.PREEMPTED, Trigger.END): State.ENDED,
    (State.ABORTING, Trigger.END): State.ENDED,
}


class InvalidTransition(AssertionError):
    """A bug of ours: an event that the state does not know."""


def next_state(state: State, trigger: Trigger) -> State:
    """The state after `trigger`. Raises `InvalidTransition` when the table does not know it."""
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
