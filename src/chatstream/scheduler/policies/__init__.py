"""Who is next. One class a policy, behind one protocol (`base.py`); the scheduler knows only the protocol.

To add a policy: write a class with the methods of `WaitingQueue`, and give it a name in `QUEUES`.

    base.py      the protocol
    keyed.py     one line, sorted by a key: what most policies are
    guarded.py   what happens when a policy from outside the package fails
    fcfs.py      first come, first served
    priority.py  classes with ageing
    fair.py      clients share by tokens; fair_clients.py: what it keeps of them, fair_positions.py: estimated places
    spf.py       shortest predicted first, with ageing (by ../predictor.py)
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from chatstream.scheduler.policies.base import WaitingQueue
from chatstream.scheduler.policies.fair import SLICE_TOKENS, FairQueue
from chatstream.scheduler.policies.fcfs import FifoQueue
from chatstream.scheduler.policies.guarded import GuardedQueue
from chatstream.scheduler.policies.keyed import KeyedQueue
from chatstream.scheduler.policies.priority import PriorityQueue
from chatstream.scheduler.policies.spf import SpfQueue

if TYPE_CHECKING:
    from chatstream.scheduler.settings import SchedulerSettings

QUEUES: dict[str, Callable[[SchedulerSettings], WaitingQueue]] = {
    "fcfs": lambda settings: FifoQueue(),
    "priority": lambda settings: PriorityQueue(settings.ageing_s),
    "fair": lambda settings: FairQueue(settings.client_weights),
    "fair-token": lambda settings: FairQueue(
        settings.client_weights, slice_tokens=settings.slice_tokens or SLICE_TOKENS
    ),
    "spf": lambda settings: SpfQueue(settings.spf_ageing_s_per_token),
}
"""Policies by the name an operator gives (`--policy`)."""
BUILT_IN = tuple(QUEUES.values())
"""What this package put into `QUEUES`. Queues made by anything else are guarded."""

__all__ = [
    "BUILT_IN",
    "QUEUES",
    "FairQueue",
    "FifoQueue",
    "GuardedQueue",
    "KeyedQueue",
    "PriorityQueue",
    "SpfQueue",
    "WaitingQueue",
]
