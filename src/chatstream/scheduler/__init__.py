"""The core: who runs, who waits, who is refused. Pure decisions, no I/O.

Knows: arrivals, slots, a waiting queue, a limit. Knows nothing of: clocks, event loops, HTTP, engines, text, logs.
Facts go in as method calls that carry `now_s`; decisions come out as events (`scheduler.py` says how).

    scheduler.py   the one place that starts, ends and refuses requests
    states.py      the states of a request and the table of transitions
    request.py     a request as the scheduler sees it
    slots.py       slots as records, so that a late report about an old occupant is recognised
    line.py        exact places in a line, without scanning it
    queues.py      waiting-queue policies behind one protocol; `fcfs` is the default
    limits.py      how many may run
    deadlines.py   what must happen when nothing happens: queue timeouts, stalled generations
    retry_after.py when a refused client should come back
    events.py      the decisions, in order; also the log from which the state can be replayed
"""

from chatstream.scheduler.queues import QUEUES, FifoQueue, WaitingQueue
from chatstream.scheduler.request import Arrival, LiveRequest
from chatstream.scheduler.scheduler import RequestView, Scheduler, SchedulerSettings, SchedulerStats
from chatstream.scheduler.slots import Grant
from chatstream.scheduler.states import Outcome, State

__all__ = [
    "QUEUES",
    "Arrival",
    "FifoQueue",
    "Grant",
    "LiveRequest",
    "Outcome",
    "RequestView",
    "Scheduler",
    "SchedulerSettings",
    "SchedulerStats",
    "State",
    "WaitingQueue",
]
