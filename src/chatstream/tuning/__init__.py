"""Measures the best concurrency of a model on this machine, and explains the result.

    sweep.py       runs 1, 2, 4, 8, … concurrent streams on an engine and measures them
    curve.py       measured levels, and the saturation curve fitted to them
    recommend.py   the recommended concurrency, with its reasons
    start.py       the short measurement of `max_concurrency="auto"`
    cache.py       keeps its results on disk
    plot.py        charts; only this module imports matplotlib

Uses engines through `engines.base` only and has no queue. `curve` and `recommend` are pure functions of values.
"""

from __future__ import annotations

from chatstream.tuning.curve import Level, ScalabilityLaw, fit_law
from chatstream.tuning.recommend import Recommendation, recommend
from chatstream.tuning.sweep import Sweep, SweepSettings, sweep

__all__ = ["Level", "Recommendation", "ScalabilityLaw", "Sweep", "SweepSettings", "fit_law", "recommend", "sweep"]
