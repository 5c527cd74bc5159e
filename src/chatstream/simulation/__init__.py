"""Simulation of the server in virtual time: the real scheduler, a modelled engine, synthetic or recorded requests.

Imports the scheduler and nothing else of ChatStream; uses no event loop, clock, HTTP or text.

    workloads.py      synthetic arrivals and lengths, drawn from a seed
    traces.py         recorded arrivals and lengths, from a CSV file
    distributions.py  token counts and gaps between arrivals
    engine.py         durations of prompts and tokens
    clients.py        retries and patience of clients
    run.py            the event loop of the simulation
    measures.py       service quality, fairness and ETA errors of a run
    report.py         charts of a run; needs the extra `report`
"""

from chatstream.simulation.clients import ClientBehaviour
from chatstream.simulation.engine import EngineModel
from chatstream.simulation.measures import Figures, measure
from chatstream.simulation.run import CallRecord, LeakedRequest, Run, Simulation
from chatstream.simulation.traces import read_trace
from chatstream.simulation.workloads import WORKLOADS, Call, Workload

__all__ = [
    "WORKLOADS",
    "Call",
    "CallRecord",
    "ClientBehaviour",
    "EngineModel",
    "Figures",
    "LeakedRequest",
    "Run",
    "Simulation",
    "Workload",
    "measure",
    "read_trace",
]
