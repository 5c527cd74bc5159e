"""The expected start of waiting requests.

A simulation instead of a formula: each running request gets 47 plausible remaining lengths, given its progress, and
each waiting request 47 plausible lengths; the queue is simulated on the slots for each of the 47 draws. The 47 start
times of a position are its distribution. docs/eta.md has the results, the method and its sources.

    estimator.py    facts in, estimates out
    picture.py      the simulation of the queue
    lengths.py      the distribution of answer lengths
    pace.py         the speed of the engine
    patience.py     the rate at which waiting clients disconnect
    calibration.py  the measured errors, and the factor on the p90 that follows from them
"""

from chatstream.scheduler.eta.calibration import EtaStats
from chatstream.scheduler.eta.estimator import EtaEstimator, rounded, smoothed
from chatstream.scheduler.request import Eta

__all__ = ["Eta", "EtaEstimator", "EtaStats", "rounded", "smoothed"]
