"""When those who wait will start.

Simulation instead of a formula: each running generation is continued in 47 plausible ways given how far it is, each
waiting one is given 47 plausible lengths, and the line is played through on the slots for each of the 47. The times
at which somebody starts, over the 47, are the answer. docs/eta.md has the method, its sources and what it promises.

    estimator.py    facts in, estimates out
    picture.py      the line played through
    lengths.py      how long answers are
    pace.py         how fast the engine is
    patience.py     how soon those who wait go away
    calibration.py  what was told, what came true, and the factor that follows from it
"""

from chatstream.scheduler.eta.calibration import Eta, EtaStats
from chatstream.scheduler.eta.estimator import EtaEstimator, rounded, smoothed

__all__ = ["Eta", "EtaEstimator", "EtaStats", "rounded", "smoothed"]
