"""The core: decides which requests run, wait or are rejected. Pure decisions, no I/O.

Knows: arrivals, slots, a waiting queue, a limit. Knows nothing of: clocks, event loops, HTTP, engines, text, logs.
Facts go in as method calls that carry `now_s`; decisions come out as events.

    scheduler.py    the state machine: starts, preempts, ends and rejects requests
    settings.py     what an operator can set
    states.py       the states of a request and the table of transitions
    request.py      a request as the scheduler sees it
    slots.py        slots and grants, so that a late report about an earlier occupant is recognised
    policies/       the order of the queue: one class for each policy, behind one protocol
    waiting.py      the waiting requests, and the counts of each client
    eligibility.py  limits on the running requests of one conversation and of one client
    admission.py    the checks before a request may wait
    eta/            the expected start of waiting requests, and the error of each estimate
    limits/         the concurrency limit, fixed or adaptive
    deadlines.py    timeouts: queue timeout, stalled generation, engine that does not release a request
    retry_after.py  when a rejected client should try again
    recent_mean.py  a running mean of recent values
    events.py       the decisions, in order; the state can be replayed from them
    views.py        what the scheduler shows of its state
"""

from chatstream.scheduler.eta import rounded
from chatstream.scheduler.eta.calibration import EtaStats
from chatstream.scheduler.policies import QUEUES, FifoQueue, KeyedQueue, WaitingQueue
from chatstream.scheduler.request import Arrival, Eta, LiveRequest
from chatstream.scheduler.scheduler import Scheduler
from chatstream.scheduler.settings import SchedulerSettings
from chatstream.scheduler.slots import Grant
from chatstream.scheduler.states import Outcome, State
from chatstream.scheduler.views import RequestView, SchedulerStats

__all__ = [
    "QUEUES",
    "Arrival",
    "Eta",
    "EtaStats",
    "FifoQueue",
    "Grant",
    "KeyedQueue",
    "LiveRequest",
    "Outcome",
    "RequestView",
    "Scheduler",
    "SchedulerSettings",
    "SchedulerStats",
    "State",
    "WaitingQueue",
    "rounded",
]
