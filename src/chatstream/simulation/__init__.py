"""The scheduler of the server in virtual time: what would these people get from these slots?

Knows: the scheduler, and nothing else of ChatStream. Knows nothing of: event loops, clocks, HTTP, text.

    workloads.py      who asks when, and for how much: synthetic, from a seed
    traces.py         the same from a CSV file
    distributions.py  of lengths and of the gaps between arrivals
    engine.py         how long prompts and tokens take
    clients.py        what people do when they are refused or have to wait
    run.py            the loop over whatever happens next
    measures.py       what it was worth to those who asked
    report.py         the same as charts; needs the extra `report`
"""

from chatstream.simulation.clients import ClientBehaviour
from chatstream.simulation.engine import EngineModel
from chatstream.simulation.measures import Figures, measure
from chatstream.simulation.run import LeakedRequest, Run, Simulation, Visit
from chatstream.simulation.traces import read_trace
from chatstream.simulation.workloads import WORKLOADS, Call, Workload

__all__ = [
    "WORKLOADS",
    "Call",
    "ClientBehaviour",
    "EngineModel",
    "Figures",
    "LeakedRequest",
    "Run",
    "Simulation",
    "Visit",
    "Workload",
    "measure",
    "read_trace",
]
