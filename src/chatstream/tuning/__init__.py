"""How many may run at once on this machine with this model: measured, and put into plain words.

    sweep.py       runs 1, 2, 4, 8, … streams on an engine and takes their times
    curve.py       what was measured, and the saturation curve through it
    recommend.py   from that to one number, and why
    start.py       the short version for `max_concurrency="auto"`; cache.py: what it found is kept
    plot.py        charts, the only file here that knows matplotlib

Knows engines by their contract alone, and nothing of queues; `curve` and `recommend` take values and give values.
"""

from __future__ import annotations

from chatstream.tuning.curve import Level, ScalabilityLaw, fit_law
from chatstream.tuning.recommend import Recommendation, recommend
from chatstream.tuning.sweep import Sweep, SweepSettings, sweep

__all__ = ["Level", "Recommendation", "ScalabilityLaw", "Sweep", "SweepSettings", "fit_law", "recommend", "sweep"]
