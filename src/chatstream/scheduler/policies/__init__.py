"""The order of the queue: one class for each policy, behind one protocol. The scheduler uses only the protocol.

To add a policy, write a class with the methods of `WaitingQueue` and register it in `QUEUES`.

    base.py            the protocol, `WaitingQueue`
    keyed.py           a queue sorted by a fixed key: the base class of most policies
    sorted_keys.py     sorted keys with exact ranks
    guarded.py         replaces a failing policy from outside the package
    fcfs.py            first come, first served
    priority.py        priority classes with ageing
    fair.py            fair sharing of tokens between clients, without and with time slices
    fair_clients.py      its state for each client and request
    fair_positions.py    its estimated positions
    spf.py             shortest predicted answer first, with ageing
    predictor.py         predicts the length of an answer
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
"""Policies by name, as in `--policy`: functions that make an empty queue from the settings."""
BUILT_IN = tuple(QUEUES.values())
"""The entries of `QUEUES` from this package. A queue from any other function is wrapped in `GuardedQueue`."""

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
