"""The faults of the reliability tests by name. docs/reliability.md lists the same names.

A fault point is an existing interface (engine, network, observer, clock, policy, callback, store, task) at which a run
injects a fault. Each point has its own random number generator, so that the absence of one fault does not change when
the others occur.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Collection

FAULT_POINTS: dict[str, tuple[str, float]] = {
    # The engine
    "start raises": ("the stream raises before its first token", 0.1),
    "step raises": ("a step raises in the middle of an answer", 0.1),
    "memory error in the engine": ("a step raises MemoryError", 0.1),
    "engine is lost": ("a step raises EngineUnavailable, before or after the first token", 0.15),
    "engine hangs": ("no further token comes; cancellation works", 0.08),
    "engine is deaf": ("no further token comes; cancellation has no effect until the engine recovers", 0.15),
    "slow step": ("one step takes a hundred times as long", 0.1),
    "first token after cancel": ("a cancelled generation yields one more token", 0.3),
    "finish during cancel": ("a cancelled generation yields its last token", 0.3),
    "goes on after its end": ("a generation yields another delta after the last one", 0.1),
    "ends without a finish": ("the stream ends without a finish reason", 0.1),
    "engine cancels itself": ("the stream raises CancelledError without a cancellation", 0.08),
    "cancelled inside finally": ("the clean-up of a generation is slow and is cancelled too", 0.3),
    "cannot preempt": ("preempt raises, or does not return", 0.3),
    "cannot resume": ("resume raises", 0.2),
    "late callback": ("a report arrives for an attempt or a time slice that has ended", 0.5),
    "wrong ids": ("unknown request ids are cancelled, read, preempted and resumed", 0.3),
    "engine swap": ("the engine is restarted while requests run", 0.3),
    "shutdown during startup": ("the server stops while the engine loads, and starts again", 0.3),
    # Between admission and the first token
    "after admission": ("preparing the prompt of an admitted request raises", 0.15),
    "slow preparation": ("preparing the prompt takes longer than the client waits", 0.15),
    "between pop and start": ("a request is cancelled after the decision to start it and before its start", 0.15),
    "queue full at requeue": ("a request returns from a lost engine to a full queue", 1.0),
    # The network
    "disconnect at a write": ("the client resets the connection when data arrives", 0.15),
    "change of networks": ("the connection of a resumable stream is reset, and the client reconnects", 0.3),
    "disconnect in line": ("the connection is closed or reset while the request waits", 0.15),
    "peer vanishes": ("the connection is cut without notice to either side", 0.1),
    "slow reader": ("the client reads a few bytes at a time", 0.15),
    "reader stalls": ("the client stops reading and keeps the connection open", 0.1),
    "request stalls": ("half of a request arrives, then nothing", 0.1),
    # Code of the embedding application
    "observer raises": ("an observer of the events raises, including CancelledError", 0.1),
    "log sink blocks": ("an observer of the events blocks the event loop for seconds", 0.02),
    "callback raises": ("the callback at the end of a request raises", 0.5),
    "store fails": ("the conversation store has no file descriptor left", 0.2),
    "store is slow": ("the conversation store takes seconds", 0.2),
    "task is cancelled": ("the task of a generation or of a connection is cancelled from outside", 0.3),
    # Time
    "garbage collection": ("the process is suspended for a second", 0.3),
    "loop is blocked": ("the event loop is blocked for 20 s, longer than every time limit", 0.2),
    "clock step": ("the machine sleeps for six hours", 0.1),
    # The operator
    "limit shrinks": ("the limits drop below the running and waiting requests; a limit of 0 is refused", 0.4),
    "policy changes": ("the policy changes while requests wait", 0.4),
    "intake pauses": ("new requests are rejected for a while", 0.3),
    "double drain": ("the queue is drained twice and reopened", 0.3),
    "SIGTERM": ("the server stops during the run, with or without a grace period", 0.3),
    "client table overflows": ("the fair policy remembers at most one idle client", 1.0),
}
"""Description of each fault, and its probability at each opportunity in a run that includes it."""


class Faults:
    """The faults that are enabled in one run, and the number of times each has occurred."""

    def __init__(self, seed: int, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._rngs = {name: random.Random(f"{seed}:{name}") for name in FAULT_POINTS}
        self.is_over = False
        """No further fault occurs once this is set."""
        self.hits: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def strikes(self, name: str) -> bool:
        """Decide at an opportunity whether the fault occurs. If True it is counted, and the caller must cause it."""
        strikes = self._rngs[name].random() < FAULT_POINTS[name][1] and name in self._names and not self.is_over
        if strikes:
            self.hits[name] += 1
        return strikes

    def rng(self, name: str) -> random.Random:
        """Random numbers for the details of a fault."""
        return self._rngs[name]
