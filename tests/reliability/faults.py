"""Everything that the reliability tests let go wrong, by name. docs/reliability.md lists the same names.

A fault point is a seam that exists anyway (engine, network, observer, clock, policy, callback, store, task) at which a
run may let something go wrong. Each has a stream of random numbers of its own, so that leaving one out changes nothing
about when the others strike.
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
    "engine hangs": ("no further token comes, but it can be cancelled", 0.08),
    "engine is deaf": ("no further token comes, and cancelling does nothing until it is healed", 0.15),
    "slow step": ("one step takes a hundred times as long", 0.1),
    "first token after cancel": ("it yields one more token when it is cancelled", 0.3),
    "finish during cancel": ("it yields its last token when it is cancelled", 0.3),
    "goes on after its end": ("it yields another delta after the last one", 0.1),
    "ends without a finish": ("the stream ends without a finish reason", 0.1),
    "engine cancels itself": ("the stream raises CancelledError that nobody asked for", 0.08),
    "cancelled inside finally": ("its clean-up takes a while, and is cancelled as well", 0.3),
    "cannot preempt": ("preempt raises, or does not return", 0.3),
    "cannot resume": ("resume raises", 0.2),
    "late callback": ("it reports again of an attempt or a time slice that is over", 0.5),
    "wrong ids": ("requests that do not exist are cancelled, read, preempted and resumed", 0.3),
    "engine swap": ("the engine is stopped and started again under those who run", 0.3),
    "shutdown during startup": ("a stop while the engine loads, then another start", 0.3),
    # Between admission and the first token
    "after admission": ("preparing the prompt raises when the request has its place", 0.15),
    "slow preparation": ("preparing the prompt takes longer than its client waits", 0.15),
    "between pop and start": ("it is cancelled when its start has been decided and not happened", 0.15),
    "queue full at requeue": ("it comes back from a lost engine to a line that is full", 1.0),
    # The network
    "disconnect at a write": ("the connection is reset when some write reaches the client", 0.15),
    "change of networks": ("the connection of a resumable stream is reset, and its client comes back", 0.3),
    "disconnect in line": ("the connection is closed or reset while the request waits", 0.15),
    "peer vanishes": ("neither side learns that the connection is cut", 0.1),
    "slow reader": ("the client takes a few bytes now and then", 0.15),
    "reader stalls": ("the client takes nothing any more, and stays", 0.1),
    "request stalls": ("half a request comes, then nothing", 0.1),
    # Foreign code
    "observer raises": ("an observer of the events raises, CancelledError too", 0.1),
    "log sink blocks": ("an observer of the events holds the loop for seconds", 0.02),
    "callback raises": ("the callback at the end of a request raises", 0.5),
    "store fails": ("the conversation store has no file descriptor left", 0.2),
    "store is slow": ("the conversation store takes seconds", 0.2),
    "task is cancelled": ("somebody cancels the task of a generation or of a connection", 0.3),
    # Time
    "garbage collection": ("the whole process stands still for a second", 0.3),
    "loop is blocked": ("the event loop does nothing for 20 s, longer than every time limit", 0.2),
    "clock step": ("the machine sleeps for six hours", 0.1),
    # The operator
    "limit shrinks": ("fewer may run than do, nobody may wait; 0 is refused", 0.4),
    "policy changes": ("the order changes while people wait", 0.4),
    "intake pauses": ("new requests are refused for a while", 0.3),
    "double drain": ("drained twice and opened again", 0.3),
    "SIGTERM": ("a stop in the middle, with or without a grace time", 0.3),
    "client table overflows": ("the fair policy remembers one idle client at most", 1.0),
}
"""What goes wrong, and how probably at each opportunity in a run that has it."""


class Faults:
    """Which points may strike in one run, and how often each did."""

    def __init__(self, seed: int, names: Collection[str]) -> None:
        self._names = frozenset(names)
        self._rngs = {name: random.Random(f"{seed}:{name}") for name in FAULT_POINTS}
        self.is_over = False
        """From now on nothing goes wrong any more."""
        self.hits: Counter[str] = Counter()

    def __contains__(self, name: str) -> bool:
        return name in self._names

    def strikes(self, name: str) -> bool:
        """An opportunity: does it strike? If so it is counted, and the caller must let it happen."""
        strikes = self._rngs[name].random() < FAULT_POINTS[name][1] and name in self._names and not self.is_over
        if strikes:
            self.hits[name] += 1
        return strikes

    def rng(self, name: str) -> random.Random:
        """For how and when it happens."""
        return self._rngs[name]
