"""The core: who runs, who waits, who is refused. Pure decisions, no I/O.

Knows: arrivals, slots, a waiting queue, a limit. Knows nothing of: clocks, event loops, HTTP, engines, text, logs.
Facts go in as method calls that carry `now_s`; decisions come out as events (`scheduler.py` says how).

    scheduler.py   the one place that starts, ends and refuses requests
    settings.py    what an operator can set
    states.py      the states of a request and the table of transitions
    request.py     a request as the scheduler sees it
    slots.py       slots as records, so that a late report about an old occupant is recognised
    policies/      who is next: one class a policy, behind one protocol
    waiting.py     everybody who waits, and what each client has in line
    line.py        exact places in a line of any order, without scanning it
    eligibility.py       requests of one conversation, or of one client, take turns
    admission.py   who may join the line
    eta/           when those who wait will start, and how wrong that was
    limits.py      how many may run
    adaptive.py    that number, found from the gaps between tokens; step_time.py: what the engine's steps tell
    deadlines.py   what must happen when nothing happens: queue timeouts, stalled generations
    retry_after.py when a refused client should come back
    events.py      the decisions, in order; also the log from which the state can be replayed
    views.py       what the scheduler shows of itself
"""

from chatstream.scheduler.eta import rounded
from chatstream.scheduler.eta.calibration import Eta, EtaStats
from chatstream.scheduler.policies import QUEUES, FifoQueue, KeyedQueue, WaitingQueue
from chatstream.scheduler.request import Arrival, LiveRequest
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
